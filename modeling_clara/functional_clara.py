"""Functions of tensors: the straight-through top-k, banks of memories, scores, positions; whole tensors of those that
DeepSpeed ZeRO-3 or FSDP spread over processes."""

import importlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate

import torch
from torch import nn
from transformers.integrations import is_deepspeed_zero3_enabled

from .configuration_clara import ESTIMATORS, TAKEN_MASKS, CLaRaConfig
from .processing_clara import IGNORE_INDEX, index_matrix


# Keeps the root mean square of zeros, which padding may have, away from 0; squares of states are far larger.
RMS_EPS = 1e-16
PUBLISHED_EPSILON = 1e-8
MIN_TEMPERATURE = 1e-6


def straight_through_topk(
    scores: torch.Tensor,
    k: int,
    temperature: float = 0.02,
    candidate_mask: torch.Tensor | None = None,
    taken_mask: str = "exact",
    estimator: str = "straight_through",
) -> tuple[torch.Tensor, torch.Tensor]:
    r"""Select the `k` best candidates of every row without cutting the gradient (arXiv 2511.18659, section 3).

    Slot `j` holds the one-hot row of the `j`-th best candidate. Its gradient is that of
    `softmax(scores / temperature + log(mask_j))`, where `mask_j` removes the candidates that slots `1 … j-1` took and
    is a constant: `Z = Z_hard + Z_soft - stop_gradient(Z_soft)`. The forward value is exactly the hard choice.

    Args:
        scores (`torch.Tensor` of shape `[batch, candidates]`, floating): similarity of every candidate.
        k (`int`): number of slots, `1 <= k <= candidates`.
        temperature (`float`): divides the scores before the softmax; values under 1e-6 count as 1e-6.
        candidate_mask (`torch.BoolTensor` of shape `[batch, candidates]`, *optional*): `False` where a row has no such
            candidate. Slots beyond a row's number of candidates are all zero and their index is -1.
        taken_mask (`"exact"` or `"published"`): how a taken candidate leaves the softmax of later slots. `"exact"` adds
            -inf. `"published"` adds log(1e-8) = -18.4 as the published model does; a taken candidate that leads by more
            than `18.4 * temperature` keeps the mass of later slots.
        estimator (`"straight_through"`, `"soft"` or `"gumbel"`): what slots hold, for ablations. `"soft"`: the softmax
            rows themselves, so that each slot reads a mixture. `"gumbel"`: as `"straight_through"`, after
            Gumbel(0, 1) noise on the logits, which draws the slots from the softmax without replacement
            (arXiv 1903.06059); other draws in every call.

    Returns:
        `weights` `[batch, k, candidates]` in the dtype of `scores`, and `indices` `[batch, k]` int64, best first. Equal
        scores are taken in the order of the candidates. A row with a NaN among its candidates' scores has NaN weights,
        so that the loss shows it, and indices that mean nothing.

    Raises:
        ValueError: `k`, `taken_mask` or `estimator` out of range, or `scores` not two-dimensional.
    """
    if scores.dim() != 2:
        raise ValueError(f"scores must have the shape [batch, candidates], got {list(scores.shape)}.")
    if not 1 <= k <= scores.shape[1]:
        raise ValueError(f"k must be between 1 and the number of candidates ({scores.shape[1]}), got {k}.")
    if taken_mask not in TAKEN_MASKS:
        raise ValueError(f"taken_mask must be one of {TAKEN_MASKS}, got {taken_mask!r:.80}.")
    if estimator not in ESTIMATORS:
        raise ValueError(f"estimator must be one of {ESTIMATORS}, got {estimator!r:.80}.")

    logits = scores / max(temperature, MIN_TEMPERATURE)
    if candidate_mask is None:
        candidate_mask = torch.ones_like(scores, dtype=torch.bool)
    if estimator == "gumbel":
        logits = logits - torch.empty_like(logits).exponential_().log()
    logits = logits.masked_fill(~candidate_mask, float("-inf"))

    indices = logits.detach().sort(dim=-1, descending=True, stable=True).indices[:, :k]
    slot_is_filled = candidate_mask.gather(1, indices)
    hard = torch.nn.functional.one_hot(indices, scores.shape[1])
    soft = slot_softmax(logits, hard, slot_is_filled, taken_mask)
    held = soft if estimator == "soft" else hard + (soft - soft.detach())
    weights = held * slot_is_filled.unsqueeze(-1)
    return weights, indices.masked_fill(~slot_is_filled, -1)


