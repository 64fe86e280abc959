"""CLaRa: compress documents into memory vectors, retrieve among the vectors, answer from them (arXiv 2511.18659)."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial

import torch
from torch import nn
from transformers import BatchFeature
from transformers.utils import ModelOutput, logging

from .adapters_clara import (
    COMPRESSOR,
    GENERATOR,
    QUERY_REASONER,
    adapter_parameters,
    add_adapter,
    copy_adapter,
    remove_adapter,
    use_adapter,
)
from .compat_original_clara import OriginalMethods
from .functional_clara import (
    check_document_index,
    check_finite,
    check_memories,
    contiguous,
    cosine_scores,
    cross_entropy,
    mask_or_ones,
    memory_bank,
    name_of_row,
    position_ids,
    positions_to_keep,
)
from .outputs_clara import CLaRaGenerationOutput, CLaRaOutput, CLaRaRetrievalOutput
from .pretrained_clara import CLaRaPreTrainedModel
from .processing_clara import distinct_texts
from .topk_clara import straight_through_topk


logger = logging.get_logger(__name__)

MEMORY_EMBEDDINGS = "memory_embeddings"
DEFAULT_MAX_NEW_TOKENS = 64
FINITE_WEIGHTS = "load weights that are finite, or a dtype with a wider range"


class CLaRaForRetrievalGeneration(OriginalMethods, CLaRaPreTrainedModel):
    r"""One decoder with three LoRA adapters: compressor, query reasoner and generator.

    `compress` turns documents into memory vectors, `retrieve` ranks them for questions, `generate` answers from the
    best ones. `forward` is the training step over tensors that [`CLaRaProcessor`] makes.

    Shapes: B questions, N candidates, k selected, l memory tokens, H hidden size, D distinct documents.
    """

    def add_query_reasoner(self) -> None:
        """Give the model a query-reasoner adapter that starts as a copy of the compressor; nothing if it has one."""
        if self.config.query_reasoner:
            return
        add_adapter(self.decoder, QUERY_REASONER, self.config)
        copy_adapter(self.decoder, COMPRESSOR, QUERY_REASONER)
        self.config.query_reasoner = True
        self.requires_grad_(False)
        self.train(self.training)

    def remove_query_reasoner(self) -> None:
        """Take the query reasoner off, so that the compressor reads questions; nothing if there is none."""
        if self.config.query_reasoner:
            remove_adapter(self.decoder, QUERY_REASONER)
            self.config.query_reasoner = False

    def part_parameters(self, part: str) -> list[nn.Parameter]:
        """Parameters of one trainable part: an adapter's, or the memory embeddings.

        Raises:
            ValueError: `part` is unknown, or the model has no query reasoner yet.
        """
        if part == MEMORY_EMBEDDINGS:
            return list(self.memory_embeddings.parameters())
        if part not in self.adapter_names:
            raise ValueError(f"part must be one of {[*self.adapter_names, MEMORY_EMBEDDINGS]}, got {part!r}.")
        return list(adapter_parameters(self.decoder, part))

    def train_only(self, *parts: str) -> None:
        """Let gradients reach only the named parts: `compressor`, `query_reasoner`, `generator`, `memory_embeddings`"""
        parameters = [parameter for part in parts for parameter in self.part_parameters(part)]
        self.requires_grad_(False)
        for parameter in parameters:
            parameter.requires_grad_(True)

    @property
    def compressor_trains(self) -> bool:
        """Whether gradients reach the compressor's weights or the memory embeddings."""
        parts = (COMPRESSOR, MEMORY_EMBEDDINGS)
        return any(parameter.requires_grad for part in parts for parameter in self.part_parameters(part))

    # The three forward passes

    def _hidden_states(self, adapter: str, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
        """Last hidden states `[rows, length, H]` after the final norm, without output head or other layers."""
        with use_adapter(self.decoder, adapter):
            return self.decoder.base_model(
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                position_ids=position_ids(attention_mask),
                use_cache=False,
            ).last_hidden_state

    def encode(
        self, adapter: str, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Run a text and its memory tokens, which are the last l positions, under `adapter`.

        Without `attention_mask` all positions are attended.

        Returns:
            memory states `[rows, l, H]` and the mean text state minus the mean memory state `[rows, H]`, whose mean
            square is the MSE loss.
        """
        count = self.config.num_memory_tokens
        attention_mask = mask_or_ones(attention_mask, input_ids)
        text = self.get_input_embeddings()(input_ids[:, :-count])
        own = torch.arange(count, device=input_ids.device) % self.memory_embeddings.num_embeddings
        memory = self.memory_embeddings(own.expand(len(input_ids), -1)).to(text.dtype)
        hidden = self._hidden_states(adapter, torch.cat([text, memory], dim=1), attention_mask)
        text_states, memories = hidden[:, :-count], hidden[:, -count:]
        weight = attention_mask[:, :-count].unsqueeze(-1).to(hidden.dtype)
        gap = (text_states * weight).sum(dim=1) / weight.sum(dim=1) - memories.mean(dim=1)
        return memories, gap

    def _encode_questions(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        return self.encode(QUERY_REASONER if self.config.query_reasoner else COMPRESSOR, input_ids, attention_mask)[0]

    def _prompt_embeddings(self, input_ids: torch.Tensor, selected: torch.Tensor) -> torch.Tensor:
        """Token embeddings `[B, L, H]` with the memory positions taken, in order, from `selected` `[slots, l, H]`."""
        embeddings = self.get_input_embeddings()(input_ids)
        first, last = min(self.config.memory_token_ids), max(self.config.memory_token_ids)
        is_memory = (input_ids >= first) & (input_ids <= last)
        if not self.config.separated_slots:
            own = self.memory_embeddings((input_ids - first).clamp(0, last - first)).to(embeddings.dtype)
            embeddings = torch.where(is_memory.unsqueeze(-1), own, embeddings)
            is_memory = contiguous(is_memory)
        expected, found = selected.shape[0] * selected.shape[1], int(is_memory.sum())
        if expected != found:
            raise ValueError(f"input_ids hold {found} memory positions, but {expected} memory vectors were selected.")
        return embeddings.masked_scatter(is_memory.unsqueeze(-1), selected.to(embeddings.dtype))

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        document_input_ids: torch.Tensor | None = None,
        document_attention_mask: torch.Tensor | None = None,
        memories: torch.Tensor | None = None,
        document_index: torch.Tensor | None = None,
        query_input_ids: torch.Tensor | None = None,
        query_attention_mask: torch.Tensor | None = None,
        logits_to_keep: int | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        num_documents_in_batch: torch.Tensor | int | None = None,
        **kwargs,
    ) -> CLaRaOutput:
        r"""One step of any training stage.

        Documents come as token ids, compressed in the step, or as `memories` made earlier. With a query, the candidates
        are scored and the best `top_k` fill the prompt's slots through the straight-through top-k; without one, all
        given documents fill the slots in order. With a query and no prompts, only the scores are computed. A mask that
        is not given is all ones.

        Args:
            input_ids, attention_mask (`[B, L]` int64, *optional*): chat prompts with memory slots, padded on the left.
            labels (`[B, L]` int64, *optional*): targets, -100 where nothing is to be predicted.
            document_input_ids, document_attention_mask (`[D, Ld]` int64): the batch's distinct documents.
            memories (`[D, l, H]`): in place of the two above.
            document_index (`[B, N]` int64): row of each question's candidates among the D documents, -1 for none.
            query_input_ids, query_attention_mask (`[B, Lq]` int64, *optional*): questions with memory tokens.
            logits_to_keep (`int`, *optional*): last positions to compute logits for, 0 for all; by default those that
                predict a label, and all without labels.
            num_items_in_batch (*optional*): supervised tokens of the global batch; the cross entropy is then their sum
                divided by it, else their mean.
            num_documents_in_batch (*optional*): the same for the MSE term: documents of the global batch, one for
                every row that a document is in.

        Raises:
            ValueError: neither or both of documents and memories, memories of another width or rate, a document_index
                (on the CPU) beyond them, slots that do not match the documents, or neither prompts nor a query.
        """
        if (document_input_ids is None) == (memories is None) or document_index is None:
            raise ValueError("give document_index and either document_input_ids or memories, not both and not neither.")
        if input_ids is None and query_input_ids is None:
            raise ValueError("give input_ids, query_input_ids or both: without prompts only a query can be scored.")
        mse_loss = None
        if memories is not None:
            check_memories(memories, self._memory_shape, "memories")
            check_document_index(document_index, len(memories))
        else:
            check_document_index(document_index, len(document_input_ids))
            # A frozen compressor makes the same memories here as `compress` does: no gradient, no dropout.
            with nullcontext() if self.compressor_trains else self._inference():
                memories, gap = self.encode(COMPRESSOR, document_input_ids, document_attention_mask)
            if self.compressor_trains:
                # Once for every row that a document is in: the mean then does not depend on how rows are batched.
                squares = gap[document_index[document_index >= 0]].float().square().mean(dim=-1)
                mse_loss = squares.sum() / (len(squares) if num_documents_in_batch is None else num_documents_in_batch)

        is_candidate = document_index >= 0
        candidates = memories[document_index.clamp(min=0)]
        scores = weights = indices = None
        if query_input_ids is None:
            selected = candidates[is_candidate]
        else:
            query = self._encode_questions(query_input_ids, query_attention_mask)
            scores = cosine_scores(query, memories).gather(1, document_index.clamp(min=0))
            scores = scores.masked_fill(~is_candidate, float("-inf"))
            if input_ids is None:
                return CLaRaOutput(scores=scores, memories=memories)
            weights, indices = straight_through_topk(
                scores,
                self._slots(is_candidate),
                self.config.temperature,
                is_candidate,
                self.config.topk_taken_mask,
            )
            selected = torch.einsum("bkn,bnlh->bklh", weights.to(candidates.dtype), candidates)[indices >= 0]

        embeddings = self._prompt_embeddings(input_ids, selected)
        attention_mask = mask_or_ones(attention_mask, input_ids)
        keep = positions_to_keep(labels) if logits_to_keep is None else logits_to_keep
        with use_adapter(self.decoder, GENERATOR):
            logits = self.decoder(
                inputs_embeds=embeddings,
                attention_mask=attention_mask,
                position_ids=position_ids(attention_mask),
                logits_to_keep=keep,
                use_cache=False,
            ).logits
        ce_loss = None if labels is None else cross_entropy(logits, labels, num_items_in_batch)
        loss = ce_loss if ce_loss is None or mse_loss is None else ce_loss + self.config.mse_weight * mse_loss
        return CLaRaOutput(
            loss=loss,
            ce_loss=ce_loss,
            mse_loss=mse_loss,
            logits=logits,
            scores=scores,
            topk_indices=indices,
            topk_weights=weights,
            memories=memories,
        )

    def _slots(self, is_candidate: torch.Tensor, top_k: int | None = None) -> int:
        """The number of slots for candidates `[B, N]`: `top_k`, or N if that is less. Too few candidates are told."""
        wanted = self.config.top_k if top_k is None else top_k
        if not isinstance(wanted, int) or isinstance(wanted, bool) or wanted < 1:
            raise ValueError(f"top_k must be a whole number of at least 1, got {wanted!r}.")
        if wanted > int(is_candidate.sum(dim=1).min()):
            logger.warning_once(f"top_k={wanted} is more than a question has candidates: all of its own are used.")
        return min(wanted, is_candidate.shape[1])

    # The three verbs, on texts

    @contextmanager
    def _inference(self) -> Iterator[None]:
        """No gradients, and evaluation mode (no adapter dropout) for the block; the mode is restored."""
        was_training = self.training
        self.eval()
        try:
            with torch.no_grad():
                yield
        finally:
            self.train(was_training)

    def _encode_rows(self, adapter: str, rows: list[list[int]], batch_size: int, show_progress: bool) -> torch.Tensor:
        """Memory states `[rows, l, H]` of encoded texts, in batches of like length, returned in the given order."""
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"batch_size must be a whole number of at least 1, got {batch_size!r}.")
        kind = "documents" if adapter == COMPRESSOR else "questions"
        order = sorted(range(len(rows)), key=lambda row: len(rows[row]), reverse=True)
        memories = torch.empty((len(rows), *self._memory_shape), dtype=self.dtype, device=self.device)
        starts = logging.tqdm(range(0, len(rows), batch_size), desc="Compressing", disable=not show_progress)
        with self._inference():
            for start in starts:
                chosen = order[start : start + batch_size]
                batch = self.processor.pad_encodings([rows[row] for row in chosen]).to(self.device)
                # The type differs from the model's under autocast.
                found = self.encode(adapter, batch["input_ids"], batch["attention_mask"])[0].to(self.dtype)
                check_finite(found, lambda row, chosen=chosen: f"the memory of {kind}[{chosen[row]}]", FINITE_WEIGHTS)
                memories[chosen] = found
        return memories

    def compress(self, documents: list[str], batch_size: int = 32, show_progress: bool = False) -> torch.Tensor:
        """Compress documents into memory vectors.

        Args:
            documents (`list[str]`, N of them): those longer than `doc_max_length` tokens are cut, which is reported.
            batch_size (`int`): documents per forward pass; they are sorted by length first.
            show_progress (`bool`): whether to show a progress bar.

        Returns:
            `[N, l, H]` in the model's dtype, on its device, in the order of `documents`.

        Raises:
            TypeError, ValueError: no documents, an empty or non-string one, or one with a reserved token; a memory with
                values that are not finite.
        """
        return self.compress_encoded(self.processor.encode_documents(documents), batch_size, show_progress)

    def compress_encoded(
        self, rows: list[list[int]], batch_size: int = 32, show_progress: bool = False
    ) -> torch.Tensor:
        """[`compress`] of documents that `processor.encode_documents` or `encode_and_cut` made token ids of."""
        return self._encode_rows(COMPRESSOR, rows, batch_size, show_progress)

    def encode_questions(self, questions: list[str], batch_size: int = 32) -> torch.Tensor:
        """Read questions with the query reasoner (or the compressor, if the model has none yet) to `[B, l, H]`."""
        adapter = QUERY_REASONER if self.config.query_reasoner else COMPRESSOR
        return self._encode_rows(adapter, self.processor.encode_questions(questions), batch_size, show_progress=False)

    @property
    def _memory_shape(self) -> tuple[int, int]:
        return self.config.num_memory_tokens, self.config.hidden_size

    def _bank(self, memories, num_questions: int, allow_none: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
        bank, index = memory_bank(memories, num_questions, self._memory_shape, self.device, allow_none)
        bank = bank.to(self.dtype)
        check_finite(bank, partial(name_of_row, memories=memories), "compress its document again")
        return bank, index

    def _rank(
        self, questions: list[str], bank: torch.Tensor, index: torch.Tensor, top_k: int | None
    ) -> CLaRaRetrievalOutput:
        scores = cosine_scores(self.encode_questions(questions), bank).gather(1, index.clamp(min=0))
        best = scores.masked_fill(index < 0, float("-inf")).sort(dim=-1, descending=True, stable=True)
        count = self._slots(index >= 0, top_k)
        found = best.indices[:, :count].masked_fill(best.values[:, :count].isneginf(), -1)
        return CLaRaRetrievalOutput(scores=best.values[:, :count], indices=found)

    def retrieve(
        self, questions: list[str], memories: torch.Tensor | list[torch.Tensor], top_k: int | None = None
    ) -> CLaRaRetrievalOutput:
        """Rank memories for questions by cosine similarity.

        Args:
            questions (`list[str]`, B of them).
            memories: `[N, l, H]` shared by all questions, or a list of B tensors `[N_b, l, H]`.
                Or a store: an object with `search(queries, top_k)`, which gives `scores` `[B, k]` and `keys`, and with
                `get(keys)`, such as `clara_hf.memory_store.MemoryStore`; what its search gives is returned.
            top_k (`int`, *optional*): how many to return; the configuration's by default, at most N.

        Raises:
            TypeError, ValueError: questions that are empty or no strings, memories of another width or rate, or with
                values that are not finite.
        """
        self.processor.check_user_texts(questions, "questions")
        with torch.no_grad():
            if not isinstance(memories, (torch.Tensor, list, tuple)):
                return memories.search(self.encode_questions(questions), top_k or self.config.top_k)
            return self._rank(questions, *self._bank(memories, len(questions)), top_k)

    def generate(
        self,
        questions: list[str],
        documents: list[list[str]] | None = None,
        memories: torch.Tensor | list[torch.Tensor] | None = None,
        top_k: int | None = None,
        rerank: bool = True,
        store=None,
        **generate_kwargs,
    ) -> CLaRaGenerationOutput:
        """Answer questions from the best of their candidate documents; one call of the decoder's `generate` for all.

        Args:
            questions (`list[str]`, B of them).
            documents (`list[list[str]]`): candidates of each question, compressed here; or
            memories: made earlier, `[N, l, H]` shared by all questions or a list of B tensors `[N_b, l, H]`.
            top_k (`int`, *optional*): documents in the prompt; the configuration's by default, all with `rerank=False`.
                The `top_k` of sampling is given in a [`~transformers.GenerationConfig`].
            rerank (`bool`): `False` puts the given documents into the prompt in their order; with memories `[0, l, H]`
                the prompt has none.
            store: in place of documents and memories, see `retrieve`: the best `top_k` of all that it holds.
            generate_kwargs: any option of transformers' `generate`, a streamer and `generation_config` included. By
                default decoding is greedy with at most 64 new tokens, and the base's own generation defaults are not
                used. `max_length` counts the prompt too: `max_new_tokens` does not.

        Raises:
            TypeError, ValueError: see `compress` and `retrieve`; neither or both of documents and memories; a
                `max_length` that the prompt fills.
        """
        if sum(given is not None for given in (documents, memories, store)) != 1:
            raise ValueError("give one of documents, memories and store.")
        if store is not None:
            hits = self.retrieve(questions, store, top_k)
            found = self.generate(questions, memories=store.get(hits.keys), rerank=False, **generate_kwargs)
            found.scores = hits.scores
            return found
        self.processor.check_user_texts(questions, "questions")
        if documents is not None:
            self.processor.check_candidates(questions, documents)
            distinct, index = distinct_texts(documents)
            bank, index = self.compress(distinct), index.to(self.device)
        else:
            bank, index = self._bank(memories, len(questions), allow_none=not rerank)
        with self._inference():
            scores = None
            chosen = torch.arange(index.shape[1], device=index.device).expand_as(index).masked_fill(index < 0, -1)
            if rerank:
                found = self._rank(questions, bank, index, top_k)
                scores, chosen = found.scores, found.indices
            elif top_k is not None:
                chosen = chosen[:, : self._slots(index >= 0, top_k)]
            return self._answer(questions, bank, index, chosen, scores, generate_kwargs)

    def _answer(self, questions, bank, index, chosen, scores, generate_kwargs) -> CLaRaGenerationOutput:
        is_used = chosen >= 0
        prompts = self.processor.encode_prompts(questions, is_used.sum(dim=1).tolist())
        slots = index.gather(1, chosen.clamp(min=0)).masked_fill(~is_used, -1)
        found = self.answer(**prompts, memories=bank, document_index=slots, **generate_kwargs)
        found.indices, found.scores = chosen, scores
        return found

    def answer(
        self,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        memories: torch.Tensor,
        document_index: torch.Tensor,
        **generate_kwargs,
    ) -> CLaRaGenerationOutput:
        """Answer prompts, as [`CLaRaProcessor.encode_prompts`] makes them, from memories at hand.

        Args:
            input_ids, attention_mask (`[B, L]` int64): prompts up to where the answer begins, padded on the left.
            memories (`[D, l, H]`): made earlier.
            document_index (`[B, k]` int64): rows of `memories` in the order of the prompt's slots, -1 in unused ones.
            generate_kwargs: see `generate`.

        Returns:
            `texts`, `sequences` and `generation`.

        Raises:
            ValueError: memories of another shape or number than the prompts have slots for; a `max_length` that the
                prompt fills.
        """
        check_memories(memories, self._memory_shape, "memories")
        check_document_index(document_index, len(memories))
        rows = document_index.to(memories.device)
        batch = BatchFeature({"input_ids": input_ids, "attention_mask": attention_mask})
        with self._inference():
            selected = memories[rows[rows >= 0]].to(self.device)
            sequences, generation = self._continue_prompts(batch, selected, generate_kwargs)
        texts = self.processor.tokenizer.batch_decode(sequences, skip_special_tokens=True)
        return CLaRaGenerationOutput(texts=[text.strip() for text in texts], sequences=sequences, generation=generation)

    def _continue_prompts(
        self, batch: BatchFeature, selected: torch.Tensor, generate_kwargs: dict
    ) -> tuple[torch.Tensor, ModelOutput | None]:
        """New tokens after padded prompts whose memory slots hold `selected` `[slots, l, H]`, in order."""
        batch = batch.to(self.device)
        options = {**generate_kwargs}
        given = options.get("generation_config")
        known = options if given is None else {name for name, value in given.to_dict().items() if value is not None}
        longest = options.get("max_length") if given is None else given.max_length
        width = batch["input_ids"].shape[1]
        if longest is not None and longest <= width and "max_new_tokens" not in known:
            raise ValueError(
                f"max_length={longest} leaves no room for an answer, since it counts the prompt's {width} tokens too: "
                "give max_new_tokens instead."
            )
        defaults = {"eos_token_id": self.config.eos_token_id, "pad_token_id": self.config.pad_token_id}
        if "max_length" not in known:
            defaults["max_new_tokens"] = DEFAULT_MAX_NEW_TOKENS
        defaults = {name: value for name, value in defaults.items() if name not in known}
        if given is None:
            options |= defaults
        else:
            # transformers takes either a configuration or single options.
            options["generation_config"] = copy.deepcopy(given)
            options["generation_config"].update(**defaults)
        with use_adapter(self.decoder, GENERATOR):
            output = self.decoder.generate(
                inputs_embeds=self._prompt_embeddings(batch["input_ids"], selected),
                attention_mask=batch["attention_mask"],
                **options,
            )
        return (output.sequences, output) if isinstance(output, ModelOutput) else (output, None)
