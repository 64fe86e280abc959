"""Answers decoded by a vLLM server: compressor, query reasoner and collection are here, the generator is there."""

import base64
import io
import json
from collections.abc import AsyncIterator

import httpx
import torch

from clara_hf.serving.decoding import TextStream
from clara_hf.serving.engine import Ask, Done, Engine, Found, Piece, Unavailable


class VllmAnswerer:
    """Posts prompt embeddings to the completions endpoint of a vLLM server (`--enable-prompt-embeds`).

    Args:
        engine: makes the prompts.
        url: of the server, without `/v1`.
        model: name of the generator there.
        dtype: in which embeddings are sent; the server's own.
        seconds: limit of one answer.
    """

    def __init__(self, engine: Engine, url: str, model: str, dtype: torch.dtype, seconds: float):
        self.engine, self.model, self.dtype = engine, model, dtype
        self.client = httpx.AsyncClient(base_url=url, timeout=httpx.Timeout(seconds, connect=10))

    @staticmethod
    def first_model(url: str) -> str:
        """The name of the first model that the server has.

        Raises:
            ValueError: no such server answers at `url`.
        """
        try:
            return httpx.get(f"{url}/v1/models", timeout=10).raise_for_status().json()["data"][0]["id"]
        except (httpx.HTTPError, ValueError, LookupError) as error:
            raise ValueError(f"--engine vllm {url}: no vLLM server answers there ({error})") from error

    async def answer(self, ask: Ask) -> AsyncIterator[Found | Piece | Done]:
        """As [`Engine.answer`].

        Raises:
            Unavailable: the prompt is not finite, which vLLM would not notice, or the server fails.
        """
        ask.decode_here = False
        async for found in self.engine.answer(ask):
            yield found
            async for event in self._continued(ask, found.embeddings):
                yield event

    async def _continued(self, ask: Ask, embeddings: torch.Tensor) -> AsyncIterator[Piece | Done]:
        embeddings = embeddings.to(self.dtype)
        if not torch.isfinite(embeddings).all():
            raise Unavailable("the prompt's embeddings are not finite: check the model's weights and --vllm-dtype")
        buffer = io.BytesIO()
        torch.save(embeddings.contiguous().clone(), buffer)
        decoding = ask.decoding
        body = {
            "model": self.model,
            "prompt_embeds": base64.b64encode(buffer.getvalue()).decode(),
            "max_tokens": decoding.max_tokens,
            "temperature": decoding.temperature,
            "top_p": decoding.top_p,
            "seed": decoding.seed,
            "stop": list(decoding.stop),
            "n": decoding.n,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        texts = [""] * decoding.n
        streams = [TextStream(lambda ids, choice=choice: texts[choice]) for choice in range(decoding.n)]
        reasons: dict[int, str] = {}
        tokens = 0
        async for chunk in self._chunks(body):
            tokens = (chunk.get("usage") or {}).get("completion_tokens", tokens)
            for choice in chunk["choices"]:
                number = choice["index"]
                texts[number] += choice["text"]
                reasons[number] = choice.get("finish_reason") or reasons.get(number, "")
                piece = streams[number].piece([], last=bool(reasons[number]))
                if piece and ask.stream:
                    yield Piece(number, piece)
        if sorted(reasons) != list(range(decoding.n)) or not all(reasons.values()):
            raise Unavailable(f"the vLLM server finished {len(reasons)} of {decoding.n} answers")
        self.engine.metrics.tokens.labels("completion").inc(tokens)
        for number in range(decoding.n):
            # The server counts all choices together.
            yield Done(number, streams[number].given, reasons[number], tokens if number == 0 else 0)

    async def _chunks(self, body: dict) -> AsyncIterator[dict]:
        try:
            async with self.client.stream("POST", "/v1/completions", json=body) as response:
                if response.status_code != 200:
                    text = (await response.aread())[:300].decode(errors="replace")
                    raise Unavailable(f"the vLLM server answered {response.status_code}: {text}")
                async for line in response.aiter_lines():
                    data = line.removeprefix("data:").strip()
                    if line.startswith("data:") and data != "[DONE]":
                        chunk = json.loads(data)
                        if "error" in chunk:
                            raise Unavailable(f"the vLLM server broke off: {chunk['error']}")
                        yield chunk
        except (httpx.HTTPError, json.JSONDecodeError) as error:
            raise Unavailable(f"the vLLM server cannot be reached or understood ({error!r})") from error
