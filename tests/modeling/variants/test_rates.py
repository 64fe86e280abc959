"""One checkpoint for several compression rates: memories at each, batches of a drawn one, stores, and training."""

import copy

import pytest
import torch
from conftest import build_clara
from test_trainers import STAGES, make_trainer

from clara_hf.evaluation.systems import loading
from clara_hf.memory_store.store import MemoryStore
from clara_hf.original.export import to_original
from clara_hf.program.models import ModelSource
from modeling_clara import CLaRaConfig, CLaRaForRetrievalGeneration
from modeling_clara.adapters_clara import COMPRESSOR, use_adapter
from modeling_clara.functional_clara import coarser_memories
from trainers.batches import batch_at_rate, drawn_rate


RATES = [4, 8, 16]  # of 32 tokens: 8, 4 and 2 memory tokens
POOLED = {"readout": "mean_pool", "memory_scale": 0.1}
QUESTIONS, ANSWERS = ["Where does Mara live?", "What is sold to sailors?"], ["In Velholm.", "Copper lanterns."]


@pytest.fixture(scope="module")
def tokens(base):
    """A model whose memories are those of memory tokens."""
    return build_clara(base, compression_rate=RATES, lora_dropout=0.0)


@pytest.fixture(scope="module")
def pooled(base):
    return build_clara(base, compression_rate=RATES, lora_dropout=0.0, **POOLED)


def test_memory_tokens_of_a_higher_rate_are_the_first_ones(tokens, texts):
    model = copy.deepcopy(tokens).double()
    finest = model.compress(texts)
    for rate, count in zip(RATES, (8, 4, 2), strict=True):
        found = model.compress(texts, rate=rate)
        assert found.shape == (5, count, 32)
        for text, memory in zip(texts, found, strict=True):
            framed = model.processor.tokenizer(f"<ENC><s>{text}</s>", add_special_tokens=False)["input_ids"]
            embeddings = torch.cat([model.get_input_embeddings()(torch.tensor(framed)), model.memory_embeddings.weight])
            with torch.no_grad(), use_adapter(model.decoder, COMPRESSOR):
                short = embeddings[: len(framed) + count].unsqueeze(0)
                states = model.decoder(inputs_embeds=short, output_hidden_states=True).hidden_states[-1][0]
            assert (memory - states[-count:]).abs().max() < 1e-6
        assert (coarser_memories(finest, model.config, rate) - found).abs().max() < 1e-6
    assert torch.equal(model.compress(texts), finest) and model.config.rate is None


def test_pooled_memories_of_a_higher_rate_are_means_of_neighbours(pooled, texts):
    finest = pooled.compress(texts)
    for rate, count in zip(RATES, (8, 4, 2), strict=True):
        found, size = pooled.compress(texts, rate=rate), 8 // count
        for row in range(5):
            for j in range(count):
                mean = finest[row, j * size : (j + 1) * size].mean(dim=0)
                assert torch.allclose(found[row, j], 0.1 * mean / mean.square().mean().sqrt(), atol=1e-6)
        assert torch.allclose(coarser_memories(finest, pooled.config, rate), found, atol=1e-6)


@pytest.mark.parametrize("fields", [{}, {"distinct_memory_tokens": False}, POOLED])
def test_a_batch_brought_to_a_rate_is_the_one_made_at_it(fields, base, texts):
    model = build_clara(base, compression_rate=RATES, **fields)
    documents = [texts[:1], texts[1:4]]  # prompts with one slot and with two
    finest = model.processor(QUESTIONS, documents, ANSWERS)
    for rate in RATES:
        at_rate = model.at_rate(rate)
        expected = at_rate.processor(QUESTIONS, documents, ANSWERS)
        found = batch_at_rate(dict(finest), model.config, rate)
        assert set(found) == set(expected)
        assert all(torch.equal(found[name], expected[name]) for name in expected)
        compressed = ("document_input_ids", "document_attention_mask")
        stored = {name: value for name, value in finest.items() if name not in compressed}
        stored["memories"] = model.compress(texts[:4])
        with torch.no_grad():
            one, other = at_rate(**expected), at_rate(**batch_at_rate(stored, model.config, rate))
        assert torch.allclose(one.loss, other.loss, atol=1e-5) and torch.allclose(one.scores, other.scores, atol=1e-5)