def slot_softmax(
    logits: torch.Tensor, hard: torch.Tensor, slot_is_filled: torch.Tensor, taken_mask: str
) -> torch.Tensor:
    """The soft rows `[batch, k, candidates]` behind slots that hold the one-hot rows `hard`, best first.

    Args:
        logits (`[batch, candidates]`, floating): scores divided by the temperature, -inf where there is no candidate.
        hard (`[batch, k, candidates]` int64): what each slot holds.
        slot_is_filled (`[batch, k]` bool): where it holds anything; the soft rows of others mean nothing.
        taken_mask: as in [`straight_through_topk`].
    """
    taken = hard.cumsum(dim=1) - hard
    slot_logits = logits.unsqueeze(1).expand(-1, hard.shape[1], -1)
    if taken_mask == "exact":
        slot_logits = slot_logits.masked_fill(taken.bool(), float("-inf"))
    else:
        slot_logits = slot_logits + torch.log((1 - taken).to(logits.dtype) + PUBLISHED_EPSILON)
    # A slot without a candidate has nothing but -inf: give it finite logits, and no weight afterwards.
    slot_logits = slot_logits.masked_fill(~slot_is_filled.unsqueeze(-1), 0.0)
    return slot_logits.softmax(dim=-1)


def check_memories(memories: torch.Tensor, shape: tuple[int, int], argument: str) -> None:
    """Raise unless `memories` is a tensor `[N, *shape]`, where `shape` is the model's number and width of memories.

    Raises:
        TypeError: no tensor.
        ValueError: another shape.
    """
    if not isinstance(memories, torch.Tensor):
        raise TypeError(f"{argument} must be a tensor, got {type(memories).__name__}.")
    if memories.dim() != 3 or tuple(memories.shape[1:]) != shape:
        raise ValueError(
            f"{argument} has the shape {list(memories.shape)}, but this model makes [N, {shape[0]}, {shape[1]}]: "
            "compress the documents with this model, at the same rate."
        )


def check_document_index(document_index: torch.Tensor, count: int) -> None:
    """Raise unless `document_index` is whole numbers `[B, N]`, -1 to below `count`; those on a device are not waited
    for.

    Raises:
        ValueError: another shape or dtype, or a value out of range.
    """
    check_whole_matrix("document_index", document_index)
    if (wrong := _out_of_range(document_index, -1, count)) is not None:
        raise ValueError(
            f"document_index holds {wrong}, but there are {count} documents: give rows from 0 to {count - 1}, or -1 "
            "for none."
        )


def _out_of_range(values: torch.Tensor, lowest: int, end: int) -> int | None:
    """One of `values` that is below `lowest`, or not below `end`. Only values on the CPU are read."""
    if values.device.type != "cpu" or values.numel() == 0:
        return None
    low, high = (int(value) for value in values.aminmax())
    return low if low < lowest else high if high >= end else None


def check_whole_matrix(name: str, values: torch.Tensor) -> None:
    """Raise a `ValueError` unless `values` is a tensor of whole numbers with two dimensions."""
    is_tensor = isinstance(values, torch.Tensor)
    if not is_tensor or values.dim() != 2 or values.dtype not in (torch.int64, torch.int32):
        found = f"{values.dtype} of the shape {list(values.shape)}" if is_tensor else type(values).__name__
        raise ValueError(f"{name} must be an int64 tensor with two dimensions, got {found}.")


