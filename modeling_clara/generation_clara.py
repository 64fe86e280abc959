"""The verbs of a CLaRa model, on texts: compress, retrieve, generate; and answer, on tensors."""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from transformers import GenerationConfig
from transformers.utils import ModelOutput, logging

from .adapters_clara import GENERATOR, merged_adapter
from .decoding_clara import can_decode_packed, check_generation_options, decode_packed, options_named
from .functional_clara import (
    check_document_index,
    check_finite,
    check_memories,
    check_tokens,
    cosine_scores,
    memory_bank,
    name_of_row,
    token_batches,
)
from .processing_clara import distinct_texts


logger = logging.get_logger(__name__)

DEFAULT_MAX_NEW_TOKENS = 64
DEFAULT_BATCH_SIZE = 32
DOCUMENTS, QUESTIONS = "documents", "questions"
FINITE_WEIGHTS = "load weights that are finite, or a dtype with a wider range"


@dataclass
class CLaRaRetrievalOutput(ModelOutput):
    """
    Args:
        scores (`[B, k]` float32): cosine similarities, best first, -inf in unused slots.
        indices (`[B, k]` int64): positions among the question's candidates, -1 in unused slots.
    """

    scores: torch.Tensor | None = None
    indices: torch.Tensor | None = None


@dataclass
class CLaRaGenerationOutput(ModelOutput):
    """
    Args:
        texts (`list[str]`): answers without special tokens; B times `num_return_sequences` of them.
        indices (`[B, k]` int64): documents in the prompt, in the order of their slots, -1 in unused slots.
        scores (`[B, k]` float32): their cosine similarities; `None` with `rerank=False`.
        sequences (`[B, new tokens]` int64): generated ids.
        keys (`list[list[str]]`): of the documents in the prompt, where they come from a store.
        generation: what the decoder's `generate` returned, if `return_dict_in_generate` was set.
    """

    texts: list[str] | None = None
    indices: torch.Tensor | None = None
    scores: torch.Tensor | None = None
    sequences: torch.Tensor | None = None
    keys: list[list[str]] | None = None
    generation: ModelOutput | None = None


