"""What a CLaRa model returns: from `forward`, `retrieve` and `generate`."""

from dataclasses import dataclass

import torch
from transformers.utils import ModelOutput


@dataclass
class CLaRaOutput(ModelOutput):
    """
    Args:
        loss (`[]`): `ce_loss + mse_weight * mse_loss`, when labels are given.
        ce_loss (`[]`): cross entropy of the supervised tokens.
        mse_loss (`[]`): mean-squared error between document and memory means, over the documents of all rows; only
            where the compressor trains.
        logits (`[B, T, vocab]`): of the last T positions, T as `logits_to_keep` says.
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
        generation: what the decoder's `generate` returned, if `return_dict_in_generate` was set.
    """

    texts: list[str] | None = None
    indices: torch.Tensor | None = None
    scores: torch.Tensor | None = None
    sequences: torch.Tensor | None = None
    generation: ModelOutput | None = None
