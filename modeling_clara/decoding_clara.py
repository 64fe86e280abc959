"""How answers are decoded: what may be asked of transformers' `generate`, and its greedy decoding on a CPU without
padding, with the prompts' common beginning once, and without finished rows."""

from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import distributed
from torch.nn.functional import pad
from transformers import GenerationConfig, LogitsProcessorList, PreTrainedModel, StoppingCriteriaList

from .functional_clara import can_pack, run_row


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
_IDS_ONLY = "it needs prompts that are token ids, where these hold memories"
WITHOUT_USE = {
    **dict.fromkeys(("inputs", "input_ids", "inputs_embeds", "attention_mask", "position_ids"), _MADE_HERE),
    **dict.fromkeys(("assistant_model", "prompt_lookup_num_tokens", "guidance_scale"), _IDS_ONLY),
    **dict.fromkeys(("negative_prompt_ids", "negative_prompt_attention_mask", "token_healing"), _IDS_ONLY),
    **dict.fromkeys(("encoder_repetition_penalty", "encoder_no_repeat_ngram_size"), _IDS_ONLY),
}


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
    lengths = [shared, *(len(text) - shared for text in texts)]
    row = torch.cat([texts[0][:shared], *(text[shared:] for text in texts)])
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
    count = min(map(len, texts)) - 1
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
