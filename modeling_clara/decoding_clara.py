"""How the decoder runs: over texts without padding, in a part of its layers, and from token to token on a CPU, with the
prompts' common beginning once; and what may be asked of transformers' `generate`."""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import accumulate

import torch
from torch import distributed, nn
from torch.nn.functional import pad
from transformers import (
    AttentionInterface,
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    StoppingCriteriaList,
)
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.integrations.sdpa_attention import sdpa_attention_forward


# Name of the attention of texts that stand one after the other in one row: its own in each copy of this file, since a
# process may hold those of several checkpoints, and transformers has one register.
PACKED = f"packed_by_{__name__}"
# Share of a row's positions up to which reading only these spares the last layer more than it costs.
READS_UP_TO = 0.75
# Share of a step's tokens from which on having the prompts' common beginning once spares more than it costs.
SHARES_FROM = 0.05
# Options of transformers' `generate` that leave it at greedy decoding.
GREEDY_OPTIONS = {
    *("max_length", "max_new_tokens", "min_length", "min_new_tokens", "eos_token_id", "pad_token_id"),
    *("do_sample", "num_beams", "num_return_sequences", "repetition_penalty", "no_repeat_ngram_size"),
    *("suppress_tokens", "bad_words_ids", "logits_processor", "stopping_criteria"),
}
LONGEST_MESSAGE = 400  # characters of transformers' messages about options
WHOLE_NUMBERS = (
    *("max_length", "max_new_tokens", "min_length", "min_new_tokens", "num_beams", "num_return_sequences", "top_k"),
    *("no_repeat_ngram_size",),
)
NUMBERS = (
    *("temperature", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff", "top_h", "max_time"),
    *("repetition_penalty", "length_penalty"),
)
SWITCHES = ("do_sample", "use_cache", "return_dict_in_generate", "output_scores", "output_logits", "output_attentions")
ID_LISTS = ("suppress_tokens", "begin_suppress_tokens")
FORCED = ("forced_bos_token_id", "forced_eos_token_id")
END_IDS = ("eos_token_id", "pad_token_id", "bos_token_id")
_MADE_HERE = "it is made here, of the questions and documents"
# Transformers' own generate takes ids and embeddings together, but then verifies its first guesses by the logits of the
# prompt's end, where the embeddings have no guesses: other answers, without an error.
_IDS_ONLY = "it needs prompts that are token ids, where these hold memories"
WITHOUT_USE = {
    **dict.fromkeys(("inputs", "input_ids", "inputs_embeds", "attention_mask", "position_ids"), _MADE_HERE),
    **dict.fromkeys(("assistant_model", "prompt_lookup_num_tokens", "guidance_scale"), _IDS_ONLY),
    **dict.fromkeys(("negative_prompt_ids", "negative_prompt_attention_mask", "token_healing"), _IDS_ONLY),
    **dict.fromkeys(("encoder_repetition_penalty", "encoder_no_repeat_ngram_size"), _IDS_ONLY),
}


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
    shared: int = 0,
) -> torch.Tensor:
    """What `module`, the decoder or its base, computes of padded rows without padding: logits or last hidden states
    `[1, T, ...]`.

    The attended positions of all rows stand in one row: layers of single tokens see no padding, and attention runs
    for each text by itself, without a mask. Attended positions differ from those of the padded pass by rounding.

    Args:
        places (`[n]` int64, *optional*): positions in that row, in order, that alone are returned, `[1, n, ...]`. The
            last layer then computes of the others only what these attend to.
        shared: positions that all rows begin with alike, before the first of their `places`. These stand in the row
            once, and get the gradients of all.
    """
    is_token = attention_mask.bool()
    lengths = is_token.sum(dim=1).tolist()
    if not shared:
        return run_row(decoder, module, inputs_embeds[is_token], lengths, places)
    number = torch.searchsorted(torch.tensor(lengths, device=places.device).cumsum(0), places, right=True)
    texts = [text[own] for text, own in zip(inputs_embeds, is_token, strict=True)]
    return run_row(decoder, module, *beginning_once(texts, shared), places - shared * number, shared)


def beginning_once(texts: Sequence[torch.Tensor], shared: int) -> tuple[torch.Tensor, list[int]]:
    """One row `[T, H]` of what all texts `[length, H]` begin with, and each one's rest; and their lengths."""
    parts = [texts[0][:shared], *(text[shared:] for text in texts)]
    return torch.cat(parts), [len(part) for part in parts]


