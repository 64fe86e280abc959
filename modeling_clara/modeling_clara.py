"""CLaRa: compress documents into memory vectors, retrieve among the vectors, answer from them (arXiv 2511.18659)."""

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import nn
from transformers.utils import ModelOutput

from .adapters_clara import (
    COMPRESSOR,
    GENERATOR,
    QUERY_REASONER,
    adapter_parameters,
    add_adapter,
    copy_adapter,
    merged_adapter,
    remove_adapter,
    use_adapter,
)
from .decoding_clara import can_pack, first_layers, last_places, run_packed, shared_beginning, unpacked
from .functional_clara import (
    check_document_index,
    check_labels,
    check_memories,
    check_tokens,
    coarser_memories,
    contiguous,
    copy_whole,
    cosine_scores,
    gathered,
    mask_or_ones,
    position_ids,
    positions_to_keep,
    segment_means,
    straight_through_topk,
    with_rms,
)
from .generation_clara import CLaRaGeneration
from .loss_clara import (
    chunked_loss,
    cross_entropy,
    follows_tokens,
    packed_targets,
    target_loss,
    wants_chunks,
)
from .pretrained_clara import CLaRaPreTrainedModel
from .processing_clara import IGNORE_INDEX


MEMORY_EMBEDDINGS = "memory_embeddings"
# Of the mean square of a state's values.
PROJECTION_RIDGE = 0.005


@dataclass
class CLaRaOutput(ModelOutput):
    """
    Args:
        loss (`[]`): `ce_loss + mse_weight * mse_loss`, when labels are given.
        ce_loss (`[]`): cross entropy of the supervised tokens.
        mse_loss (`[]`): mean-squared error between document and memory means, over the documents of all rows; only
            where the compressor trains, and memories are states of memory tokens.
        logits (`[B, T, vocab]`): of the last T positions, T as `logits_to_keep` says; in training mode with labels only
            where `logits_to_keep` is given, since the loss needs fewer.
        scores (`[B, N]` float32): cosine of question and candidate, -inf where there is no candidate.
        topk_indices (`[B, k]` int64): selected candidates, best first, -1 in unused slots.
        topk_weights (`[B, k, N]`): the straight-through selection matrix.
        memories (`[D, l, H]`): as given, or as the step made them.
    """

    loss: torch.Tensor | None = None
    ce_loss: torch.Tensor | None = None
    mse_loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    scores: torch.Tensor | None = None
    topk_indices: torch.Tensor | None = None
    topk_weights: torch.Tensor | None = None
    memories: torch.Tensor | None = None


