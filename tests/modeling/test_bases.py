"""Bases of many families, mixtures of experts among them: a new model computes what its base computes."""

import pytest
import torch
from conftest import ARCHITECTURES, TEXTS, build_clara
from peft.tuners.lora import ParamWrapper
from transformers import AutoModelForCausalLM

from modeling_clara import CLaRaForRetrievalGeneration
from modeling_clara.adapters_clara import lora_layers


MIXTURES = ("mixtral", "qwen3_moe", "olmoe")
IDS = torch.arange(5, 53).view(3, 16)


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


def test_base_whose_weights_are_not_all_there_is_refused(bases, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(bases["mixtral"])
    state = base.state_dict()
    lost = "model.layers.1.mlp.experts.down_proj"
    del state[lost]
    base.save_pretrained(tmp_path, state_dict=state)
    with pytest.raises(ValueError, match=f"{tmp_path}.*missing"):
        CLaRaForRetrievalGeneration.from_base(tmp_path)