def check_tokens(
    name: str,
    ids: torch.Tensor | None,
    mask: torch.Tensor | None,
    rows: int | None,
    vocabulary: int,
    memory_tokens: int = 0,
) -> None:
    """Raise unless `ids` are token ids `[rows, length]` and `mask` has their shape. Only ids on the CPU are read.

    Args:
        name: of `ids`; that of the mask follows from it.
        rows: as many as there are questions; `None` for any number.
        memory_tokens: so many ids stand behind every text.

    Raises:
        ValueError: another shape or dtype, or an id that is negative or beyond the vocabulary.
    """
    if ids is None:
        return
    check_whole_matrix(name, ids)
    if rows is not None and len(ids) != rows:
        raise ValueError(f"{name} has {len(ids)} rows, but document_index {rows}: give one for each question.")
    if mask is not None and (not isinstance(mask, torch.Tensor) or mask.shape != ids.shape):
        found = f"the shape {list(mask.shape)}" if isinstance(mask, torch.Tensor) else f"the type {type(mask).__name__}"
        raise ValueError(
            f"{name.replace('input_ids', 'attention_mask')} has {found}, but {name} the shape {list(ids.shape)}: give "
            "a tensor with one value for every id."
        )
    if ids.shape[1] <= memory_tokens:
        raise ValueError(
            f"{name} has {ids.shape[1]} columns: give a text with {memory_tokens} memory tokens behind it."
        )
    if (wrong := _out_of_range(ids, 0, vocabulary)) is not None:
        raise ValueError(f"{name} hold {wrong}, which is none of the {vocabulary} ids of the model's vocabulary.")


def check_labels(
    labels: torch.Tensor | None, input_ids: torch.Tensor | None, logits_to_keep: int | None, vocabulary: int
) -> None:
    """Raise unless `labels` go with `input_ids`, and `logits_to_keep` is a number that leaves out none of them. Only
    labels on the CPU are read.

    Raises:
        ValueError: another shape or dtype, a label that is no id, or too few logits.
    """
    keep = logits_to_keep
    if keep is not None and (not isinstance(keep, int) or isinstance(keep, bool) or keep < 0):
        raise ValueError(f"logits_to_keep must be a whole number of at least 0, got {keep!r:.80}.")
    if labels is None:
        return
    check_whole_matrix("labels", labels)
    if input_ids is None or labels.shape != input_ids.shape:
        given = None if input_ids is None else list(input_ids.shape)
        raise ValueError(f"labels have the shape {list(labels.shape)}, but input_ids {given}: give one per token.")
    if (wrong := _out_of_range(labels.masked_fill(labels == IGNORE_INDEX, 0), 0, vocabulary)) is not None:
        raise ValueError(f"labels hold {wrong}: give ids below {vocabulary}, or {IGNORE_INDEX} for no label.")
    if keep and labels.device.type == "cpu" and keep < (needed := positions_to_keep(labels)):
        raise ValueError(f"logits_to_keep={keep} leaves out positions that predict a label: give {needed}, or None.")


