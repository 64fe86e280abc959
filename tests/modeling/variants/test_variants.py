"""Readout, layers that read, and scale of memories: against one text at a time, spelled out, through every stage."""

import copy
import json

import pytest
import torch
from conftest import build_base, build_clara
from test_trainers import STAGES, make_trainer, part_of, snapshot
from torch.nn import functional as F

from clara_hf.memory_store.keys import Maker
from clara_hf.memory_store.store import MemoryStore
from clara_hf.original.export import to_original
from modeling_clara import CLaRaConfig, CLaRaForRetrievalGeneration
from modeling_clara.adapters_clara import COMPRESSOR, GENERATOR, QUERY_REASONER, use_adapter
from modeling_clara.functional_clara import segment_means
from modeling_clara.modeling_clara import MEMORY_EMBEDDINGS


# Of 3 layers. Eight memory tokens, which is more than the shortest of the texts has.
POOLED_EARLY = {"readout": "mean_pool", "compressor_layers": 2, "memory_scale": 0.07}
VARIANTS = {
    "pooled": {"readout": "mean_pool"},
    "pooled_early": POOLED_EARLY,
    "pooled_embeddings": {"readout": "mean_pool", "compressor_layers": 0, "memory_scale": "embeddings"},
    "early": {"compressor_layers": 1},
    "early_scaled": {"compressor_layers": 2, "memory_scale": "embeddings"},
    "scaled": {"memory_scale": 0.5},
    "all_layers": {"compressor_layers": 3},
}
# Of float64, but for the decoder's norms, which it takes in float32.
STATE_TOLERANCE, GRADIENT_TOLERANCE = 1e-7, 1e-6
QUESTIONS, ANSWERS = ["Where does Mara live?", "Why?"], ["In Velholm.", "Copper."]


@pytest.fixture(scope="module")
def deep_base(tmp_path_factory) -> str:
    """One with three layers."""
    from conftest import SHAPE

    with pytest.MonkeyPatch.context() as patched:
        patched.setitem(SHAPE, "num_hidden_layers", 3)
        return build_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def documents(texts) -> list[str]:
    return [*texts[:3], "Oh"]


@pytest.fixture(scope="module")
def models(deep_base):
    made = {}

    def model_of(name: str):
        if name not in made:
            made[name] = build_clara(deep_base, compression_rate=4, lora_dropout=0.0, **VARIANTS[name]).double()
        return made[name]

    return model_of


