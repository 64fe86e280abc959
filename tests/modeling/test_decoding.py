"""Decoding without padding, repeated beginnings and finished rows: the answers of transformers' own loop."""

import pytest
import torch
from conftest import build_clara
from transformers import LogitsProcessor, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList

from modeling_clara.adapters_clara import GENERATOR, use_adapter
from modeling_clara.decoding_clara import can_decode_packed, common_beginning, read_prompts, shared_beginning


QUESTIONS = ["Who?", "Where does the glassblower live in winter?", "What is sold to sailors?", "Who wrote it?"]


@pytest.fixture(scope="module")
def model(bases):
    """Float64, so that equal answers do not hang on rounding at a tie."""
    return build_clara(bases["llama"]).double()


@pytest.fixture(scope="module")
def memories(model, texts):
    bank = model.compress(texts)
    return [bank[:2], bank[:3], bank[:1], bank[2:4]]


def answers(model, monkeypatch, memories, **options) -> torch.Tensor:
    """Ids, which both ways must give alike; what each forward pass of the quick one reads is in `model.read`."""
    given = {"questions": QUESTIONS[: len(memories)], "memories": memories, "rerank": False, "max_new_tokens": 8}
    with monkeypatch.context() as patch:
        patch.setattr("modeling_clara.generation_clara.can_decode_packed", lambda *_: False)
        plain = model.generate(**given | options).sequences
    model.read = []

    def note(module, inputs, named):
        ids = named["inputs_embeds"] if named.get("input_ids") is None else named["input_ids"]
        model.read.append(tuple(ids.shape[:2]))

    handle = model.decoder.register_forward_pre_hook(note, with_kwargs=True)
    try:
        quick = model.generate(**given | options).sequences
    finally:
        handle.remove()
    assert torch.equal(quick, plain)
    return quick


class Bias(LogitsProcessor):
    """Forbids each row, by its place in the batch, another share of the vocabulary."""

    def __call__(self, input_ids, scores):
        places = torch.arange(scores.shape[1]).expand_as(scores) + torch.arange(len(scores)).unsqueeze(1)
        return scores.masked_fill(places % len(scores) == input_ids.shape[1] % len(scores), float("-inf"))


class Limit(StoppingCriteria):
    """Ends row n behind its token n + 1."""

    def __call__(self, input_ids, scores, **kwargs):
        return torch.arange(len(input_ids)) < input_ids.shape[1]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"min_new_tokens": 8},
        {"repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
        {"suppress_tokens": list(range(0, 300, 2))},
        {"logits_processor": LogitsProcessorList([Bias()])},
        {"stopping_criteria": StoppingCriteriaList([Limit()])},
        {"stopping_criteria": StoppingCriteriaList([Limit()]), "eos_token_id": []},
    ],
)
def test_answers_are_those_of_transformers_loop(model, memories, monkeypatch, options):
    answers(model, monkeypatch, memories, **options)
    answers(model, monkeypatch, memories[:1], **options)


def test_finished_rows_are_left_out_and_padded(model, memories, monkeypatch):
    varied = {"no_repeat_ngram_size": 1}
    free = answers(model, monkeypatch, memories, min_new_tokens=8, **varied)
    ends = [int(free[0, 1]), int(free[1, 4])]
    lengths = [next((n for n, token in enumerate(row, 1) if token in ends), 8) for row in free.tolist()]
    assert len(set(lengths)) > 1
    found = answers(model, monkeypatch, memories, eos_token_id=ends, pad_token_id=0, **varied)
    for row, length, ids in zip(free, lengths, found, strict=True):
        assert torch.equal(ids[:length], row[:length]) and not ids[length:].any()
    assert model.read[1:] == [(sum(length > step for length in lengths), 1) for step in range(1, max(lengths))]