class CLaRaGeneration:
    """The verbs, for a model with `decoder`, `encode`, `processor` and the embeddings of prompts."""

    def at_rate(self, rate: int | None):
        """This model at another of its compression rates: the same weights, with a configuration of its own.

        Args:
            rate (`int`, *optional*): one of `compression_rate`; `None` for the one in use.

        Raises:
            ValueError: the model was not made for this rate.

        Example:

        ```python
        model.at_rate(64).compress(documents)  # as model.compress(documents, rate=64)
        ```
        """
        if rate is None:
            return self
        config = copy.copy(self.config)
        config.rate = rate
        config.validate_ranges()
        view = copy.copy(self)
        view.config = config
        view.processor = type(self.processor)(self.processor.tokenizer, config)
        return view

    def _wanted(self, n_docs: int | None) -> int:
        wanted = self.config.top_k if n_docs is None else n_docs
        if not isinstance(wanted, int) or isinstance(wanted, bool) or wanted < 1:
            raise ValueError(f"n_docs must be a whole number of at least 1, got {wanted!r:.80}.")
        return wanted

    def _slots(self, is_candidate: torch.Tensor, n_docs: int | None = None) -> int:
        """The number of slots for candidates `[B, N]`: `n_docs`, or N if that is less. Too few candidates are told."""
        wanted = self._wanted(n_docs)
        if wanted > int(is_candidate.sum(dim=1).min()):
            logger.warning_once(f"n_docs={wanted} is more than a question has candidates: all of its own are used.")
        return min(wanted, is_candidate.shape[1])

    @contextmanager
    def _inference(self) -> Iterator[None]:
        """No gradients, and evaluation mode (no adapter dropout) for the block; each module's mode is restored."""
        in_training = [module for module in self.modules() if module.training]
        for module in in_training:
            module.training = False
        try:
            with torch.no_grad():
                yield
        finally:
            for module in in_training:
                module.training = True

    def _encode_rows(
        self, kind: str, rows: list[list[int]], batch_size: int | None, most: int | None, show_progress: bool
    ) -> torch.Tensor:
        """Memory states `[rows, l, H]` of encoded `documents` or `questions`, in batches of like length, returned in
        the given order."""
        read = self._encode_questions if kind == QUESTIONS else self._encode_documents
        batches = length_batches(self.processor.encoded_lengths(rows), batch_size, most)
        memories = torch.empty((len(rows), *self._memory_shape), dtype=self.dtype, device=self.device)
        with self._inference():
            for chosen in logging.tqdm(batches, desc="Compressing", disable=not show_progress):
                batch = self.processor.pad_encodings([rows[row] for row in chosen]).to(self.device)
                # The type differs from the model's under autocast.
                ids, mask = batch["input_ids"], batch["attention_mask"]
                found = read(ids, mask).to(self.dtype)
                check_finite(found, lambda row, chosen=chosen: f"the memory of {kind}[{chosen[row]}]", FINITE_WEIGHTS)
                memories[chosen] = found
        return memories

    def compress(
        self,
        documents: list[str],
        batch_size: int | None = None,
        show_progress: bool = False,
        rate: int | None = None,
        max_tokens_per_batch: int | None = None,
    ) -> torch.Tensor:
        """Compress documents into memory vectors.

        Args:
            documents (N strings): a list, tuple, NumPy array, or column of pandas or datasets; those longer than
                `doc_max_length` tokens are cut, which is reported.
            batch_size (`int`, *optional*): documents per forward pass, 32 by default; they are sorted by length first.
            show_progress (`bool`): whether to show a progress bar.
            rate (`int`, *optional*): which of several compression rates; the one in use by default, see `at_rate`.
            max_tokens_per_batch (`int`, *optional*): tokens per forward pass, padding and memory tokens included, in
                place of `batch_size`: a device is as busy with short documents as with long ones.

        Returns:
            `[N, l, H]` in the model's dtype, on its device, in the order of `documents`.

        Raises:
            TypeError, ValueError: no documents, an empty or non-string one, or one with a reserved token; a memory with
                values that are not finite; both sizes of a batch, or a document with more tokens than a batch may have.

        Example:

        ```python
        memories = model.compress(documents, max_tokens_per_batch=16_384)
        ```
        """
        rows = self.processor.encode_documents(documents)
        return self.at_rate(rate).compress_encoded(rows, batch_size, show_progress, max_tokens_per_batch)

    def compress_encoded(
        self,
        rows: list[list[int]],
        batch_size: int | None = None,
        show_progress: bool = False,
        max_tokens_per_batch: int | None = None,
    ) -> torch.Tensor:
        """[`compress`] of documents that `processor.encode_documents` or `encode_and_cut` made token ids of."""
        return self._encode_rows(DOCUMENTS, rows, batch_size, max_tokens_per_batch, show_progress)

    def encode_questions(self, questions: list[str], batch_size: int = 32, rate: int | None = None) -> torch.Tensor:
        """Read questions with the query reasoner (or the compressor, if the model has none yet) to `[B, l, H]`, at the
        compression `rate` of the memories that they are compared with."""
        rows = self.processor.encode_questions(questions)
        return self.at_rate(rate)._encode_rows(QUESTIONS, rows, batch_size, most=None, show_progress=False)

    @property
    def _memory_shape(self) -> tuple[int, int]:
        return self.config.num_memory_tokens, self.config.hidden_size

    def _bank(self, memories, num_questions: int, allow_none: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        bank, index = memory_bank(memories, num_questions, self._memory_shape, self.device, allow_none)
        bank = bank.to(self.dtype)
        check_finite(bank, partial(name_of_row, memories=memories), "compress its document again")
        return bank, index

    def _rank(
        self, questions: list[str], bank: torch.Tensor, index: torch.Tensor, n_docs: int | None
    ) -> CLaRaRetrievalOutput:
        scores = cosine_scores(self.encode_questions(questions), bank).gather(1, index.clamp(min=0))
        best = scores.masked_fill(index < 0, float("-inf")).sort(dim=-1, descending=True, stable=True)
        count = self._slots(index >= 0, n_docs)
        found = best.indices[:, :count].masked_fill(best.values[:, :count].isneginf(), -1)
        return CLaRaRetrievalOutput(scores=best.values[:, :count], indices=found)

    def retrieve(
        self,
        questions: list[str],
        memories,
        n_docs: int | None = None,
        *,
        top_k: int | None = None,
        rate: int | None = None,
    ) -> CLaRaRetrievalOutput:
        """Rank memories for questions by cosine similarity.

        Args:
            questions (`list[str]`, B of them).
            memories: `[N, l, H]` shared by all questions, or a list of B tensors `[N_b, l, H]`. Or a store: an object
                with `search(queries, n_docs)`, which gives `scores` `[B, k]` and `keys`, and with `get(keys)`, such as
                `clara_hf.memory_store.MemoryStore`; what its search gives is returned.
            n_docs (`int`, *optional*): how many to return; the configuration's `top_k` by default, at most N.
            top_k (`int`, *optional*): the former name of `n_docs`.
            rate (`int`, *optional*): which of several compression rates the memories have, see `at_rate`.

        Raises:
            TypeError, ValueError: questions that are empty or no strings, memories of another width or rate, or with
                values that are not finite.
        """
        if rate is not None:
            return self.at_rate(rate).retrieve(questions, memories, n_docs, top_k=top_k)
        questions = self.processor.check_user_texts(questions, "questions")
        n_docs = _documents_wanted(n_docs, top_k)
        if hasattr(memories, "search"):
            return memories.search(self.encode_questions(questions), self._wanted(n_docs))
        with torch.no_grad():
            return self._rank(questions, *self._bank(memories, len(questions)), n_docs)

    def generate(
        self,
        questions: list[str],
        documents: list[list[str]] | None = None,
        memories=None,
        n_docs: int | None = None,
        rerank: bool = True,
        store=None,
        expand: int = 0,
        expand_max_length: int | None = None,
        rate: int | None = None,
        **generate_kwargs,
    ) -> CLaRaGenerationOutput:
        """Answer questions from the best of their candidate documents; one call of the decoder's `generate` for all.

        Args:
            questions (`list[str]`, B of them).
            documents (`list[list[str]]`): candidates of each question, compressed here; equal texts of a question are
                one candidate, the first; or
            memories: made earlier, `[N, l, H]` shared by all questions or a list of B tensors `[N_b, l, H]`; or
            n_docs (`int`, *optional*): documents in the prompt; the configuration's `top_k` by default, all with
                `rerank=False`.
            rerank (`bool`): `False` puts the given documents into the prompt in their order; with memories `[0, l, H]`
                the prompt has none.
            store: see `retrieve`; the prompt has the best of all that it holds.
            expand (`int`): so many documents of the prompt, from the first on, stand there also as raw text, behind the
                memories, for what compression lost. Needs `documents`, or a store whose search gives `texts`.
            expand_max_length (`int`, *optional*): tokens kept of each raw text; `doc_max_length` by default.
            rate (`int`, *optional*): which of several compression rates documents are compressed at, or the memories
                have, see `at_rate`.
            generate_kwargs: any option of transformers' `generate`, a streamer and `generation_config` included. By
                default decoding is greedy with at most 64 new tokens, and the base's own generation defaults are not
                used. `max_length` counts the prompt too: `max_new_tokens` does not. `top_k` is sampling's; without
                `do_sample` it is taken for `n_docs`, its former meaning, with a warning.

        Raises:
            TypeError, ValueError: see `compress` and `retrieve`; not one of documents, memories and store; an option
                of transformers' that is not of its type, or that this model has no use for; a `max_length` that the
                prompt fills; an `expand` over `n_docs`, or with memories, whose texts are not known.

        Example:

        ```python
        output = model.generate(["Who keeps a goat?"], store=store, n_docs=3, expand=1, max_new_tokens=8)
        ```
        """
        if rate is not None:
            own = {"n_docs": n_docs, "rerank": rerank, "store": store, "expand": expand}
            own["expand_max_length"] = expand_max_length
            return self.at_rate(rate).generate(questions, documents, memories, **own, **generate_kwargs)
        if sum(given is not None for given in (documents, memories, store)) != 1:
            raise ValueError("give one of documents, memories and store.")
        if "top_k" in generate_kwargs and n_docs is None and not _samples(generate_kwargs):
            n_docs = _documents_wanted(None, generate_kwargs.pop("top_k"))
        check_generation_options(generate_kwargs)
        self._check_expansion(expand, expand_max_length, memories is not None, n_docs, rerank or store is not None)
        questions = self.processor.check_user_texts(questions, "questions")
        if store is not None:
            return self._generate_from_store(questions, store, n_docs, expand, expand_max_length, generate_kwargs)
        if documents is not None:
            questions, documents = self.processor.check_candidates(questions, documents)
            distinct, index = distinct_texts(documents)
            bank, index = self.compress(distinct), index.to(self.device)
        else:
            bank, index = self._bank(memories, len(questions), allow_none=not rerank)
        scores, chosen = None, _in_order(index)
        if rerank:
            with torch.no_grad():
                found = self._rank(questions, bank, index, n_docs)
            scores, chosen = found.scores, found.indices
        elif n_docs is not None:
            chosen = chosen[:, : self._slots(index >= 0, n_docs)]
        texts = None
        if expand:
            best = [[place for place in row if place >= 0][:expand] for row in chosen.tolist()]
            texts = [[documents[row][place] for place in places] for row, places in enumerate(best)]
            texts = self._cut_texts(texts, expand_max_length)
        output = self._answer(questions, bank, index, chosen, texts, generate_kwargs)
        output.indices, output.scores = chosen, scores
        return output

    def _check_expansion(self, expand, max_length, has_memories: bool, n_docs: int | None, ranks: bool) -> None:
        if not isinstance(expand, int) or isinstance(expand, bool) or expand < 0:
            raise ValueError(f"expand must be a whole number of at least 0, got {expand!r:.80}.")
        if max_length is not None and (
            not isinstance(max_length, int) or isinstance(max_length, bool) or max_length < 1
        ):
            raise ValueError(f"expand_max_length must be a whole number of at least 1, got {max_length!r:.80}.")
        if expand and has_memories:
            raise ValueError(f"expand={expand} needs texts, which memories do not have: give documents or a store.")
        if expand and (ranks or n_docs is not None) and expand > self._wanted(n_docs):
            raise ValueError(
                f"expand={expand} is more than n_docs={self._wanted(n_docs)}, the documents in the prompt."
            )

    def _cut_texts(self, texts: list[list[str]], max_length: int | None) -> list[list[str]]:
        limit = max_length or self.config.doc_max_length
        return [[cut for text in row if (cut := self.processor.cut(text, limit)).strip()] for row in texts]

    def _generate_from_store(
        self, questions, store, n_docs, expand, expand_max_length, generate_kwargs
    ) -> CLaRaGenerationOutput:
        found = self.retrieve(questions, store, n_docs)
        texts = self._cut_texts([row[:expand] for row in found.texts], expand_max_length) if expand else None
        bank, index = self._bank([store.get(keys) for keys in found.keys], len(questions), allow_none=True)
        output = self._answer(questions, bank, index, _in_order(index), texts, generate_kwargs)
        output.indices, output.scores, output.keys = _in_order(index), found.scores, found.keys
        return output

    def _answer(self, questions, bank, index, chosen, texts, generate_kwargs) -> CLaRaGenerationOutput:
        """From the memories that `chosen` names, and from raw `texts` of each question where there are some."""
        is_used = chosen >= 0
        prompts = self.processor.encode_prompts(questions, is_used.sum(dim=1).tolist(), texts)
        slots = index.gather(1, chosen.clamp(min=0)).masked_fill(~is_used, -1)
        return self.answer(**prompts, memories=bank, document_index=slots, **generate_kwargs)

    def answer(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        memories: torch.Tensor,
        document_index: torch.Tensor,
        rate: int | None = None,
        **generate_kwargs,
    ) -> CLaRaGenerationOutput:
        """Answer prompts, as [`CLaRaProcessor.encode_prompts`] makes them, from memories at hand.

        Args:
            input_ids, attention_mask (`[B, L]` int64): prompts up to where the answer begins, padded on the left.
            memories (`[D, l, H]`): made earlier.
            document_index (`[B, k]` int64): rows of `memories` in the order of the prompt's slots, -1 in unused ones.
            rate (`int`, *optional*): which of several compression rates prompts and memories have, see `at_rate`.
            generate_kwargs: see `generate`.

        Returns:
            `texts`, `sequences` and `generation`.

        Raises:
            ValueError: memories of another shape or number than the prompts have slots for; an option as in `generate`.
        """
        if rate is not None:
            return self.at_rate(rate).answer(input_ids, attention_mask, memories, document_index, **generate_kwargs)
        check_generation_options(generate_kwargs)
        check_memories(memories, self._memory_shape, "memories")
        check_document_index(document_index, len(memories))
        check_tokens("input_ids", input_ids, attention_mask, len(document_index), self.config.vocab_size)
        rows = document_index.to(memories.device)
        selected = memories[rows[rows >= 0]].to(self.device)
        input_ids, attention_mask = input_ids.to(self.device), attention_mask.to(self.device)
        options = self._generation_options(generate_kwargs, input_ids.shape[1])
        merged = merged_adapter(self.decoder, GENERATOR, input_ids.numel())
        with self._inference(), merged:
            embeddings = self._prompt_embeddings(input_ids, selected)
            if can_decode_packed(self.decoder, attention_mask, options):
                bound = {"prompts": embeddings, "mask": attention_mask, "pad_token_id": options["pad_token_id"]}
                options["custom_generate"] = partial(decode_packed, **bound)
            with options_named(generate_kwargs):
                output = self.decoder.generate(inputs_embeds=embeddings, attention_mask=attention_mask, **options)
        sequences, generation = (output.sequences, output) if isinstance(output, ModelOutput) else (output, None)
        texts = self.processor.tokenizer.batch_decode(sequences, skip_special_tokens=True)
        return CLaRaGenerationOutput([text.strip() for text in texts], sequences=sequences, generation=generation)

    def prompt_embeddings(self, question: str, memories: torch.Tensor) -> torch.Tensor:
        """The prompt of a question as another server of the generator takes it.

        Args:
            question: its text.
            memories (`[k, l, H]`): in the order of the prompt's slots.

        Returns:
            `[L, H]` in the model's dtype.

        Raises:
            ValueError: memories of another shape; a question that is empty or holds a token that the model reserves.
        """
        check_memories(memories, self._memory_shape, "memories")
        input_ids = self.processor.encode_prompts([question], [len(memories)])["input_ids"].to(self.device)
        with self._inference():
            return self._prompt_embeddings(input_ids, memories.to(self.device))[0]

    def _generation_options(self, generate_kwargs: dict, width: int) -> dict:
        """`generate_kwargs` with the defaults of this model, for prompts of `width` tokens."""
        options = {**generate_kwargs}
        given = options.get("generation_config")
        if isinstance(given, dict):
            given = GenerationConfig(**given)
        known = options if given is None else {name for name, value in given.to_dict().items() if value is not None}
        longest = options.get("max_length") if given is None else given.max_length
        if longest is not None and longest <= width and "max_new_tokens" not in known:
            raise ValueError(
                f"max_length={longest} leaves no room for an answer, since it counts the prompt's {width} tokens too: "
                "give max_new_tokens instead."
            )
        defaults = {"eos_token_id": self.config.eos_token_id, "pad_token_id": self.config.pad_token_id}
        if "max_length" not in known:
            defaults["max_new_tokens"] = DEFAULT_MAX_NEW_TOKENS
        defaults = {name: value for name, value in defaults.items() if name not in known}
        if "stop_strings" in known:
            options.setdefault("tokenizer", self.processor.tokenizer)
        if given is None:
            return options | defaults
        # transformers takes either a configuration or single options.
        options["generation_config"] = copy.deepcopy(given)
        options["generation_config"].update(**defaults)
        return options


def length_batches(lengths: Sequence[int], batch_size: int | None, most: int | None) -> list[list[int]]:
    """Positions of texts of so many tokens, longest first, in batches of `batch_size`, 32 by default, or of at most
    `most` tokens, see [`token_batches`].

    Raises:
        ValueError: both are given, one is no whole number of at least 1, or a text has more tokens than `most`.
    """
    if batch_size is not None and most is not None:
        raise ValueError(
            f"batch_size={batch_size!r:.80} and max_tokens_per_batch={most!r:.80} both say how large a batch is: leave "
            "one of them out."
        )
    for name, size in (("batch_size", batch_size), ("max_tokens_per_batch", most)):
        if size is not None and (not isinstance(size, int) or isinstance(size, bool) or size < 1):
            raise ValueError(f"{name} must be a whole number of at least 1, got {size!r:.80}.")
    if most is not None:
        return token_batches(lengths, most)
    size = DEFAULT_BATCH_SIZE if batch_size is None else batch_size
    order = sorted(range(len(lengths)), key=lambda position: -lengths[position])
    return [order[start : start + size] for start in range(0, len(order), size)]


def _in_order(index: torch.Tensor) -> torch.Tensor:
    """Positions of the documents in each row, -1 behind them where the row has copies or fewer than others."""
    is_none, order = (index < 0).sort(dim=1, stable=True)
    return order.masked_fill(is_none, -1)


def _documents_wanted(n_docs: int | None, top_k: int | None) -> int | None:
    if top_k is None:
        return n_docs
    if n_docs is not None:
        raise ValueError(f"n_docs={n_docs!r:.80} and top_k={top_k!r:.80} say the same: give n_docs.")
    logger.warning_once("top_k, as a number of documents, is now called n_docs.")
    return top_k


def _samples(options: dict) -> bool:
    """Whether an option says to sample, so that `top_k` is sampling's."""
    return bool(options.get("do_sample")) or options.get("generation_config") is not None