def shared_beginning(input_ids: torch.Tensor, attention_mask: torch.Tensor, own: torch.Tensor) -> int:
    """How many ids at the beginning of all rows `[B, L]` are alike, before the first position of `own` (bool); 0 where
    having them once spares little."""
    ids = input_ids.masked_fill(own, -1).unsqueeze(2)
    first = int((own.int().cumsum(dim=1) == 0).logical_and(attention_mask).sum(dim=1).min())
    count = min(first, common_beginning([row[mask] for row, mask in zip(ids, attention_mask.bool(), strict=True)]))
    return count if count * (len(ids) - 1) >= SHARES_FROM * int(attention_mask.sum()) else 0


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


def unpacked(packed: torch.Tensor, attention_mask: torch.Tensor) -> torch.Tensor:
    """Values `[1, T, H]` of the attended positions in their places `[rows, length, H]`, with 0 where padding is."""
    rows = packed.new_zeros(*attention_mask.shape, packed.shape[-1])
    return rows.masked_scatter(attention_mask.bool().unsqueeze(-1), packed)


def last_places(attention_mask: torch.Tensor, count: int) -> torch.Tensor:
    """Where each row's `count` last positions stand `[rows * count]`, which are attended, if all rows' attended
    positions stand in one row."""
    ends = attention_mask.bool().sum(dim=1).cumsum(0)
    return (ends.unsqueeze(1) + torch.arange(-count, 0, device=ends.device)).flatten()


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


def can_decode_packed(decoder: PreTrainedModel, attention_mask: torch.Tensor, options: dict) -> bool:
    """Whether [`decode_packed`] gives what transformers' `generate` does with `options`, for prompts with this mask."""
    one_each = all(options.get(name) in (None, 1) for name in ("num_beams", "num_return_sequences"))
    is_greedy = options.keys() <= GREEDY_OPTIONS and one_each and not options.get("do_sample")
    # Where weights are spread over processes, these run as many steps as the longest answer of all.
    alone = not distributed.is_available() or not distributed.is_initialized() or distributed.get_world_size() == 1
    return is_greedy and alone and can_pack(decoder, attention_mask, reads_part=True)


def decode_packed(
    decoder: PreTrainedModel,
    input_ids: torch.Tensor,
    logits_processor: LogitsProcessorList,
    stopping_criteria: StoppingCriteriaList,
    generation_config: GenerationConfig,
    prompts: torch.Tensor,
    mask: torch.Tensor,
    pad_token_id: int,
    **prepared,
) -> torch.Tensor:
    """A `custom_generate` of transformers: greedy decoding of `prompts` `[B, L, H]`, padded on the left as `mask` says.

    Args:
        input_ids (`[B, 0]`): where answers are put behind.
        prepared: what else `generate` makes, an empty cache among it.

    Returns:
        answers `[B, new tokens]`, `pad_token_id` behind each one's end.
    """
    name = "cache" if "cache" in prepared else "past_key_values"  # transformers 5.24 gave it the new name
    cache, ids, logits = prepared[name], input_ids, read_prompts(decoder, prompts, mask, prepared[name])
    rows, length = torch.arange(len(ids)), mask.sum(dim=1, keepdim=True)
    is_padded, finished = not mask.all(), torch.zeros(len(ids), dtype=torch.bool)
    # As in transformers: without an end token rows that a criterion stopped go on until all are.
    may_leave = any(hasattr(criterion, "eos_token_id") for criterion in stopping_criteria)
    while True:
        scores = logits.float()
        if len(rows) < len(ids):  # processors see all rows, in their places
            scores = scores.new_zeros(len(ids), scores.shape[1]).index_copy(0, rows, scores)
        tokens = logits_processor(ids, scores).argmax(dim=-1)
        if may_leave:
            tokens = tokens.masked_fill(finished, pad_token_id)
        ids = torch.cat([ids, tokens.unsqueeze(1)], dim=1)
        finished = finished | stopping_criteria(ids, None)
        if finished.all():
            return ids
        if may_leave and finished[rows].any():
            stay = (~finished[rows]).nonzero().squeeze(1)
            rows, length, mask = rows[stay], length[stay], mask[stay]
            cache.batch_select_indices(stay)
        mask = pad(mask, (0, 1), value=1)
        logits = decoder(
            input_ids=ids[rows, -1:],
            attention_mask=mask if is_padded else None,
            position_ids=length,
            logits_to_keep=1,
            use_cache=True,
            **{name: cache},
        ).logits[:, -1]
        length = length + 1