def slow_memories(model, adapter: str, text: str, is_question: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Memory `[l, H]` of a text, and mean text state minus mean memory before scaling, as the docstrings say them."""
    config, tokenizer = model.config, model.processor.tokenizer
    framed = f"<ENC>{tokenizer.bos_token}{text}{tokenizer.eos_token}"
    embeddings = model.get_input_embeddings()(torch.tensor(tokenizer.encode(framed, add_special_tokens=False)))
    count, length = config.num_memory_tokens, len(embeddings)
    if config.readout == "memory_tokens":
        embeddings = torch.cat([embeddings, model.memory_embeddings.weight])
    with use_adapter(model.decoder, adapter):
        every = model.decoder(inputs_embeds=embeddings.unsqueeze(0), output_hidden_states=True).hidden_states
    layers = 3 if config.compressor_layers is None else config.compressor_layers
    states = list(every[layers][0])
    if layers < 3:
        states = [state / state.square().mean().sqrt() for state in states]
    text_states, memories = states[:length], states[length:]
    if config.readout == "mean_pool":
        for j in range(count):
            first = j * length // count
            segment = text_states[first : max((j + 1) * length // count, first + 1)]
            segment = text_states if is_question else segment
            memories.append(sum(segment) / len(segment))
    gap = sum(text_states) / length - sum(memories) / count
    if config.memory_scale is not None:
        memories = [memory * config.memory_scale / memory.square().mean().sqrt() for memory in memories]
    return torch.stack(memories), gap


def slow_loss(model, question: str, selected: torch.Tensor, answer: str) -> torch.Tensor:
    """Sum of token losses of an answer from memories `[k, l, H]`."""
    processor = model.processor
    prompt = processor.tokenize([processor.answer_prompt(question, len(selected))])[0]
    target = processor.tokenize([answer + processor.tokenizer.eos_token])[0]
    vectors = iter(selected.flatten(0, 1))
    table = model.get_input_embeddings().weight
    rows = [next(vectors) if token in processor.memory_ids else table[token] for token in prompt + target]
    with use_adapter(model.decoder, GENERATOR):
        logits = model.decoder(inputs_embeds=torch.stack(rows).unsqueeze(0)).logits[0, len(prompt) - 1 : -1]
    return F.cross_entropy(logits, torch.tensor(target), reduction="sum")


def gradients(model, loss) -> dict[str, torch.Tensor]:
    loss.backward()
    found = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def assert_same(found: dict, expected: dict) -> None:
    """Gradients that stand in one of the two alone are 0."""
    largest = max(value.abs().max() for value in expected.values())
    assert largest > 1e-5
    for name in {*found, *expected}:
        one, other = found.get(name), expected.get(name)
        difference = (one if other is None else other) if one is None or other is None else one - other
        assert difference.abs().max() < GRADIENT_TOLERANCE * max(largest, 1), name


@pytest.mark.parametrize("name", VARIANTS)
def test_memories_and_their_gradients_equal_those_of_one_text_at_a_time(name, models, documents, monkeypatch):
    """In a padded batch, which is packed; packed with activation checkpoints; and as it is, as on a GPU."""
    model = models(name)
    model.requires_grad_(True)
    weights = torch.randn(len(documents), 8, 32, dtype=torch.float64)
    expected = torch.stack([slow_memories(model, QUERY_REASONER, text)[0] for text in documents])
    slow = gradients(model, (expected * weights).sum())
    batch = model.processor.pad_encodings(model.processor.encode_documents(documents))
    assert not batch["attention_mask"].all()
    for road in ("packed", "checkpointed", "padded"):
        if road == "padded":
            monkeypatch.setattr("modeling_clara.modeling_clara.can_pack", lambda *args, **options: False)
        if road == "checkpointed":
            model.train()
            model.activation_checkpointing_enable({"use_reentrant": False})
        found = model.encode(QUERY_REASONER, batch["input_ids"], batch["attention_mask"], with_gap=False)[0]
        assert (found - expected).abs().max() < STATE_TOLERANCE, road
        assert_same(gradients(model, (found * weights).sum()), slow)
        model.activation_checkpointing_disable()
        model.eval()
    model.requires_grad_(False)
    expected = torch.stack([slow_memories(model, QUERY_REASONER, text, is_question=True)[0] for text in documents])
    assert (model.encode_questions(documents, batch_size=3) - expected).abs().max() < STATE_TOLERANCE


@pytest.mark.parametrize("name", VARIANTS)
def test_a_step_of_scp_equals_its_sums_written_out(name, models, documents):
    model = models(name)
    model.train_only(COMPRESSOR, GENERATOR, MEMORY_EMBEDDINGS)
    total = count = 0
    gaps = []
    for question, answer, given in zip(QUESTIONS, ANSWERS, (documents[:2], documents[2:]), strict=True):
        found = [slow_memories(model, COMPRESSOR, text) for text in given]
        gaps += [gap.square().mean() for _, gap in found]
        total = total + slow_loss(model, question, torch.stack([memory for memory, _ in found]), answer)
        count += len(model.processor.tokenize([answer + "</s>"])[0])
    has_gap = model.config.readout == "memory_tokens"
    mse = sum(gaps) / len(gaps)
    slow = gradients(model, total / count + (0.1 * mse if has_gap else 0))
    batch = model.processor(QUESTIONS, [documents[:2], documents[2:]], ANSWERS)
    output = model(**{key: value for key, value in batch.items() if not key.startswith("query_")})
    assert output.ce_loss.item() == pytest.approx((total / count).item(), abs=STATE_TOLERANCE)
    if has_gap:
        assert output.mse_loss.item() == pytest.approx(mse.item(), rel=1e-6)
    else:
        # Segments of unequal lengths weigh the same: the term is not 0 to the last digit, but has nothing to teach.
        assert output.mse_loss is None and output.loss is output.ce_loss
    assert_same(gradients(model, output.loss), slow)
    model.requires_grad_(False)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_joint_step_reaches_the_query_reasoner_through_the_scores(name, models, documents, monkeypatch):
    model = models(name)
    monkeypatch.setattr(model.config, "temperature", 0.3)
    model.train_only(QUERY_REASONER, GENERATOR)
    memories = torch.stack([slow_memories(model, COMPRESSOR, text)[0] for text in documents]).detach()
    query = slow_memories(model, QUERY_REASONER, QUESTIONS[0], is_question=True)[0]
    scores = F.cosine_similarity(query.flatten().unsqueeze(0), memories.flatten(1))
    left, slots = torch.ones(4, dtype=torch.bool), []
    for _ in range(2):
        soft = (scores / 0.3).masked_fill(~left, float("-inf")).softmax(dim=-1)
        best = int(soft.argmax())
        hard = F.one_hot(torch.tensor(best), 4).double()
        slots.append(torch.einsum("n,nlh->lh", hard + soft - soft.detach(), memories))
        left[best] = False
    count = len(model.processor.tokenize([ANSWERS[0] + "</s>"])[0])
    loss = slow_loss(model, QUESTIONS[0], torch.stack(slots), ANSWERS[0]) / count
    slow = gradients(model, loss)
    output = model(**model.processor(QUESTIONS[:1], [documents], ANSWERS[:1]))
    assert (output.scores[0] - scores).abs().max() < STATE_TOLERANCE and output.loss.item() == pytest.approx(
        loss.item(), abs=STATE_TOLERANCE
    )
    found = gradients(model, output.loss)
    assert_same(found, slow)
    reached = any(".query_reasoner." in key and value.abs().max() > 1e-12 for key, value in found.items())
    assert reached == (model.config.compressor_layers != 0)
    model.requires_grad_(False)


def test_segments_are_as_equal_as_can_be_and_whole():
    for length in range(1, 14):
        states, mask = torch.arange(16.0).view(1, 16, 1), torch.zeros(1, 16)
        mask[0, 16 - length :] = 1
        bounds = [j * length // 5 for j in range(6)]
        segments = [range(a, max(b, a + 1)) for a, b in zip(bounds, bounds[1:], strict=False)]
        expected = [sum(16 - length + place for place in segment) / len(segment) for segment in segments]
        assert segment_means(states, mask, 5)[0, :, 0].tolist() == pytest.approx(expected)
        if length >= 5:
            assert sum(map(len, segments)) == length and max(map(len, segments)) - min(map(len, segments)) <= 1
    low = torch.full((1, 9, 2), 3.1, dtype=torch.bfloat16)
    assert torch.equal(segment_means(low, torch.ones(1, 9), 2), low[:, :2])


def test_default_values_change_nothing(untouched_clara):
    """Neither what a memory is nor the digest that stores know the compressor by."""
    model = copy.deepcopy(untouched_clara)
    usual = model.compressor_fingerprint()
    model.config.compressor_layers = 2  # all of them
    assert model.compressor_fingerprint() == usual
    assert untouched_clara.processor.pad_encodings([[5, 6]])["input_ids"][0].tolist() == [
        5,
        6,
        *untouched_clara.config.memory_token_ids,
    ]


def test_every_field_changes_the_fingerprint(untouched_clara):
    model = copy.deepcopy(untouched_clara)
    digests = [model.compressor_fingerprint()]
    for fields in ({"memory_scale": 0.5}, {"memory_scale": 0.6}, {"compressor_layers": 1}, {"readout": "mean_pool"}):
        for name, value in fields.items():
            setattr(model.config, name, value)
        digests.append(model.compressor_fingerprint())
    assert len(set(digests)) == len(digests)


def test_the_scale_of_the_embeddings_is_measured_once_and_stored(deep_base, models, documents):
    model = models("early_scaled")
    known = model.get_input_embeddings().weight[: min(model.config.added_token_ids)]
    expected = sum(float(row.square().mean().sqrt()) for row in known) / len(known)
    assert model.config.memory_scale == pytest.approx(expected, rel=1e-6)
    sizes = model.compress(documents).square().mean(dim=-1).sqrt()
    assert torch.allclose(sizes, torch.full_like(sizes, expected))
    assert json.loads(model.config.to_json_string())["memory_scale"] == model.config.memory_scale


@pytest.mark.parametrize("form", ["full", "adapter"])
@pytest.mark.parametrize("name", ["pooled_early", "pooled_embeddings", "early_scaled"])
def test_a_checkpoint_keeps_what_makes_its_memories(name, form, models, documents, tmp_path):
    model = copy.deepcopy(models(name)).float()
    model.config.checkpoint_format = form
    model.save_pretrained(tmp_path / "model")
    loaded = CLaRaForRetrievalGeneration.from_pretrained(tmp_path / "model")
    fields = ("readout", "compressor_layers", "memory_scale")
    assert [getattr(loaded.config, one) for one in fields] == [getattr(model.config, one) for one in fields]
    assert torch.equal(loaded.compress(documents), model.compress(documents))
    assert loaded.compressor_fingerprint() == model.compressor_fingerprint()
    found = loaded.generate(QUESTIONS, [documents[:3], documents], max_new_tokens=3)
    assert found.texts == model.generate(QUESTIONS, [documents[:3], documents], max_new_tokens=3).texts


@pytest.mark.parametrize("name", ["pooled_early", "early_scaled"])
def test_a_store_holds_such_memories_and_those_of_another_compressor_are_refused(name, models, documents, tmp_path):
    model = copy.deepcopy(models(name)).float()
    store = MemoryStore.open(tmp_path / "memories", model, dtype="float32")
    keys = store.add(documents)
    assert torch.equal(store.get(keys), model.compress(documents))
    assert model.retrieve(QUESTIONS, store, n_docs=2).keys[0][0] in keys
    model.config.memory_scale = 0.3
    with pytest.raises(ValueError, match="another compressor|made by compressor"):
        MemoryStore.open(tmp_path / "memories", model)
    assert Maker.of(model) != store.maker


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("name", ["pooled_early", "early_scaled"])
def test_every_stage_trains_what_takes_part(stage, name, deep_base, tmp_path):
    """And nothing else: not the memory embeddings where texts are pooled, no adapter in a layer that does not run."""
    model = build_clara(deep_base, compression_rate=4, lora_dropout=0.0, **VARIANTS[name])
    before = snapshot(model)
    options = {"max_steps": 2, "gradient_checkpointing": stage == "scp"}
    trainer = make_trainer(stage, deep_base, tmp_path, model, **options)
    idle = [key for key, value in model.named_parameters() if value.requires_grad and ".layers.2." in key]
    assert not [key for key in idle if ".generator." not in key]
    trainer.train()
    row = next(row for row in trainer.state.log_history if "loss" in row)
    assert row["loss"] > 0 and ("mse_loss" in row) == (name == "early_scaled" and stage in ("scp", "instruct"))
    changed = {part_of(key) for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {*STAGES[stage][3]} - ({"memory_embeddings"} if name == "pooled_early" else set())


def test_the_generator_alone_learns_to_read_token_embeddings(deep_base, tmp_path):
    fields = {"query_reasoner": False, **VARIANTS["pooled_embeddings"]}
    model = build_clara(deep_base, compression_rate=4, lora_dropout=0.0, **fields)
    before = snapshot(model)
    for stage in ("scp", "joint"):
        make_trainer(stage, deep_base, tmp_path / stage, model, max_steps=2).train()
    after = model.state_dict()
    changed = {part_of(key) for key, value in before.items() if not torch.equal(value, after[key])}
    assert changed == {"generator"}
    with pytest.raises(ValueError, match="compressor_layers is 0.*query_reasoner.*nothing to train"):
        make_trainer("contrastive", deep_base, tmp_path / "contrastive", model)


@pytest.mark.parametrize("architecture", ["mistral", "qwen3", "phi3", "gemma2", "gpt_oss"])
def test_the_first_layers_of_other_architectures(architecture, bases, documents):
    """Of some, states are scaled before the first layer; one goes through all layers that it has."""
    model = build_clara(bases[architecture], compression_rate=4, compressor_layers=1, readout="mean_pool")
    rows = model.processor.encode_documents(documents[:2])
    found = model.compress(documents[:2])
    for row, memory in zip(rows, found, strict=True):
        with torch.no_grad(), use_adapter(model.decoder, COMPRESSOR):
            states = model.decoder(torch.tensor([row]), output_hidden_states=True).hidden_states[1]
        states = states / states.square().mean(dim=-1, keepdim=True).sqrt()
        expected = segment_means(states, torch.ones(1, len(row)), 8)[0]
        assert (memory - expected).abs().max() < 1e-4
    assert len(model.decoder.base_model.layers) == 2


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"readout": "attention"}, "readout must be one of .*'memory_tokens', 'mean_pool'.*, got 'attention'"),
        ({"compressor_layers": -1}, "compressor_layers must be a whole number from 0.*, got -1"),
        ({"compressor_layers": True}, "compressor_layers must be a whole number from 0.*, got True"),
        ({"compressor_layers": 0}, "compressor_layers is 0.*set readout to 'mean_pool'"),
        ({"memory_scale": 0}, "memory_scale must be positive, 'embeddings' or None, got 0"),
        ({"memory_scale": "large"}, "memory_scale must be positive, 'embeddings' or None, got 'large'"),
        ({"memory_scale": float("nan")}, "memory_scale must be positive, .*got nan"),
    ],
)
def test_values_out_of_range_are_named(fields, message):
    with pytest.raises(ValueError, match=message):
        CLaRaConfig(**fields)


def test_more_layers_than_the_decoder_has_are_refused_and_a_scale_is_not_measured_twice(deep_base, models, tmp_path):
    with pytest.raises(ValueError, match="compressor_layers must be a whole number from 0 to 3.*, got 4"):
        CLaRaForRetrievalGeneration.from_base(deep_base, compressor_layers=4)
    models("pooled").save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="memory_scale='embeddings'.*from_base.*give .* a number"):
        CLaRaForRetrievalGeneration.from_pretrained(tmp_path / "model", memory_scale="embeddings")
    with pytest.raises(ValueError, match="compressor_layers must be a whole number from 0 to 3.*, got 9"):
        CLaRaForRetrievalGeneration.from_pretrained(tmp_path / "model", compressor_layers=9)


@pytest.mark.parametrize("stage", ["scp", "joint"])
def test_a_weight_for_a_term_that_is_not_there_is_refused(stage, deep_base, tmp_path):
    model = build_clara(deep_base, compression_rate=4, readout="mean_pool")
    options = {"online": True, "train_compressor": True} if stage == "joint" else {}
    with pytest.raises(ValueError, match="mse_weight is 0.1.*'mean_pool'.*set it to 0"):
        make_trainer(stage, deep_base, tmp_path, model, mse_weight=0.1, **options)
    make_trainer(stage, deep_base, tmp_path, model, mse_weight=0.0, **options)


@pytest.mark.parametrize(
    "fields",
    [{"readout": "mean_pool"}, {"compressor_layers": 1}, {"memory_projection": True}, {"memory_scale": 0.5}],
)
def test_the_published_layout_has_no_such_memories(fields, bases, tmp_path):
    model = build_clara(bases["mistral"], **fields)
    model.save_pretrained(tmp_path / "ours")
    name, value = next(iter(fields.items()))
    with pytest.raises(ValueError, match=f"{name} is {value!r}"):
        to_original(str(tmp_path / "ours"), str(tmp_path / "theirs"))
    assert not (tmp_path / "theirs").exists()
