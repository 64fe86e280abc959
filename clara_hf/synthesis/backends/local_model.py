"""A causal language model in this process as what completes chats: requests are gathered into batches."""

import asyncio
from dataclasses import replace

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, set_seed

from clara_hf.program import UsageError
from clara_hf.synthesis.backends.client import ChatReply, ChatRequest, RequestFailed
from clara_hf.synthesis.text import clean_text
from modeling_clara.control_tokens_clara import ControlTokens
from modeling_clara.quantization_clara import dequantized


class LocalModel:
    """Use as an async context manager; any number of tasks may call `complete` at once.

    Requests of one temperature go through `generate` together. What is sampled depends on the requests of its batch,
    so a run is repeated exactly by its logged replies, not by its seed.

    Args:
        path: a causal language model with a chat template.
        max_tokens: of a reply.
        batch_size: requests per batch.
        gguf_file: name of the model's GGUF file in that folder, see
            [`~modeling_clara.quantization_clara.dequantized`].

    Raises:
        UsageError: the model cannot be loaded, or has no chat template.
    """

    def __init__(self, path: str, max_tokens: int = 2048, batch_size: int = 8, gguf_file: str | None = None):
        self.path, self.max_tokens, self.batch_size = path, max_tokens, batch_size
        try:
            place = dequantized(self.path, gguf_file) if gguf_file else self.path
            self.tokenizer = AutoTokenizer.from_pretrained(place, padding_side="left")
            self.model = AutoModelForCausalLM.from_pretrained(place, dtype="auto").eval()
        except (OSError, ValueError, KeyError, ImportError) as error:
            raise UsageError(f"--model {self.path} cannot be loaded as a causal language model: {error}") from error
        if self.tokenizer.chat_template is None:
            raise UsageError(f"--model {self.path} has no chat template: take a model that was tuned for chat.")
        if self.tokenizer.pad_token is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.control = ControlTokens(self.tokenizer)
        if torch.accelerator.is_available():
            self.model.to(torch.accelerator.current_accelerator())
        ends = self.model.generation_config.eos_token_id
        self.ends = set(ends if isinstance(ends, list) else [ends]) - {None}
        self.room = getattr(self.model.config.get_text_config(), "max_position_embeddings", None) or 2**31

    async def __aenter__(self) -> "LocalModel":
        self._queue: asyncio.Queue[tuple[ChatRequest, asyncio.Future]] = asyncio.Queue()
        self._loop = asyncio.create_task(self._serve())
        return self

    async def __aexit__(self, *_) -> None:
        self._loop.cancel()
        await asyncio.gather(self._loop, return_exceptions=True)

    async def complete(self, request: ChatRequest) -> ChatReply:
        """The model's reply.

        Raises:
            RequestFailed: the prompt leaves no room for a reply, or the chat template refuses it.
        """
        future = asyncio.get_running_loop().create_future()
        await self._queue.put((request, future))
        return await future

    async def _serve(self) -> None:
        waiting: list[tuple[ChatRequest, asyncio.Future]] = []
        while True:
            if not waiting:
                waiting.append(await self._queue.get())
            # All workers that are about to ask get their turn first.
            await asyncio.sleep(0.01)
            while not self._queue.empty():
                waiting.append(self._queue.get_nowait())
            temperature = waiting[0][0].temperature
            chosen = [entry for entry in waiting if entry[0].temperature == temperature][: self.batch_size]
            waiting = [entry for entry in waiting if entry not in chosen]
            replies: list[ChatReply | RequestFailed | Exception]
            try:
                replies = [*await asyncio.to_thread(self._generate, [request for request, _ in chosen])]
            except Exception as error:  # what torch raises (out of memory and others) belongs to who asked
                replies = [error] * len(chosen)
            for (_, future), reply in zip(chosen, replies, strict=True):
                if future.done():
                    continue
                if isinstance(reply, Exception):
                    future.set_exception(reply)
                else:
                    future.set_result(reply)

    def _generate(self, requests: list[ChatRequest]) -> list[ChatReply | RequestFailed]:
        """Replies in the order of the requests; a request that cannot be carried out gets its error."""
        encoded = [self._encode(request) for request in requests]
        fitting = [ids for ids in encoded if not isinstance(ids, RequestFailed)]
        replies = iter(self._complete(fitting, requests[0]) if fitting else [])
        return [ids if isinstance(ids, RequestFailed) else next(replies) for ids in encoded]

    def _encode(self, request: ChatRequest) -> list[int] | RequestFailed:
        messages = [{**message, "content": self.control.hide(message["content"])} for message in request.messages]
        try:
            text = str(self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
        except Exception as error:  # templates raise what they like
            if messages[0]["role"] != "system":
                return RequestFailed(f"the chat template refuses the prompt ({error})")
            # Templates without a system turn: its text goes in front of the first user's.
            system, user, *rest = request.messages
            first = {"role": "user", "content": f"{system['content']}\n\n{user['content']}"}
            return self._encode(replace(request, messages=[first, *rest]))
        (ids,) = self.control.encode([text])
        if len(ids) >= self.room:
            return RequestFailed(f"a prompt of {len(ids)} tokens, where the model reads {self.room}")
        return ids

    def _complete(self, rows: list[list[int]], first: ChatRequest) -> list[ChatReply]:
        longest = max(map(len, rows))
        batch = self.tokenizer.pad({"input_ids": rows}, return_tensors="pt").to(self.model.device)
        sampling = {"do_sample": True, "temperature": first.temperature} if first.temperature else {"do_sample": False}
        set_seed(first.seed)
        with torch.inference_mode():
            output = self.model.generate(
                **batch,
                **sampling,
                max_new_tokens=max(1, min(self.max_tokens, self.room - longest)),
                pad_token_id=self.tokenizer.pad_token_id,
            )
        written = output[:, longest:].tolist()
        replies = []
        for ids, new in zip(rows, written, strict=True):
            # What stands behind the first end is padding, which may be the same token.
            end = next((place for place, token in enumerate(new) if token in self.ends), None)
            text = clean_text(str(self.tokenizer.decode(new[:end], skip_special_tokens=True)))
            replies.append(ChatReply(text, len(ids), len(new) if end is None else end + 1, cut=end is None))
        return replies