def memory_bank(
    memories: torch.Tensor | list[torch.Tensor],
    num_questions: int,
    shape: tuple[int, int],
    device: torch.device,
    allow_none: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """A bank `[D, *shape]` and each question's candidates in it `[B, N]`, -1 where a question has fewer.

    Args:
        memories: `[N, *shape]` shared by all questions, or a list of B tensors `[N_b, *shape]`.
        allow_none: whether a question may be without candidates.

    Raises:
        TypeError, ValueError: memories of another type, shape or number, or none where some are needed.
    """
    if isinstance(memories, torch.Tensor):
        check_memories(memories, shape, "memories")
        counts, bank = [len(memories)], memories.to(device)
        index = torch.arange(len(memories)).expand(num_questions, -1)
    else:
        if not isinstance(memories, (list, tuple)):
            raise TypeError(f"memories must be a tensor or a list of tensors, got {type(memories).__name__}.")
        if len(memories) != num_questions:
            raise ValueError(
                f"memories has {len(memories)} tensors for {num_questions} questions: give one per question."
            )
        for position, rows in enumerate(memories):
            check_memories(rows, shape, f"memories[{position}]")
        counts, bank = [len(rows) for rows in memories], torch.cat([rows.to(device) for rows in memories])
        ends = list(accumulate(counts))
        index = index_matrix([list(range(end - count, end)) for end, count in zip(ends, counts, strict=True)])
    if min(counts) == 0 and not allow_none:
        empty = "memories" if isinstance(memories, torch.Tensor) else f"memories[{counts.index(0)}]"
        raise ValueError(f"{empty} is empty: give every question at least one candidate.")
    return bank, index.to(device)


def name_of_row(row: int, memories: torch.Tensor | list[torch.Tensor]) -> str:
    """What row `row` of the bank is among the `memories` that [`memory_bank`] made it of."""
    if isinstance(memories, torch.Tensor):
        return f"memories[{row}]"
    position = 0
    while row >= len(memories[position]):
        row -= len(memories[position])
        position += 1
    return f"memories[{position}][{row}]"


def check_finite(rows: torch.Tensor, name: Callable[[int], str], remedy: str) -> None:
    """Raise unless all values of `rows` `[N, l, H]` are finite. Waits for the device.

    Args:
        name: from a row's number to what the error calls it.
        remedy: how the error ends.

    Raises:
        ValueError: a row holds NaN or an infinite value.
    """
    low, high = rows.flatten(1).aminmax(dim=1)  # NaN comes through both
    broken = (~(low.isfinite() & high.isfinite())).nonzero()
    if len(broken):
        dtype = str(rows.dtype).removeprefix("torch.")
        raise ValueError(f"{name(int(broken[0]))} has values that are NaN or infinite in {dtype}: {remedy}.")


def cosine_scores(queries: torch.Tensor, memories: torch.Tensor) -> torch.Tensor:
    """Cosine of flattened queries `[B, l, H]` and memories `[D, l, H]`: `[B, D]`, float32 (float64 for float64)."""
    dtype = torch.promote_types(queries.dtype, torch.float32)
    queries, memories = (nn.functional.normalize(rows.flatten(1).to(dtype), dim=-1) for rows in (queries, memories))
    # Autocast would multiply in half precision, whose steps near 1 are a fifth of the temperature.
    with torch.autocast(queries.device.type, enabled=False):
        return queries @ memories.T


def coarser_memories(memories: torch.Tensor, config: CLaRaConfig, rate: int) -> torch.Tensor:
    """Memories `[N, l, H]` as they are at a higher compression rate, from those at the first.

    Of memory tokens they are the first ones: states do not depend on what stands behind. Pooled ones are the means of
    neighbours, brought to `memory_scale` again.
    """
    count = config.doc_max_length // rate
    if count == memories.shape[1]:
        return memories
    if config.readout == "memory_tokens":
        return memories[:, :count]
    dtype = torch.promote_types(memories.dtype, torch.float32)
    means = memories.unflatten(1, (count, -1)).to(dtype).mean(dim=2).to(memories.dtype)
    return means if config.memory_scale is None else with_rms(means, float(config.memory_scale))


def mask_or_ones(attention_mask: torch.Tensor | None, input_ids: torch.Tensor) -> torch.Tensor:
    """`attention_mask`, or where it is `None` ones in the shape of `input_ids`: every position is attended."""
    return torch.ones_like(input_ids) if attention_mask is None else attention_mask


def position_ids(attention_mask: torch.Tensor) -> torch.Tensor:
    """Positions `[rows, length]` counted from each row's first attended token, whatever the padding on the left."""
    return (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)


def with_rms(vectors: torch.Tensor, scale: float = 1.0) -> torch.Tensor:
    """Vectors `[..., H]` brought to the root mean square `scale`, each by itself; zeros stay zeros."""
    dtype = torch.promote_types(vectors.dtype, torch.float32)
    return (nn.functional.rms_norm(vectors.to(dtype), vectors.shape[-1:], eps=RMS_EPS) * scale).to(vectors.dtype)


def segment_means(states: torch.Tensor, attention_mask: torch.Tensor, count: int) -> torch.Tensor:
    """Means `[rows, count, H]` of the attended states in `[rows, length, H]`, cut into `count` segments of like length.

    Of a row's T attended positions, segment j has those from floor(j T / count) up to floor((j + 1) T / count), and at
    least one: where T is less than `count`, a position stands for several segments. Sums are taken in float32 at least.

    Example:

    ```python
    segment_means(torch.tensor([[[1.0], [2.0], [6.0]]]), torch.ones(1, 3), 2)  # [[[1.0], [4.0]]]
    ```
    """
    is_token = attention_mask.bool()
    lengths = is_token.sum(dim=1).view(-1, 1)
    bounds = torch.arange(count + 1, device=states.device) * lengths // count
    begin, end = bounds[:, :-1], torch.maximum(bounds[:, 1:], bounds[:, :-1] + 1)
    place = (is_token.cumsum(dim=1) - 1).unsqueeze(1)
    dtype = torch.promote_types(states.dtype, torch.float32)
    inside = (place >= begin.unsqueeze(2)) & (place < end.unsqueeze(2)) & is_token.unsqueeze(1)
    with torch.autocast(states.device.type, enabled=False):
        # Some attention kernels give NaN where padding is.
        sums = inside.to(dtype) @ states.to(dtype).masked_fill(~is_token.unsqueeze(2), 0)
    return (sums / (end - begin).unsqueeze(2)).to(states.dtype)


def token_batches(lengths: Sequence[int], most: int) -> list[list[int]]:
    """Positions of texts of so many tokens, longest first, in batches that have at most `most` tokens each where all
    texts are padded to the batch's longest.

    Where the texts of whole batches are left out, the others' batches stay as they are.

    Raises:
        ValueError: a text is longer.
    """
    batches: list[list[int]] = []
    for position in sorted(range(len(lengths)), key=lambda position: -lengths[position]):
        if batches and (len(batches[-1]) + 1) * lengths[batches[-1][0]] <= most:
            batches[-1].append(position)
        elif lengths[position] <= most:
            batches.append([position])
        else:
            raise ValueError(
                f"max_tokens_per_batch is {most}, but a text has {lengths[position]} tokens, those of its memory "
                "included: raise it."
            )
    return batches


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


@contextmanager
def gathered(parameters: Iterable[nn.Parameter], changed: bool = False) -> Iterator[None]:
    """Whole parameters for the block where ZeRO-3 leaves each process a part of them; elsewhere nothing happens.

    All processes enter the block together. In it, the model's forward passes may differ in number between them.

    Args:
        changed (`bool`): whether to keep what the first process writes into the parameters; else that is lost.
    """
    if not is_deepspeed_zero3_enabled():
        yield
        return
    # An import statement would be demanded of everybody who loads a checkpoint with its code.
    zero = importlib.import_module("deepspeed").zero
    with zero.GatheredParameters(list(parameters), modifier_rank=0 if changed else None):
        yield


def whole_copy(value: torch.Tensor) -> torch.Tensor:
    """A copy on the CPU. All processes that hold a part of the tensor (FSDP) call this together."""
    value = value.detach()
    if _is_process_group():
        from torch.distributed.tensor import DTensor

        value = value.full_tensor() if isinstance(value, DTensor) else value
    return value.to("cpu", copy=True)


def copy_whole(source: torch.Tensor, target: torch.Tensor) -> None:
    """Write a whole tensor into one that may be spread over processes (FSDP), in place."""
    if _is_process_group():
        from torch.distributed.tensor import DTensor, distribute_tensor

        if isinstance(target, DTensor):
            source = source.to(target.device, target.dtype)
            source = distribute_tensor(source, target.device_mesh, target.placements)
    with torch.no_grad():
        target.copy_(source)


def _is_process_group() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()
