"""Functions of tensors: banks of memories, scores, positions, texts without padding."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import accumulate

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from .configuration_clara import CLaRaConfig
from .processing_clara import IGNORE_INDEX, index_matrix


# Name of the attention of texts that stand one after the other in one row: its own in each copy of this file, since a
# process may hold those of several checkpoints, and transformers has one register.
PACKED = f"packed_by_{__name__}"
# Share of a row's positions up to which reading only these spares the last layer more than it costs.
READS_UP_TO = 0.75
# Keeps the root mean square of zeros, which padding may have, away from 0; squares of states are far larger.
RMS_EPS = 1e-16


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
        index = index_matrix([range(end - count, end) for end, count in zip(ends, counts, strict=True)])
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
    return means if config.memory_scale is None else with_rms(means, config.memory_scale)


def mask_or_ones(attention_mask: torch.Tensor | None, input_ids: torch.Tensor) -> torch.Tensor:
    """`attention_mask`, or where it is `None` ones in the shape of `input_ids`: every position is attended."""
    return torch.ones_like(input_ids) if attention_mask is None else attention_mask


def position_ids(attention_mask: torch.Tensor) -> torch.Tensor:
    """Positions `[rows, length]` counted from each row's first attended token, whatever the padding on the left."""
    return (attention_mask.long().cumsum(dim=-1) - 1).clamp(min=0)


class _Attended(Exception):
    """Leaves a layer at its attention, with the keys and values `[1, heads, T, head_dim]` that stand there."""


def _packed_attention(
    module,
    query,
    key,
    value,
    attention_mask,
    text_lengths,
    leave=False,
    whole=None,
    places=None,
    shared=0,
    kept=None,
    **options,
):
    """Causal attention `[1, T, heads, head_dim]` within each of the texts, of `[1, heads, T, head_dim]`.

    Args:
        text_lengths: of the texts, in tokens.
        leave: whether to raise [`_Attended`].
        whole, places: keys and values of all T tokens, where `query` are those of some; and these tokens' places, a
            tensor for each text.
        shared: the length of the first text, where all others go on from it; else 0.
        kept: a deque that the layer's keys and values are put into.
    """
    if kept is not None and whole is None:
        kept.append((key, value))
    if leave:
        raise _Attended(key, value)
    queries = query.split(text_lengths if whole is None else [len(own) for own in places], dim=2)
    keys, values = ([*states.split(text_lengths, dim=2)] for states in whole or (key, value))
    if shared:
        keys, values = ([first, *(torch.cat([first, rest], 2) for rest in rests)] for first, *rests in (keys, values))
    rows = []
    for number, text in enumerate(zip(queries, keys, values, strict=True)):
        seen, count, end = None, text[0].shape[2], text[1].shape[2]
        if places is not None or (shared and number):
            own = torch.arange(count, device=query.device) if places is None else places[number]
            seen = torch.arange(end, device=query.device) <= (own + (shared if number else 0)).unsqueeze(1)
            seen = seen[None, None]
        if count:
            rows.append(sdpa_attention_forward(module, *text, seen, **options)[0])
    return torch.cat(rows, dim=1), None


# transformers makes no mask for a name that its masks do not know.
AttentionInterface.register(PACKED, _packed_attention)


@contextmanager
def use_attention(decoder: PreTrainedModel, name: str) -> Iterator[None]:
    """Run the forward passes of the block with another attention implementation."""
    before = decoder.config._attn_implementation
    decoder.config._attn_implementation = name
    try:
        yield
    finally:
        decoder.config._attn_implementation = before


@contextmanager
def use_forward(module: nn.Module, forward: Callable | None) -> Iterator[None]:
    """Let `module` compute by another function in the block, or for `None` by its class's."""
    before = module.__dict__.get("forward")
    _set_forward(module, forward)
    try:
        yield
    finally:
        _set_forward(module, before)


def _set_forward(module: nn.Module, forward: Callable | None) -> None:
    if forward is not None:
        module.forward = forward
    elif "forward" in module.__dict__:
        del module.forward


def can_pack(decoder: PreTrainedModel, attention_mask: torch.Tensor, reads_part: bool = False) -> bool:
    """Whether [`run_packed`] spares work: on a CPU, where each position attends to all before it, through SDPA, and
    there is padding or only a part of the positions is read."""
    config, longest = decoder.config, attention_mask.shape[1]
    if attention_mask.device.type != "cpu" or torch.compiler.is_compiling():
        return False
    if attention_mask.all() and not reads_part:
        return False
    window, kinds = (getattr(config, name, None) for name in ("sliding_window", "layer_types"))
    attends_all = {*(kinds or ())} <= {"full_attention", "sliding_attention"} and (not window or longest <= window)
    # Layers that carry a state from token to token would carry it from one text into the next.
    is_known = decoder._supports_attention_backend and not decoder._is_stateful
    return is_known and attends_all and config._attn_implementation == "sdpa"


def run_packed(
    decoder: PreTrainedModel,
    module: nn.Module,
    inputs_embeds: torch.Tensor,
    attention_mask: torch.Tensor,
    places: torch.Tensor | None = None,
) -> torch.Tensor:
    """What `module`, the decoder or its base, computes of padded rows without padding: logits or last hidden states
    `[1, T, ...]`.

    The attended positions of all rows stand in one row: layers of single tokens see no padding, and attention runs
    for each text by itself, without a mask. Attended positions differ from those of the padded pass by rounding.

    Args:
        places (`[n]` int64, *optional*): positions in that row, in order, that alone are returned, `[1, n, ...]`. The
            last layer then computes of the others only what these attend to.
    """
    is_token = attention_mask.bool()
    return run_row(decoder, module, inputs_embeds[is_token], is_token.sum(dim=1).tolist(), places)


