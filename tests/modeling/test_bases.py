"""Bases of many families, mixtures of experts among them: a new model computes what its base computes."""

from functools import partial

import pytest
import torch
from conftest import ARCHITECTURES, TEXTS, build_clara
from peft.tuners.lora import ParamWrapper
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM

from modeling_clara import CLaRaForRetrievalGeneration
from modeling_clara.adapters_clara import lora_layers
from modeling_clara.decoding_clara import can_pack, run_packed


MIXTURES = ("mixtral", "qwen3_moe", "olmoe")
IDS = torch.arange(5, 53).view(3, 16)
# Bases whose attention is SDPA over all that comes before: texts of a batch run without padding.
UNPADDED = ("mistral", "llama", "qwen3", "phi3", "gemma", "qwen2", "smollm3", "mixtral", "qwen3_moe", "olmoe")


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_new_model_has_the_logits_of_its_base(architecture, bases):
    base = AutoModelForCausalLM.from_pretrained(bases[architecture]).eval()
    model = CLaRaForRetrievalGeneration.from_base(bases[architecture], doc_max_length=32, compression_rate=8)
    with torch.no_grad():
        expected, found = base(IDS).logits, model.decoder(IDS).logits
    assert torch.equal(found[..., : expected.shape[-1]], expected) and expected.abs().max() > 0.05


@pytest.mark.parametrize("checkpoint_format", ["full", "adapter"])
@pytest.mark.parametrize("architecture", [*MIXTURES, "gpt_oss"])
def test_checkpoint_over_a_mixture_comes_back_exactly(architecture, checkpoint_format, bases, tmp_path):
    model = build_clara(bases[architecture], checkpoint_format=checkpoint_format)
    model.save_pretrained(tmp_path)
    loaded = CLaRaForRetrievalGeneration.from_pretrained(tmp_path)
    assert torch.equal(loaded.compress(TEXTS), model.compress(TEXTS))
    assert torch.equal(loaded.encode_questions(TEXTS), model.encode_questions(TEXTS))


@pytest.mark.parametrize("architecture", MIXTURES)
def test_fused_experts_carry_no_adapter_and_naming_them_is_refused(architecture, bases):
    model = CLaRaForRetrievalGeneration.from_base(bases[architecture], doc_max_length=32, compression_rate=8)
    assert len(list(lora_layers(model.decoder))) >= 8
    assert not any(isinstance(layer, ParamWrapper) for layer in lora_layers(model.decoder))
    targets = ["q_proj", "w1", "w2", "w3"] if architecture == "mixtral" else ["gate_proj", "up_proj", "down_proj"]
    with pytest.raises(ValueError, match="lora_target_modules=.*experts.*all-linear"):
        CLaRaForRetrievalGeneration.from_base(bases[architecture], lora_target_modules=targets)


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "mixtral"])
@pytest.mark.parametrize(
    ("targets", "reached"),
    [
        (["q_proj", "lm_head"], "lm_head"),
        (".*lm_head|.*q_proj", "lm_head"),
        (["embed_tokens"], "embed_tokens"),
        (["nothing"], "nothing"),
        (["q_proj", "norm"], "RMSNorm"),
        ("[", "regular expression"),
        ("", ""),
    ],
    ids=str,
)
def test_layers_that_carry_no_adapter_are_refused_in_one_sentence(targets, reached, architecture, bases):
    with pytest.raises(ValueError, match=reached) as told:
        CLaRaForRetrievalGeneration.from_base(bases[architecture], lora_target_modules=targets)
    assert str(told.value).startswith(f"lora_target_modules={targets!r}") and "\n" not in str(told.value)


def test_base_whose_weights_are_not_all_there_is_refused(bases, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(bases["mixtral"])
    state = base.state_dict()
    lost = "model.layers.1.mlp.experts.down_proj"
    del state[lost]
    base.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match=f"{tmp_path}.*missing"):
        CLaRaForRetrievalGeneration.from_base(tmp_path)


def step(model, batch: dict) -> dict[str, torch.Tensor]:
    """Outputs and gradients of a step in which all three adapters and the memory embeddings train."""
    model.train_only(*model.adapter_names, "memory_embeddings")
    model.zero_grad()
    output = model(**batch)
    output.loss.backward()
    found = {name: getattr(output, name).detach() for name in ("loss", "mse_loss", "scores", "memories")}
    gradients = {key: value.grad for key, value in model.named_parameters() if value.grad is not None}
    assert len(gradients) > 20
    return found | gradients


