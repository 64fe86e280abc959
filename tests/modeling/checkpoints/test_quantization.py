"""QLoRA over a base in 4 or 8 bits, and the precision of what trains."""

import copy
import json
import shutil
import sys
from pathlib import Path

import conftest
import pytest
import torch
from conftest import TEXTS, build_base, build_clara
from test_trainers import make_trainer, part_of, snapshot
from transformers import AutoModel, BitsAndBytesConfig, EetqConfig, QuantoConfig, TorchAoConfig

from clara_hf.program import UsageError
from clara_hf.program.models import CLaRaModelArguments, load_model
from modeling_clara import CLaRaForRetrievalGeneration
from modeling_clara.adapters_clara import lora_layers
from modeling_clara.quantization_clara import base_only, quantize_base


BITS = (4, 8)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> str:
    """A base whose widths are multiples of 64, the block of weights with a scale of its own."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}.items():
            patch.setitem(conftest.SHAPE, name, value)
        return build_base(tmp_path_factory.mktemp("wide"))


@pytest.fixture
def checkpoint(base, tmp_path) -> str:
    model = build_clara(base, query_reasoner=False, lora_dropout=0.0, checkpoint_format="adapter")
    model.save_pretrained(tmp_path / "start")
    return str(tmp_path / "start")


def load(checkpoint: str, bits: int) -> CLaRaForRetrievalGeneration:
    pytest.importorskip("bitsandbytes", reason='QLoRA needs bitsandbytes: pip install "clara-hf[quantization]"')
    return load_model(CLaRaModelArguments(checkpoint, **{f"load_in_{bits}bit": True}))


@pytest.mark.parametrize("bits", BITS)
def test_quantized_base_is_smaller_and_makes_like_memories(bits, checkpoint):
    full, quantized = CLaRaForRetrievalGeneration.from_pretrained(checkpoint), load(checkpoint, bits)
    for before, after in zip(lora_layers(full.decoder), lora_layers(quantized.decoder), strict=True):
        values = before.base_layer.weight.numel()
        assert after.base_layer.weight.nbytes == values * bits // 8
        assert after.lora_A["compressor"].weight.dtype == torch.float32
    distance = torch.cosine_similarity(full.compress(TEXTS).flatten(1), quantized.compress(TEXTS).flatten(1)).min()
    assert distance > (0.9 if bits == 4 else 0.999)


def quantizer(method: str):
    if method.startswith("bitsandbytes"):
        pytest.importorskip("bitsandbytes", reason='QLoRA needs bitsandbytes: pip install "clara-hf[quantization]"')
        return BitsAndBytesConfig(bnb_4bit_quant_type="nf4", **{f"load_in_{method[-1]}bit": True})
    if method == "torchao":
        return TorchAoConfig(pytest.importorskip("torchao.quantization").Int8WeightOnlyConfig())
    pytest.importorskip("optimum.quanto")
    return QuantoConfig(weights="int8")


@pytest.mark.parametrize("checkpoint_format", ["full", "adapter"])
@pytest.mark.parametrize("method", ["bitsandbytes-4", "bitsandbytes-8", "torchao", "quanto"])
def test_quantization_config_quantizes_the_base_alone(method, checkpoint_format, checkpoint, tmp_path):
    whole = CLaRaForRetrievalGeneration.from_pretrained(checkpoint)
    whole.config.checkpoint_format = checkpoint_format
    whole.save_pretrained(tmp_path / "saved")
    given = quantizer(method)
    loaded = AutoModel.from_pretrained(tmp_path / "saved", quantization_config=given, trust_remote_code=False)
    own = {name for name, _ in whole.named_parameters() if "base_layer" not in name}
    parameters = dict(loaded.named_parameters())
    assert own and all(torch.equal(parameters[name], dict(whole.named_parameters())[name]) for name in own)
    assert {type(layer.base_layer.weight) for layer in lora_layers(loaded.decoder)} != {torch.nn.Parameter}
    cosine = torch.cosine_similarity(whole.compress(TEXTS).flatten(1), loaded.compress(TEXTS).flatten(1)).min()
    assert cosine > (0.9 if method.endswith("4") else 0.999)
    assert loaded.generate(["Who keeps bees?"], memories=loaded.compress(TEXTS[:1])).texts
    assert loaded.compressor_fingerprint() != whole.compressor_fingerprint()
    # What is saved is whole again: the base is not in it, nor is how it was quantized.
    loaded.config.checkpoint_format = "adapter"
    loaded.save_pretrained(tmp_path / "again")
    again = CLaRaForRetrievalGeneration.from_pretrained(tmp_path / "again")
    assert torch.equal(again.compress(TEXTS), whole.compress(TEXTS))


def test_new_model_over_a_quantized_base(base):
    given = quantizer("bitsandbytes-4")
    model = CLaRaForRetrievalGeneration.from_base(base, quantization_config=given.to_dict(), doc_max_length=32)
    assert model.decoder.model.layers[0].mlp.up_proj.base_layer.weight.dtype == torch.uint8
    with pytest.raises(ValueError, match="checkpoint_format"):
        model.save_pretrained(base + "-unsaved")
    assert not Path(base + "-unsaved").exists()


def test_quantizer_that_leaves_nothing_out_and_quantized_base_are_refused(checkpoint, base, tmp_path):
    class EveryLayer(EetqConfig):
        def post_init(self):
            del self.modules_to_not_convert

    config = CLaRaForRetrievalGeneration.from_pretrained(checkpoint).config
    with pytest.raises(ValueError, match="EveryLayer"):
        base_only(EveryLayer(), config)
    for value in ("4bit", 4, ["load_in_4bit"]):
        with pytest.raises(ValueError, match="quantization_config is .*BitsAndBytesConfig"):
            base_only(value, config)
    shutil.copytree(base, tmp_path / "packed")
    values = json.loads((tmp_path / "packed/config.json").read_text())
    values["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (tmp_path / "packed/config.json").write_text(json.dumps(values))
    with pytest.raises(ValueError, match="bitsandbytes.*quantization_config="):
        CLaRaForRetrievalGeneration.from_base(tmp_path / "packed")


@pytest.mark.parametrize("bits", BITS)
def test_store_tells_a_quantized_base_apart_and_reading_does_not_change_it(bits, checkpoint):
    quantized = load(checkpoint, bits)
    before = quantized.compressor_fingerprint()
    quantized.compress(TEXTS)
    assert quantized.compressor_fingerprint() == before == load(checkpoint, bits).compressor_fingerprint()
    assert before != CLaRaForRetrievalGeneration.from_pretrained(checkpoint).compressor_fingerprint()


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("stage", ["scp", "joint"])
def test_training_changes_only_the_adapters_and_saves_them_alone(bits, stage, checkpoint, base, tmp_path):
    model = load(checkpoint, bits)
    if stage == "joint":
        model.add_query_reasoner()
    before = snapshot(model)
    trainer = make_trainer(stage, base, tmp_path / "run", model, max_steps=25, lr_scheduler_type="constant")
    trainer.train()
    losses = [row["loss"] for row in trainer.state.log_history if "loss" in row]
    assert sum(losses[-3:]) < 0.9 * sum(losses[:3])
    changed = {part_of(key) for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    parts = {"scp": {"compressor", "generator", "memory_embeddings"}, "joint": {"query_reasoner", "generator"}}
    assert changed == parts[stage]
    trainer.save_model(str(tmp_path / "final"))
    loaded = CLaRaForRetrievalGeneration.from_pretrained(tmp_path / "final")
    own, expected = loaded.adapter_state_dict(), model.adapter_state_dict()
    assert own.keys() == expected.keys() and all(torch.equal(own[key], expected[key]) for key in own)


def test_quantized_base_that_would_be_saved_or_divided_is_refused(checkpoint, monkeypatch):
    model = CLaRaForRetrievalGeneration.from_pretrained(checkpoint, checkpoint_format="full")
    with pytest.raises(ValueError, match="checkpoint_format"):
        quantize_base(model, 4)
    with pytest.raises(ValueError, match="bits"):
        quantize_base(model, 3)
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="FSDP cannot divide a quantized base: use DDP"):
        load_model(CLaRaModelArguments(checkpoint, load_in_4bit=True))
    with pytest.raises(UsageError, match="choose one"):
        CLaRaModelArguments(checkpoint, load_in_4bit=True, load_in_8bit=True)


def test_missing_bitsandbytes_is_named_with_its_extra(checkpoint, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(ImportError, match=r"clara-hf\[quantization\]"):
        load_model(CLaRaModelArguments(checkpoint, load_in_4bit=True))


@pytest.mark.parametrize("stage", ["scp", "joint"])
def test_what_trains_over_a_half_precision_base_is_float32(stage, base, tmp_path):
    model = build_clara(base, lora_dropout=0.0).to(torch.bfloat16)
    before = copy.deepcopy(model.state_dict())
    # Steps of this size are lost in bfloat16: an adapter's weights are thousands of times larger.
    trainer = make_trainer(stage, base, tmp_path, model, max_steps=3, learning_rate=5e-6, bf16=True)
    trainer.train()
    for name, parameter in model.named_parameters():
        assert parameter.dtype == (torch.float32 if parameter.requires_grad else torch.bfloat16), name
        if parameter.requires_grad:
            assert not torch.equal(parameter, before[name].float()), name
    assert model.dtype == torch.bfloat16