class CLaRaForRetrievalGeneration(CLaRaGeneration, CLaRaPreTrainedModel):
    r"""One decoder with three LoRA adapters: compressor, query reasoner and generator.

    `compress` turns documents into memory vectors, `retrieve` ranks them for questions, `generate` answers from the
    best ones. `forward` is the training step over tensors that [`CLaRaProcessor`] makes.

    Shapes: B questions, N candidates, k selected, l memory tokens, H hidden size, D distinct documents.
    """

    def add_query_reasoner(self) -> None:
        """Give the model a query-reasoner adapter that starts as a copy of the compressor; nothing if it has one.

        Raises:
            ValueError: weights are offloaded (`device_map`).
        """
        if self.config.query_reasoner:
            return
        self._check_all_at_hand()
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
        """Parameters of one trainable part: an adapter's, or the memory embeddings; only those that take part. Memory
        embeddings do not where texts are pooled, nor do compressor and query reasoner in layers behind
        `compressor_layers`.

        Raises:
            ValueError: `part` is unknown, or the model has no query reasoner yet.
        """
        if part == MEMORY_EMBEDDINGS:
            return list(self.memory_embeddings.parameters()) if self.config.encoder_memory_tokens else []
        if part not in self.adapter_names:
            raise ValueError(f"part must be one of {[*self.adapter_names, MEMORY_EMBEDDINGS]}, got {part!r:.80}.")
        layers, unused = self.config.layers_that_read, set()
        if layers is not None and part != GENERATOR:
            behind = self.decoder.base_model.layers[layers:]
            unused = {id(parameter) for layer in behind for parameter in layer.parameters()}
        return [one for one in adapter_parameters(self.decoder, part) if id(one) not in unused]

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

    @torch.no_grad()
    def fit_memory_projection(self, texts: Sequence[str], batch_size: int = 8) -> float:
        """Fit the map from states to memories to give back, as well as a linear map can, the token embedding at each
        position, by least squares over the tokens of `texts`.

        A language model reads vectors in the space of its token embeddings, in which the states of its layers are not.
        The first stage calls it once, for a model that begins with a base.

        Args:
            texts: some hundred documents; of each, `doc_max_length` tokens.
            batch_size: documents that are read together.

        Returns:
            share of the embeddings' squares that mapped states explain, over these tokens; 1 for all.

        Raises:
            ValueError: the configuration has no `memory_projection`, or the texts have fewer tokens than a state has
                values.

        Example:

        ```python
        model = CLaRaForRetrievalGeneration.from_base(
            "base", readout="mean_pool", compressor_layers=4, memory_projection=True, memory_scale="embeddings"
        )
        model.fit_memory_projection(documents[:500])
        ```
        """
        if not self.config.memory_projection:
            raise ValueError("the configuration has no memory_projection to fit: make the model with it set to True.")
        ids = self.processor.encode_documents(texts)
        width, found = self.config.hidden_size, sum(map(len, ids))
        if found < width:
            raise ValueError(f"texts have {found} tokens, but a state has {width} values: fit on more documents.")
        weight = self.memory_projection.weight
        second, cross = (torch.zeros(width, width, dtype=torch.float64) for _ in range(2))
        squares = 0.0
        for first in range(0, len(ids), batch_size):
            inputs = self.processor.pad_encodings(ids[first : first + batch_size]).to(self.device)
            length = inputs["input_ids"].shape[1] - self.config.encoder_memory_tokens
            tokens, mask = (inputs[name][:, :length] for name in ("input_ids", "attention_mask"))
            embeddings = self.get_input_embeddings()(tokens)
            with self._inference():
                states = self._states(COMPRESSOR, embeddings, mask)
            states, embeddings = (rows[mask.bool()].double().cpu() for rows in (states, embeddings))
            second += states.T @ states
            cross += states.T @ embeddings
            squares += float(embeddings.square().sum())
        # Directions that the texts hardly show are left out by so much.
        ridge = PROJECTION_RIDGE * second.diagonal().mean() * torch.eye(width, dtype=torch.float64)
        fitted = torch.linalg.solve(second + ridge, cross)
        with gathered([weight], changed=True):
            copy_whole(fitted.T.contiguous(), weight)
        return float((fitted * (2 * cross - second @ fitted)).sum() / squares)

    # The three forward passes

    def _hidden_states(
        self, adapter: str, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor, last: int = 0
    ) -> torch.Tensor:
        """States `[rows, length, H]` of which memories consist, without output head or layers behind. With `last` only
        those of so many last positions, which all are attended."""
        hidden = self._states(adapter, inputs_embeds, attention_mask, last)
        return self.memory_projection(hidden) if self.config.memory_projection else hidden

    def _states(
        self, adapter: str, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor, last: int = 0
    ) -> torch.Tensor:
        """States of the last layer that reads: after the final norm, or divided by their root mean square behind an
        earlier layer."""
        layers = self.config.layers_that_read
        if layers == 0:
            return with_rms(inputs_embeds)
        hidden = self._run_layers(adapter, inputs_embeds, attention_mask, last)
        return hidden if layers is None else with_rms(hidden)

    def _run_layers(
        self, adapter: str, inputs_embeds: torch.Tensor, attention_mask: torch.Tensor, last: int
    ) -> torch.Tensor:
        tokens = 0 if torch.is_grad_enabled() else attention_mask.numel()
        layers = self.config.layers_that_read
        with merged_adapter(self.decoder, adapter, tokens), first_layers(self.decoder, layers):
            if can_pack(self.decoder, attention_mask, reads_part=last > 0):
                places = last_places(attention_mask, last) if last else None
                hidden = run_packed(self.decoder, self.decoder.base_model, inputs_embeds, attention_mask, places)
                return hidden.view(-1, last, hidden.shape[-1]) if last else unpacked(hidden, attention_mask)
            hidden = self.decoder.base_model(
                inputs_embeds=inputs_embeds,
                attention_mask=attention_mask,
                position_ids=position_ids(attention_mask),
                use_cache=False,
            ).last_hidden_state
        return hidden[:, -last:]

    def encode(
        self,
        adapter: str,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        with_gap: bool = True,
        whole: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Memories of texts, each read with its memory tokens behind it, or alone where `readout` pools, under
        `adapter`.

        Without `attention_mask` all positions are attended. With `whole`, a text that is pooled is so as one segment,
        whose mean is each of the l vectors.

        Returns:
            memories `[rows, l, H]` and, unless `with_gap` is `False`, the mean text state minus the mean memory state
            `[rows, H]`, both before `memory_scale`, whose mean square is the MSE loss.
        """
        memories, gap = self.read_states(adapter, input_ids, attention_mask, with_gap, whole)
        if (scale := self.config.memory_scale) is not None:
            memories = with_rms(memories, scale)
        return coarser_memories(memories, self.config, self.config.rate_in_use), gap

    def read_states(
        self,
        adapter: str,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None = None,
        with_gap: bool = True,
        whole: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """[`encode`] without `memory_scale`, and of pooled texts at the first compression rate."""
        count = self.config.num_memory_tokens
        attention_mask = mask_or_ones(attention_mask, input_ids)
        if self.config.readout == "mean_pool":
            hidden = self._hidden_states(adapter, self.get_input_embeddings()(input_ids), attention_mask)
            segments = self.config.most_memory_tokens
            mean = segment_means(hidden, attention_mask, 1) if whole or with_gap else None
            memories = mean.expand(-1, segments, -1) if whole else segment_means(hidden, attention_mask, segments)
            return memories, mean[:, 0] - memories.mean(dim=1) if with_gap else None
        text = self.get_input_embeddings()(input_ids[:, :-count])
        own = torch.arange(count, device=input_ids.device) % self.memory_embeddings.num_embeddings
        memory = self.memory_embeddings(own.expand(len(input_ids), -1)).to(text.dtype)
        embeddings = torch.cat([text, memory], dim=1)
        if not with_gap:
            return self._hidden_states(adapter, embeddings, attention_mask, last=count), None
        hidden = self._hidden_states(adapter, embeddings, attention_mask)
        text_states, memories = hidden[:, :-count], hidden[:, -count:]
        weight = attention_mask[:, :-count].unsqueeze(-1).to(hidden.dtype)
        gap = (text_states * weight).sum(dim=1) / weight.sum(dim=1) - memories.mean(dim=1)
        return memories, gap

    def _encode_documents(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        return self.encode(COMPRESSOR, input_ids, attention_mask, with_gap=False)[0]

    def _encode_questions(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None) -> torch.Tensor:
        """A pooled question is read whole: its first words do not know the rest, and no segment of it answers to one of
        a document."""
        adapter = QUERY_REASONER if self.config.query_reasoner else COMPRESSOR
        return self.encode(adapter, input_ids, attention_mask, with_gap=False, whole=True)[0]

    def _is_memory(self, input_ids: torch.Tensor) -> torch.Tensor:
        ids = self.config.memory_token_ids
        return (input_ids >= min(ids)) & (input_ids <= max(ids))

    def _prompt_embeddings(self, input_ids: torch.Tensor, selected: torch.Tensor) -> torch.Tensor:
        """Token embeddings `[B, L, H]` with the memory positions taken, in order, from `selected` `[slots, l, H]`."""
        embeddings = self.get_input_embeddings()(input_ids)
        first, last = min(self.config.memory_token_ids), max(self.config.memory_token_ids)
        is_memory = self._is_memory(input_ids)
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
            query_input_ids, query_attention_mask (`[B, Lq]` int64, *optional*): questions, as the processor pads them.
            logits_to_keep (`int`, *optional*): last positions to return logits for, 0 for all; by default those that
                predict a label, all without labels, and none in training mode with labels.
            num_items_in_batch (*optional*): supervised tokens of the global batch; the cross entropy is then their sum
                divided by it, else their mean.
            num_documents_in_batch (*optional*): the same for the MSE term: documents of the global batch, one for
                every row that a document is in.

        Raises:
            ValueError: neither or both of documents and memories, memories of another width or rate, tensors that are
                no ids or whose shapes do not go together, slots that do not match the documents, or neither prompts
                nor a query; on the CPU also ids beyond the vocabulary, and a document_index beyond the documents.
        """
        if (document_input_ids is None) == (memories is None) or document_index is None:
            raise ValueError("give document_index and either document_input_ids or memories, not both and not neither.")
        if input_ids is None and query_input_ids is None:
            raise ValueError("give input_ids, query_input_ids or both: without prompts only a query can be scored.")
        if memories is not None:
            check_memories(memories, self._memory_shape, "memories")
        rows, vocabulary = len(document_index), self.config.vocab_size
        memory_tokens = self.config.encoder_memory_tokens
        check_tokens("document_input_ids", document_input_ids, document_attention_mask, None, vocabulary, memory_tokens)
        check_tokens("query_input_ids", query_input_ids, query_attention_mask, rows, vocabulary, memory_tokens)
        check_tokens("input_ids", input_ids, attention_mask, rows, vocabulary)
        check_document_index(document_index, len(document_input_ids if memories is None else memories))
        check_labels(labels, input_ids, logits_to_keep, vocabulary)
        mse_loss = None
        if memories is None:
            # A frozen compressor makes the same memories here as `compress` does: no gradient, no dropout.
            trains = self.compressor_trains
            # Means of pooled memories are those of the document: a term without use.
            has_gap = trains and memory_tokens > 0
            with nullcontext() if trains else self._inference():
                memories, gap = self.encode(COMPRESSOR, document_input_ids, document_attention_mask, with_gap=has_gap)
            if has_gap:
                # Once for every row that a document is in: the mean then does not depend on how rows are batched.
                gap = gap.to(torch.promote_types(gap.dtype, torch.float32))
                squares = gap[document_index[document_index >= 0]].square().mean(dim=-1)
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
                self.config.topk_estimator if self.training else "straight_through",
            )
            selected = torch.einsum("bkn,bnlh->bklh", weights.to(candidates.dtype), candidates)[indices >= 0]

        embeddings = self._prompt_embeddings(input_ids, selected)
        attention_mask = mask_or_ones(attention_mask, input_ids)
        logits, ce_loss = self._read_prompts(
            input_ids, embeddings, attention_mask, labels, logits_to_keep, num_items_in_batch
        )
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

    def _read_prompts(
        self,
        input_ids: torch.Tensor,
        embeddings: torch.Tensor,
        attention_mask: torch.Tensor,
        labels: torch.Tensor | None,
        logits_to_keep: int | None,
        num_items: torch.Tensor | int | None,
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Logits and cross entropy of prompts `[B, L, H]`, each `None` where `forward` returns none."""
        is_step = self.training and labels is not None and logits_to_keep is None
        with use_adapter(self.decoder, GENERATOR):
            chunks = is_step and wants_chunks(self.decoder, labels)
            if is_step and can_pack(self.decoder, attention_mask, True) and follows_tokens(labels, attention_mask):
                # What stands at the end predicts nothing.
                attention_mask = torch.cat([attention_mask[:, :-1], torch.zeros_like(attention_mask[:, -1:])], dim=1)
                places, targets = packed_targets(labels, attention_mask)
                module = self.decoder.base_model if chunks else self.decoder
                differs = self._is_memory(input_ids)
                differs[:, :-1] |= labels[:, 1:] != IGNORE_INDEX
                shared = shared_beginning(input_ids, attention_mask, differs)
                found = run_packed(self.decoder, module, embeddings, attention_mask, places, shared)
                if chunks:
                    return None, chunked_loss(self.decoder, found[0], targets, num_items)
                return None, target_loss(found, targets, num_items)
            options = {"attention_mask": attention_mask, "position_ids": position_ids(attention_mask)}
            if chunks:
                hidden = self.decoder.base_model(inputs_embeds=embeddings, use_cache=False, **options).last_hidden_state
                predicts = labels[:, 1:] != IGNORE_INDEX
                found, targets = hidden[:, :-1][predicts], labels[:, 1:][predicts]
                return None, chunked_loss(self.decoder, found, targets, num_items)
            logits = self.decoder(
                inputs_embeds=embeddings,
                logits_to_keep=positions_to_keep(labels) if logits_to_keep is None else logits_to_keep,
                use_cache=False,
                **options,
            ).logits
        ce_loss = None if labels is None else cross_entropy(logits, labels, num_items)
        return None if is_step else logits, ce_loss