def test_verbs_take_a_rate_and_refuse_memories_of_another(tokens, texts):
    memories = tokens.compress(texts, rate=16)
    fixed = tokens.at_rate(16)
    expected = fixed.retrieve(QUESTIONS, memories, n_docs=2)
    found = tokens.retrieve(QUESTIONS, memories, n_docs=2, rate=16)
    assert torch.equal(found.indices, expected.indices) and torch.equal(found.scores, expected.scores)
    queries = tokens.encode_questions(QUESTIONS)
    assert torch.allclose(tokens.encode_questions(QUESTIONS, rate=16), queries[:, :2], atol=1e-5)
    answers = tokens.generate(QUESTIONS, memories=memories, rate=16, max_new_tokens=3)
    assert answers.texts == fixed.generate(QUESTIONS, [texts, texts], max_new_tokens=3).texts
    prompts = fixed.processor.encode_prompts(QUESTIONS, [1, 1])
    index = answers.indices[:, :1]
    again = tokens.answer(**prompts, memories=memories, document_index=index, rate=16, max_new_tokens=3)
    assert len(again.texts) == 2
    for call in (tokens.retrieve, lambda *given, **options: tokens.generate(given[0], memories=given[1], **options)):
        with pytest.raises(ValueError, match=r"\[5, 2, 32\].*\[N, 8, 32\].*rate"):
            call(QUESTIONS, memories)
        with pytest.raises(ValueError, match=r"\[5, 2, 32\].*\[N, 4, 32\].*rate"):
            call(QUESTIONS, memories, rate=8)
    with pytest.raises(ValueError, match=r"rate must be one of the compression rates \[4, 8, 16\].*got 5"):
        tokens.compress(texts, rate=5)


def test_a_store_has_one_rate(tokens, texts, tmp_path):
    model = copy.deepcopy(tokens)
    store = MemoryStore.open(tmp_path / "memories", model, dtype="float32", rate=16)
    keys = store.add(texts)
    assert torch.equal(store.get(keys), model.compress(texts, rate=16))
    assert MemoryStore.open(tmp_path / "finest", model).keys(texts) != keys
    assert torch.equal(store.search(QUESTIONS, 1).scores, model.retrieve(QUESTIONS, store, n_docs=1, rate=16).scores)
    answers = model.generate(QUESTIONS, store=store, rate=16, max_new_tokens=2)
    assert answers.texts == model.generate(QUESTIONS, [texts, texts], rate=16, max_new_tokens=2).texts
    with pytest.raises(ValueError, match=r"\(2, 8, 32\).*\[any, 2, 32\].*rate"):
        model.retrieve(QUESTIONS, store)
    with pytest.raises(ValueError, match="2 memory tokens.*8 memory tokens.*rate"):
        MemoryStore.open(tmp_path / "memories", model)


def test_every_rate_has_a_digest_of_its_own(tokens, base):
    digests = [tokens.at_rate(rate).compressor_fingerprint() for rate in RATES]
    assert tokens.compressor_fingerprint() == digests[0]
    single = copy.deepcopy(tokens)
    single.config.compression_rate = 4
    assert len({*digests, single.compressor_fingerprint()}) == 4


def test_a_checkpoint_keeps_its_rates_and_is_loaded_at_one(tokens, texts, bases, tmp_path):
    tokens.save_pretrained(tmp_path / "model")
    loaded = CLaRaForRetrievalGeneration.from_pretrained(tmp_path / "model")
    assert loaded.config.compression_rate == RATES and torch.equal(loaded.compress(texts), tokens.compress(texts))
    loaded = loading.load_clara(ModelSource(str(tmp_path / "model"), rate=16))
    assert torch.equal(loaded.compress(texts), tokens.compress(texts, rate=16))
    facts, processor = loading.describe_clara(ModelSource(str(tmp_path / "model"), rate=8))
    assert facts["compression_rate"] == 8 and facts["num_memory_tokens"] == len(processor.memory_ids) == 4
    with pytest.raises(ValueError, match=r"rate must be one of .*\[4, 8, 16\]"):
        CLaRaForRetrievalGeneration.from_pretrained(tmp_path / "model", rate=32)
    with pytest.raises(ValueError, match=r"compression_rate is \[4, 8, 16\].*one rate"):
        to_original(str(tmp_path / "model"), str(tmp_path / "theirs"))


