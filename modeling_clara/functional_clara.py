"""Pure functions of tensors: retrieval scores, positions under left padding, the answer's cross entropy."""

import torch
from torch import nn

from .processing_clara import IGNORE_INDEX


def cosine_scores(queries: torch.Tensor, memories: torch.Tensor) -> torch.Tensor:
    """Cosine of flattened queries `[B, l, H]` and memories `[D, l, H]`: `[B, D]`, float32 (float64 for float64)."""
    dtype = torch.promote_types(queries.dtype, torch.float32)
    queries, memories = (nn.functional.normalize(rows.flatten(1).to(dtype), dim=-1) for rows in (queries, memories))
    return queries @ memories.T


def position_ids(attention_mask: torch.Tensor) -> torch.Tensor:
    """Positions `[rows, length]` counted from each row's first attended token, whatever the padding on the left."""
    return (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)


def contiguous(is_memory: torch.Tensor) -> torch.Tensor:
    """As many `True` positions in every row `[B, L]` as before, one after the other from the first."""
    start = is_memory.int().argmax(dim=1, keepdim=True)
    position = torch.arange(is_memory.shape[1], device=is_memory.device)
    return (position >= start) & (position < start + is_memory.sum(dim=1, keepdim=True))


def positions_to_keep(labels: torch.Tensor | None) -> int:
    """How many last positions predict a label of some row; 0, which means all, without labels."""
    if labels is None:
        return 0
    supervised = (labels != IGNORE_INDEX).any(dim=0).nonzero()
    return labels.shape[1] - int(supervised[0]) + 1 if len(supervised) else 1


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor, num_items: torch.Tensor | int | None) -> torch.Tensor:
    """Cross entropy of position t predicting label t+1, over the positions that `logits` `[B, T, vocab]` hold."""
    targets = labels[:, labels.shape[1] - logits.shape[1] :][:, 1:]
    total = nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).to(torch.promote_types(logits.dtype, torch.float32)),
        targets.flatten(),
        ignore_index=IGNORE_INDEX,
        reduction="sum",
    )
    if num_items is None:
        num_items = (targets != IGNORE_INDEX).sum().clamp(min=1)
    elif isinstance(num_items, torch.Tensor):
        num_items = num_items.to(total.device)
    return total / num_items