def run_row(
    decoder: PreTrainedModel,
    module: nn.Module,
    row: torch.Tensor,
    lengths: list[int],
    places: torch.Tensor | None = None,
    shared: int = 0,
    kept: deque | None = None,
) -> torch.Tensor:
    """[`run_packed`] of a `row` `[T, H]` of texts of these lengths.

    Args:
        shared: the length of the first text, where all others go on from it; else 0.
        kept (*optional*): a deque that gets, for each layer, keys and values `[1, heads, T, head_dim]`.
    """
    starts = [0, *(shared for _ in lengths[1:])]
    positions = [
        torch.arange(start, start + own, device=row.device) for start, own in zip(starts, lengths, strict=True)
    ]
    layer = None if places is None else _layer_to_read(decoder, len(places) / sum(lengths))
    options = {"shared": shared} if shared else {}
    if kept is not None:
        options["kept"] = kept
    if places is not None and module is decoder:
        options["logits_to_keep"] = places if layer is None else 0
    with use_attention(decoder, PACKED), nullcontext() if layer is None else _reads_only(layer, places, lengths):
        output = module(
            inputs_embeds=row.unsqueeze(0),
            position_ids=torch.cat(positions).unsqueeze(0),
            text_lengths=lengths,
            use_cache=False,
            **options,
        )
    if module is decoder:
        return output.logits
    hidden = output.last_hidden_state
    return hidden if places is None or layer is not None else hidden[:, places]


def last_layer(decoder: PreTrainedModel) -> nn.Module | None:
    """The last layer that runs, see [`first_layers`], of a decoder that keeps its layers where most do."""
    layers = getattr(decoder.base_model, "layers", None)
    if not isinstance(layers, nn.ModuleList) or not len(layers):
        return None
    return layers[min(len(layers), decoder.config.num_hidden_layers) - 1]


def check_has_first_layers(decoder: PreTrainedModel) -> None:
    """Raise a `ValueError` unless [`first_layers`] knows where a decoder keeps its layers and its final norm."""
    parts = (getattr(decoder.base_model, name, None) for name in ("layers", "norm"))
    if not all(isinstance(part, nn.Module) for part in parts):
        raise ValueError(
            f"compressor_layers is set, but a {decoder.config.model_type} decoder does not keep its layers and final "
            "norm where most do: leave it out, which takes all layers."
        )


@contextmanager
def first_layers(decoder: PreTrainedModel, count: int | None) -> Iterator[None]:
    """Run only the first `count` layers of a decoder in the block, and no final norm; all of it for `None`."""
    if count is None:
        yield
        return
    base, layers = decoder.base_model, decoder.base_model.layers
    base.layers = layers[:count]
    try:
        with use_forward(base.norm, nn.Identity().forward):
            yield
    finally:
        base.layers = layers


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


def _layer_to_read(decoder: PreTrainedModel, share: float) -> nn.Module | None:
    """The last layer of a decoder, if reading only a `share` of its positions can and does spare work there."""
    layer = last_layer(decoder)
    if share > READS_UP_TO or layer is None:
        return None
    # ZeRO-3 and offloading bring weights in before a module runs and let go of them behind it.
    brought = is_deepspeed_zero3_enabled() or any("forward" in part.__dict__ for part in (layer, *layer.children()))
    return None if brought or any(weight.is_meta for weight in layer.parameters()) else layer


@contextmanager
def _reads_only(layer: nn.Module, places: torch.Tensor, text_lengths: list[int]) -> Iterator[None]:
    """Let a layer give only the positions `places` of its row of texts.

    It runs twice, whatever it consists of: over all positions as far as its attention, whose keys and values are kept,
    and whole over `places`, whose queries attend to these.
    """
    forward, total = layer.forward, sum(text_lengths)
    starts = torch.tensor([0, *accumulate(text_lengths)], device=places.device)
    ends = torch.searchsorted(places, starts[1:]).tolist()
    own = [places[begin:end] - start for begin, end, start in zip([0, *ends], ends, starts[:-1], strict=False)]

    def chosen(given):
        if isinstance(given, tuple):
            return tuple(map(chosen, given))
        is_row = isinstance(given, torch.Tensor) and given.dim() > 1 and given.shape[1] == total
        return given[:, places] if is_row else given

    def read(*inputs, **options):
        # Newer versions of transformers checkpoint within `forward`, which the exception must not leave halfway.
        checkpoints, layer.gradient_checkpointing = getattr(layer, "gradient_checkpointing", False), False
        try:
            try:
                forward(*inputs, **options, leave=True)
            except _Attended as found:
                whole = found.args
            options = {name: chosen(value) for name, value in options.items()}
            return forward(*map(chosen, inputs), **options, whole=whole, places=own)
        finally:
            layer.gradient_checkpointing = checkpoints

    with use_forward(layer, read):
        yield


def unpacked(packed: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Values `[1, T, H]` of the attended positions in their places `[rows, length, H]`, with 0 where padding is."""
    rows = packed.new_zeros(*attention_mask.shape, packed.shape[-1])
    return rows.masked_scatter(attention_mask.bool().unsqueeze(-1), packed)


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


def last_places(attention_mask: torch.Tensor, count: int) -> torch.Tensor:
    """Where each row's `count` last positions stand `[rows * count]`, which are attended, if all rows' attended
    positions stand in one row."""
    ends = attention_mask.bool().sum(dim=1).cumsum(0)
    return (ends.unsqueeze(1) + torch.arange(-count, 0, device=ends.device)).flatten()


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