def lengths_of_memories(trainer) -> list[tuple[int, int]]:
    """The step, and how many vectors a memory has in it, of each forward pass of training, which fills the list."""
    seen, original = [], trainer.model.forward

    def forward(*args, **kwargs):
        output = original(*args, **kwargs)
        if trainer.model.training:
            seen.append((trainer.state.global_step, output.memories.shape[1]))
        return output

    trainer.model.forward = forward
    return seen


@pytest.mark.parametrize("stage", STAGES)
def test_a_rate_is_drawn_for_each_step_and_a_resumed_run_is_the_same(stage, base, tmp_path):
    fields = POOLED if stage == "instruct" else {}
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "gradient_accumulation_steps": 2, "seed": 3}

    def trainer_in(folder):
        model = build_clara(base, compression_rate=RATES, **fields)
        return make_trainer(stage, base, tmp_path / folder, model, **options)

    whole, resumed = trainer_in("whole"), trainer_in("resumed")
    seen, again = lengths_of_memories(whole), lengths_of_memories(resumed)
    whole.train()
    expected = [(step, 32 // drawn_rate(whole.model.config, 3, step)) for step in range(4)]
    assert list(dict.fromkeys(seen)) == expected and len({length for _, length in expected}) > 1 and len(seen) > 4
    assert whole.model.config.rate is None
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    assert again == [one for one in seen if one[0] >= 2]
    states = whole.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


def test_a_rate_that_is_set_is_trained_alone(base, tmp_path):
    model = build_clara(base, compression_rate=RATES, rate=8)
    trainer = make_trainer("joint", base, tmp_path, model, max_steps=3)
    seen = lengths_of_memories(trainer)
    trainer.train()
    assert seen == [(0, 4), (1, 4), (2, 4)] and trainer.store.maker.num_memory_tokens == 4


def test_rates_are_drawn_alike_and_all_of_them():
    config = CLaRaConfig(compression_rate=RATES)
    drawn = [drawn_rate(config, 0, step) for step in range(600)]
    assert drawn == [drawn_rate(config, 0, step) for step in range(600)]
    assert all(150 < drawn.count(rate) < 250 for rate in RATES)
    assert drawn != [drawn_rate(config, 1, step) for step in range(600)]
    assert drawn_rate(CLaRaConfig(compression_rate=RATES, rate=8), 0, 1) is None
    assert drawn_rate(CLaRaConfig(compression_rate=[16]), 0, 1) is drawn_rate(CLaRaConfig(), 0, 1) is None


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"compression_rate": [16, 4]},
            r"compression_rate must list different rates, the smallest first, got \[16, 4\]",
        ),
        ({"compression_rate": [4, 4]}, r"compression_rate must list different rates.*got \[4, 4\]"),
        ({"compression_rate": []}, r"compression_rate must list different rates.*got \[\]"),
        ({"compression_rate": [4, 24]}, "compression_rate must divide doc_max_length, got 24 and 256"),
        ({"compression_rate": [4, "16"]}, "compression_rate must be a whole number of at least 1"),
        (
            {"compression_rate": [4, 6], "doc_max_length": 240, "readout": "mean_pool"},
            "compression_rate lists 6.*'mean_pool'.*multiples of the first, 4",
        ),
        ({"rate": 4}, r"rate must be one of the compression rates \[16\], or None, got 4"),
        ({"compression_rate": RATES, "rate": True}, "rate must be one of .*got True"),
    ],
)
def test_rates_that_do_not_go_together_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        CLaRaConfig(**fields)
