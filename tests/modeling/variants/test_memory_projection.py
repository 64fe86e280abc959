"""The linear map from states to memories: what it computes, how it is fitted, and that it stays as it was fitted."""

import copy

import pytest
import torch
from conftest import build_clara
from test_trainers import make_trainer

from clara_hf.original.export import to_original
from modeling_clara import CLaRaConfig, CLaRaForRetrievalGeneration
from modeling_clara.adapters_clara import COMPRESSOR


FIELDS = {"readout": "mean_pool", "compressor_layers": 1, "memory_scale": 0.3, "compression_rate": 4}


@pytest.fixture(scope="module")
def long_texts() -> list[str]:
    """With more tokens than a state has values."""
    return [f"Mara {number} sold copper {number * 7} in Velholm to {number + 1} bakers" for number in range(12)]


@pytest.fixture(scope="module")
def projected(base):
    return build_clara(base, memory_projection=True, lora_dropout=0.0, **FIELDS)


def states_and_embeddings(model, texts) -> tuple[torch.Tensor, torch.Tensor]:
    """One text at a time, float64."""
    plain, tokens = copy.deepcopy(model), []
    plain.config.memory_projection = False
    for ids in model.processor.encode_documents(texts):
        embeddings = model.get_input_embeddings()(torch.tensor([ids]))
        with torch.no_grad():
            states = plain._hidden_states(COMPRESSOR, embeddings, torch.ones(1, len(ids)))
        tokens.append((states[0].double(), embeddings[0].detach().double()))
    return tuple(torch.cat(rows) for rows in zip(*tokens, strict=True))


def test_memories_are_means_of_mapped_states_and_gradients_pass_through_the_map(projected, texts):
    model = copy.deepcopy(projected).double()
    torch.nn.init.normal_(model.memory_projection.weight)
    plain = copy.deepcopy(model)
    plain.config.memory_projection, plain.config.memory_scale = False, None
    for one in (model, plain):
        one.train_only(COMPRESSOR)
    batch = model.processor.pad_encodings(model.processor.encode_documents(texts))
    found = model.encode(COMPRESSOR, batch["input_ids"], batch["attention_mask"])[0]
    mapped = plain.encode(COMPRESSOR, batch["input_ids"], batch["attention_mask"])[0] @ model.memory_projection.weight.T
    expected = 0.3 * mapped / mapped.square().mean(dim=-1, keepdim=True).sqrt()
    assert torch.allclose(found, expected, atol=1e-9)
    for memories in (found, expected):
        (memories * torch.arange(memories.numel()).view_as(memories).cos()).sum().backward()
    pairs = list(zip(model.part_parameters(COMPRESSOR), plain.part_parameters(COMPRESSOR), strict=True))
    assert all(torch.allclose(one.grad, other.grad, atol=1e-9) for one, other in pairs)
    assert any(one.grad.abs().max() > 0 for one, _ in pairs) and model.memory_projection.weight.grad is None


def test_the_map_is_the_least_squares_one_and_brings_states_to_their_tokens(projected, long_texts):
    model = copy.deepcopy(projected)
    digest = model.compressor_fingerprint()
    states, embeddings = states_and_embeddings(model, long_texts)
    share = model.fit_memory_projection(long_texts, batch_size=5)
    ridge = 0.005 * states.square().sum(dim=0).mean()
    stacked = torch.cat([states, ridge.sqrt() * torch.eye(states.shape[1])])
    targets = torch.cat([embeddings, torch.zeros(states.shape[1], embeddings.shape[1])])
    expected = torch.linalg.lstsq(stacked, targets).solution
    assert torch.allclose(model.memory_projection.weight.T.double(), expected, atol=1e-5)
    left = (states @ expected - embeddings).square().sum() / embeddings.square().sum()
    assert share == pytest.approx(1 - float(left), abs=1e-5) and share > 0.4
    assert model.compressor_fingerprint() != digest


def test_what_cannot_be_fitted_is_said(projected, untouched_clara, texts):
    with pytest.raises(ValueError, match="no memory_projection to fit"):
        untouched_clara.fit_memory_projection(texts)
    before = projected.memory_projection.weight.clone()
    with pytest.raises(ValueError, match=r"texts have \d+ tokens, but a state has \d+ values"):
        projected.fit_memory_projection(["a"])
    assert torch.equal(projected.memory_projection.weight, before)
    with pytest.raises(ValueError, match="memory_projection must be"):
        CLaRaConfig(memory_projection="yes")


@pytest.mark.parametrize("form", ["full", "adapter"])
def test_a_checkpoint_keeps_the_map(form, projected, long_texts, tmp_path):
    model = copy.deepcopy(projected)
    model.config.checkpoint_format = form
    model.fit_memory_projection(long_texts)
    model.save_pretrained(tmp_path / "model")
    loaded = CLaRaForRetrievalGeneration.from_pretrained(tmp_path / "model")
    assert torch.equal(loaded.memory_projection.weight, model.memory_projection.weight)
    assert torch.equal(loaded.compress(long_texts), model.compress(long_texts))
    with pytest.raises(ValueError, match="memory_projection is True|readout is 'mean_pool'"):
        to_original(str(tmp_path / "model"), str(tmp_path / "theirs"))


def test_the_first_stage_fits_it_once_and_none_trains_it(base, projected, tmp_path):
    model = copy.deepcopy(projected)
    trainer = make_trainer("scp", base, tmp_path / "scp", model, max_steps=1)
    fitted = model.memory_projection.weight.clone()
    assert not torch.equal(fitted, projected.memory_projection.weight)
    trainer.train()
    for stage in ("instruct", "joint"):
        make_trainer(stage, base, tmp_path / stage, model, max_steps=1).train()
    assert torch.equal(model.memory_projection.weight, fitted)