@pytest.mark.parametrize("mode", ["evaluation", "training", "checkpointing"])
@pytest.mark.parametrize("architecture", UNPADDED)
def test_texts_without_padding_give_what_padded_ones_give_gradients_included(architecture, mode, bases, monkeypatch):
    model = build_clara(bases[architecture], lora_dropout=0.0)
    tolerance = {"rtol": 1e-3, "atol": 1e-5}
    if architecture not in MIXTURES:  # experts' products are made in float32 at most
        model, tolerance = model.double(), {"rtol": 1e-9, "atol": 1e-11}
        monkeypatch.setattr(torch, "float32", torch.float64)  # in which norms compute, whatever comes in
        monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    batch = dict(
        model.processor(questions=TEXTS[2:4], documents=[TEXTS[:3], TEXTS[2:]], answers=["In Velholm", "Lanterns"])
    )
    assert not batch["document_attention_mask"].all()
    model.train(mode != "evaluation")
    if mode == "checkpointing":
        function = partial(checkpoint, use_reentrant=False)
        model._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=function)
    passes = []

    def counted(*given):
        passes.append(given[5] if len(given) > 5 else 0)
        return run_packed(*given)

    monkeypatch.setattr("modeling_clara.modeling_clara.run_packed", counted)
    found = step(model, batch) | {"compressed": model.compress(TEXTS)}
    # In evaluation prompts have the logits of padded rows; else what they begin with stands there once.
    assert [shared > 3 for shared in passes] == ([False] * 3 if mode == "evaluation" else [False, False, True, False])
    monkeypatch.setattr("modeling_clara.modeling_clara.can_pack", lambda *given, **options: False)
    expected = step(model, batch) | {"compressed": model.compress(TEXTS)}
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.allclose(found[key], value, **tolerance), key


@pytest.mark.parametrize("architecture", UNPADDED)
def test_a_last_layer_that_is_read_in_places_gives_these_and_spares_work(architecture, bases, monkeypatch):
    model = build_clara(bases[architecture])
    tolerance = {"rtol": 1e-3, "atol": 1e-5}
    if architecture not in MIXTURES:
        model, tolerance = model.double(), {"rtol": 1e-9, "atol": 1e-11}
        monkeypatch.setattr(torch, "float32", torch.float64)
        monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    mask = (torch.arange(9) >= torch.tensor([[2], [1], [0]])).long()
    places = torch.tensor([0, 3, 6, 20])  # of texts of 7, 8 and 9 tokens, the second of which is not read
    inputs = torch.randn(3, 9, model.config.hidden_size, dtype=model.dtype, requires_grad=True)
    weights = torch.randn(4, model.config.hidden_size, dtype=model.dtype)
    base = model.decoder.base_model
    states, gradients, flops = [], [], []
    for run in (
        lambda: run_packed(model.decoder, base, inputs, mask, places),
        lambda: run_packed(model.decoder, base, inputs, mask)[:, places],
    ):
        with FlopCounterMode(display=False) as counter:
            states.append(run()[0])
        flops.append(counter.get_total_flops())
        gradients.append(torch.autograd.grad((states[-1] * weights).sum(), inputs)[0])
    torch.testing.assert_close(*states, **tolerance)
    torch.testing.assert_close(*gradients, **tolerance)
    assert flops[0] < flops[1] or architecture in MIXTURES  # whose experts are not counted
    assert not any("forward" in layer.__dict__ for layer in base.layers)


@pytest.mark.parametrize(
    "architecture, change",
    [
        ("mistral", {"sliding_window": 8}),
        ("mistral", {"layer_types": ["linear_attention", "full_attention"]}),
        ("llama", {"_attn_implementation": "eager"}),
        ("gemma2", {}),
        ("gpt_oss", {}),
    ],
)
def test_texts_are_padded_where_attention_is_of_another_kind(architecture, change, bases):
    model, mask = build_clara(bases[architecture]), torch.ones(2, 12).tril(9)
    assert can_pack(model.decoder, mask) is (architecture in UNPADDED)
    assert not can_pack(model.decoder, torch.ones(2, 12))  # nothing to spare, but where only a part is read
    assert can_pack(model.decoder, torch.ones(2, 12), reads_part=True) is (architecture in UNPADDED)
    for name, value in change.items():
        setattr(model.decoder.config, name, value)
    assert not can_pack(model.decoder, mask)


class Attentions(TorchDispatchMode):
    """Counts the attentions that are computed, their gradients apart."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += "scaled_dot_product" in str(function) and "backward" not in str(function)
        return function(*args, **(kwargs or {}))


def checkpointed(model, **options) -> None:
    function = partial(checkpoint, **options)
    model._set_gradient_checkpointing(enable=True, gradient_checkpointing_func=function)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_attention_that_is_kept_is_not_computed_again_and_changes_no_gradient(architecture, packed, bases, monkeypatch):
    model = build_clara(bases[architecture], lora_dropout=0.0).double().train()
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)
    if not packed:
        monkeypatch.setattr("modeling_clara.modeling_clara.can_pack", lambda *given, **options: False)
    batch = dict(
        model.processor(questions=TEXTS[2:4], documents=[TEXTS[:3], TEXTS[2:]], answers=["In Velholm", "Lanterns"])
    )
    found, counts = [], []
    for options in (None, {"keep_attention": True}, {"keep_attention": False}):
        if options is not None:
            checkpointed(model, **options)
        with Attentions() as attentions:
            found.append(step(model, batch))
        counts.append(attentions.count)
    assert counts[0] == counts[1] < counts[2]
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        for key, value in found[0].items():
            assert torch.allclose(other[key], value, rtol=1e-9, atol=1e-11), key


def test_reentrant_checkpointing_keeps_nothing(clara):
    with pytest.raises(ValueError, match="keep_attention is True, .* use_reentrant to False"):
        checkpointed(clara, keep_attention=True, use_reentrant=True)