def read_prompts(decoder: PreTrainedModel, prompts: torch.Tensor, mask: torch.Tensor, cache) -> torch.Tensor:
    """Logits `[B, vocab]` behind prompts `[B, L, H]`, padded on the left as `mask` says, whose keys and values go into
    the empty `cache`.

    What all prompts begin with stands once in front of a row of their rests. The last layer computes of the rests' last
    positions only what stands there.
    """
    texts = [row[own] for row, own in zip(prompts, mask.bool(), strict=True)]
    shared = common_beginning(texts)
    row, lengths = beginning_once(texts, shared)
    last = torch.tensor(lengths, device=row.device).cumsum(0)[1:] - 1
    kept = deque()  # no list, of which accelerate's hooks hand on a copy
    logits = run_row(decoder, decoder, row, lengths, last, shared=shared, kept=kept)
    for number, states in enumerate(kept):
        cache.update(*(_as_rows(each, lengths, mask.shape[1]) for each in states), number)
    return logits[0]


def common_beginning(texts: Sequence[torch.Tensor]) -> int:
    """How many positions at the beginning of all `texts` `[length, H]` are alike, leaving of each text the last one; 0
    for a single text."""
    if len(texts) == 1:
        return 0
    count = max(min(map(len, texts)) - 1, 0)
    alike = [(text[:count] == texts[0][:count]).all(dim=1) for text in texts[1:]]
    return int(torch.stack(alike).all(dim=0).long().cumprod(dim=0).sum())


def _as_rows(states: torch.Tensor, lengths: list[int], width: int) -> torch.Tensor:
    """Keys or values `[1, heads, T, head_dim]` of a shared beginning and the rests: rows `[B, heads, width, head_dim]`,
    padded on the left."""
    first, *rests = states.split(lengths, dim=2)
    rows = [torch.cat([first, rest], dim=2) for rest in rests]
    return torch.cat([pad(row, (0, 0, width - row.shape[2], 0)) for row in rows])


@contextmanager
def options_named(options: dict) -> Iterator[None]:
    """Name the options given, where what transformers does with them fails in its own code."""
    try:
        yield
    except (AttributeError, TypeError, ValueError, IndexError, ArithmeticError, RuntimeError) as error:
        is_the_machines = isinstance(error, (torch.OutOfMemoryError, NotImplementedError))
        if is_the_machines or not options:
            raise
        kind = TypeError if isinstance(error, (AttributeError, TypeError)) else ValueError
        if any(name in str(error) for name in options):
            if len(str(error)) <= LONGEST_MESSAGE:
                raise
            raise kind(f"{error!s:.{LONGEST_MESSAGE}}…") from error  # it holds a long value whole
        given = ", ".join(f"{name}={repr(value)[:60]}" for name, value in options.items())
        raise kind(f"generate failed with {given}: one of them cannot be used ({error}).") from error


def check_generation_options(options: dict) -> None:
    """Raise unless options of transformers' `generate` are of their types, and ones that this model has a use for.

    Raises:
        TypeError: a `generation_config` of another kind.
        ValueError: an option of another type, or without use here.
    """
    config = options.get("generation_config")
    if not isinstance(config, (dict, GenerationConfig, type(None))):
        raise TypeError(f"generation_config must be a GenerationConfig or a dictionary, got {type(config).__name__}.")
    if isinstance(config, dict) and (unknown := sorted(map(str, set(config) - set(vars(GenerationConfig()))))):
        raise ValueError(f"generation_config has no {unknown[0]!r}: give options of transformers' GenerationConfig.")
    values = options if config is None else {**(config if isinstance(config, dict) else config.to_dict()), **options}
    for name, reason in WITHOUT_USE.items():
        if values.get(name) is not None:
            raise ValueError(f"generate takes no {name}: {reason}.")
    for names, types, wanted in (
        (WHOLE_NUMBERS, int, "a whole number"),
        (NUMBERS, (int, float), "a number"),
        (SWITCHES, bool, "True or False"),
        (ID_LISTS, (list, tuple), "a list of ids"),
        (FORCED, (int, list, tuple), "an id or a list of ids"),
    ):
        for name in names:
            value = values.get(name)
            is_other = not isinstance(value, types) or (types is not bool and isinstance(value, bool))
            if value is not None and is_other:
                raise ValueError(f"{name} must be {wanted}, got {value!r:.80}.")
    for name in (*ID_LISTS, *FORCED, *END_IDS):
        value = values.get(name)
        for one in value if isinstance(value, (list, tuple)) else ():
            if not isinstance(one, int) or isinstance(one, bool) or abs(one) >= 2**63:
                raise ValueError(f"{name} must hold token ids, got {one!r:.80} among them.")
    for name in ("num_return_sequences", "num_beams", "max_new_tokens"):
        if values.get(name) is not None and values[name] < 1:
            raise ValueError(f"{name} must be at least 1, got {values[name]}.")
    if abs(values.get("length_penalty") or 0) > 100:  # an exponent: a large whole one would be worked out in full
        raise ValueError(f"length_penalty must lie between -100 and 100, got {values['length_penalty']!r:.80}.")