def test_padding_and_what_all_prompts_begin_with_are_not_computed_again(model, memories, monkeypatch):
    answers(model, monkeypatch, memories)
    prompts = model.processor.encode_prompts(QUESTIONS, [len(own) for own in memories])
    mask = prompts["attention_mask"].bool()
    # All begin with one memory, behind which some prompts have a second one and some have none.
    texts = [ids[own] for ids, own in zip(prompts["input_ids"], mask, strict=True)]
    first = int((texts[0] == model.config.memory_token_ids[0]).nonzero()[0])
    own = answers(model, monkeypatch, memories[:3])
    assert own.shape[0] == 3
    row = sum(map(len, texts[:3]))
    assert model.read[0] == (1, row - 2 * (first + model.config.num_memory_tokens + 1))
    answers(model, monkeypatch, memories)
    assert model.read[0] == (1, int(mask.sum()) - 3 * first)


@pytest.mark.parametrize("architecture", ["llama", "phi3", "gemma", "qwen2"])
def test_prompts_are_read_as_each_alone(bases, architecture):
    decoder = build_clara(bases[architecture]).double().decoder
    prompts, mask = torch.randn(3, 9, 32, dtype=torch.float64), torch.ones(3, 9, dtype=torch.int64)
    mask[0, :3], mask[1, :1] = 0, 0
    prompts[0, 3:6], prompts[1, 1:4] = prompts[2, :3], prompts[2, :3]

    class Cache:
        rows: dict[int, tuple] = {}

        def update(self, keys, values, number):
            self.rows[number] = keys, values

    with torch.no_grad(), use_adapter(decoder, GENERATOR):
        logits = read_prompts(decoder, prompts, mask, Cache())
        for row, own in enumerate(mask.bool()):
            alone = decoder(inputs_embeds=prompts[row, own].unsqueeze(0)).logits[:, -1]
            torch.testing.assert_close(logits[row : row + 1], alone, rtol=1e-9, atol=1e-9)
    assert all(states.shape[::2] == (3, 9) for pair in Cache.rows.values() for states in pair) and len(Cache.rows) == 2


def test_a_common_beginning_leaves_every_text_a_position():
    rows = torch.arange(12.0).view(6, 2)
    assert common_beginning([rows]) == 0
    assert common_beginning([rows, rows[:4]]) == 3
    assert common_beginning([rows, torch.cat([rows[:2], rows[:1], rows[3:]])]) == 2
    assert common_beginning([rows, rows + 1]) == 0


def test_only_greedy_decoding_by_known_options_takes_this_way(model):
    mask = torch.ones(2, 5, dtype=torch.int64)

    def can(**options) -> bool:
        return can_decode_packed(model.decoder, mask, options)

    assert can(max_new_tokens=3) and can(do_sample=False, num_beams=1, num_return_sequences=1)
    refused = {"do_sample": True, "num_beams": 2, "num_return_sequences": 2, "streamer": object(), "max_time": 1.0}
    refused |= {"return_dict_in_generate": True, "cache_implementation": "static", "stop_strings": ["a"]}
    assert not any(can(**{name: value}) for name, value in refused.items())


def test_a_beginning_is_shared_up_to_what_differs_or_is_a_rows_own():
    ids, mask = torch.arange(40, 60).repeat(3, 1), torch.ones(3, 20, dtype=torch.int64)
    ids[0], mask[0] = torch.cat([torch.tensor([1, 2]), ids[0, :18]]), (torch.arange(20) >= 2).long()  # padded
    own = torch.zeros(3, 20, dtype=torch.bool)
    assert shared_beginning(ids, mask, own) == 17  # each row keeps its last position
    ids[1, 12] = 3
    assert shared_beginning(ids, mask, own) == 12
    own[0, 9] = True  # the seventh of its attended positions
    assert shared_beginning(ids, mask, own) == 7
    own[2, 1] = True
    assert shared_beginning(ids, mask, own) == 0  # two tokens of 58 are too few
    assert shared_beginning(ids[:1], mask[:1], own[:1]) == 0
