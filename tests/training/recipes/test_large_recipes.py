"""The recipes for 4B to 7B bases parse, carry the paper's settings, and say what they cost."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from conftest import build_clara
from safetensors.torch import load_file
from test_trainers import make_trainer

from clara_hf.program import UsageError, parse
from clara_hf.program.cost import BASES, base_config, checkpoint_bytes, meta_model, recipe_cost, report
from clara_hf.program.models import CLaRaModelArguments
from clara_hf.program.training import DataArguments
from modeling_clara import CLaRaConfig
from trainers import InstructionConfig, JointConfig, SCPConfig


ROOT = Path(__file__).resolve().parents[3]
MODELS = ("mistral-7b", "qwen3-4b", "phi4-mini")
STAGES = {"scp": (SCPConfig, 128, 1e-4), "instruct": (InstructionConfig, 128, 1e-4), "joint": (JointConfig, 32, 5e-6)}


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("model", MODELS)
def test_recipe_parses_and_has_the_paper_s_settings(model, stage):
    config_class, batch, learning_rate = STAGES[stage]
    path = ROOT / "recipes" / model / f"{stage}.yaml"
    types = (DataArguments, config_class, CLaRaModelArguments)
    # What needs a GPU is refused where there is none.
    data, training, own = parse(types, ["--config", str(path), "--use_cpu", "true"])
    assert training.per_device_train_batch_size * training.gradient_accumulation_steps * 8 == batch
    assert (training.learning_rate, training.num_train_epochs) == (learning_rate, 1)
    assert (training.lr_scheduler_type, training.warmup_steps, training.max_grad_norm) == ("cosine", 0.03, 1.0)
    assert training.optim == "adamw_torch" and training.bf16 and training.gradient_checkpointing
    assert data.validation_file and training.output_dir == f"runs/{model}-{stage}"
    if stage == "scp":
        assert own.model_name_or_path in BASES
        config = CLaRaConfig(**own.clara_config)
        assert (config.lora_r, config.lora_alpha, config.lora_dropout) == (16, 32, 0.1)
        assert config.lora_target_modules == "all-linear"
        assert (config.doc_max_length, config.top_k, config.temperature, config.mse_weight) == (256, 5, 0.02, 0.1)
    else:
        assert own.model_name_or_path == f"runs/{model}-scp"
    if stage == "joint":
        assert (training.top_k, training.temperature) == (5, 0.02)


@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("model", MODELS)
def test_comment_of_a_recipe_is_what_the_script_computes(model, stage):
    path = ROOT / "recipes" / model / f"{stage}.yaml"
    text = path.read_text()
    for line in report(path):
        assert f"#   {line}\n" in text, line


def test_a_gpu_holds_the_whole_base_while_documents_are_compressed_even_under_zero3():
    folder = ROOT / "recipes" / "mistral-7b"
    joint, instruct = (recipe_cost(folder / f"{name}.yaml", zero=3)[0] for name in ("joint", "instruct"))
    assert joint.training_memory < 7e9 < joint.host < joint.compression_memory == joint.memory < 21e9
    assert instruct.memory == instruct.training_memory < instruct.host == joint.host


@pytest.mark.parametrize("stage", STAGES)
def test_a_batch_of_a_number_of_tokens_costs_what_its_rows_do(stage, tmp_path):
    folder = ROOT / "recipes" / "mistral-7b"
    (tmp_path / "scp.yaml").write_text((folder / "scp.yaml").read_text())
    path, values = tmp_path / f"{stage}.yaml", yaml.safe_load((folder / f"{stage}.yaml").read_text())
    expected, rows = recipe_cost(folder / f"{stage}.yaml")[0], values.pop("per_device_train_batch_size")
    # Of the assumed lengths: documents or the question with 16 memory tokens, and the prompt with slots and target.
    tokens = {"scp": 272 + 307, "instruct": 5 * 272 + 235, "joint": 46 + 190}[stage]
    path.write_text(yaml.safe_dump({**values, "max_tokens_per_batch": rows * tokens}))
    found, told = recipe_cost(path)
    assert found == expected and told["per_device_train_batch_size"] == rows
    assert (
        f"about {rows * values['gradient_accumulation_steps'] * 8} rows on 8 GPUs, {rows * tokens}" in report(path)[0]
    )
    for wrong, reason in (
        ({"max_tokens_per_batch": tokens - 1}, f"{tokens - 1}, but .* {tokens} tokens"),
        ({"max_tokens_per_batch": 9999, "per_device_train_batch_size": 2}, "both"),
        ({}, "neither"),
    ):
        path.write_text(yaml.safe_dump(values | wrong))
        with pytest.raises(UsageError, match=reason) as error:
            recipe_cost(path)
        assert "max_tokens_per_batch" in str(error.value) and str(path) in str(error.value)


def test_counted_weights_are_those_of_the_known_models():
    billions = {}
    for name in BASES:
        model = meta_model(base_config(name), "scp", lora_r=16)
        frozen = [value for key, value in model.decoder.named_parameters() if ".lora_" not in key]
        billions[name.rpartition("/")[2]] = round(sum(value.numel() for value in frozen) / 1e9, 2)
    assert billions == {
        "Mistral-7B-Instruct-v0.2": 7.24,
        "Qwen3-4B-Instruct-2507": 4.02,
        "Phi-4-mini-instruct": 3.84,
    }


@pytest.mark.parametrize("stage", STAGES)
def test_checkpoint_at_7b_shapes_is_under_1_4_gb(stage, base, tmp_path):
    # The same count gives the size of a real, tiny checkpoint, but for headers and names.
    tiny = build_clara(base)
    trainer = make_trainer(stage, base, tmp_path, tiny, max_steps=1, save_strategy="steps", save_steps=1)
    trainer.train()
    folder = tmp_path / "checkpoint-1"
    weights = load_file(folder / "model.safetensors")
    optimizer = torch.load(folder / "optimizer.pt", weights_only=True)["state"]
    moments = [value[name] for value in optimizer.values() for name in ("exp_avg", "exp_avg_sq")]
    written = sum(tensor.nbytes for tensor in [*weights.values(), *moments])
    assert written == checkpoint_bytes(trainer.model, stage, frozen_bytes=4)
    model = meta_model(base_config("mistralai/Mistral-7B-Instruct-v0.2"), stage, lora_r=16)
    assert all(parameter.is_meta for parameter in model.parameters())
    # That DeepSpeed's files are as counted is in test_distributed.py.
    assert max(checkpoint_bytes(model, stage), checkpoint_bytes(model, stage, deepspeed=True)) < 1.4e9


@pytest.mark.parametrize("path", sorted((ROOT / "recipes" / "accelerate").glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_configuration_loads_and_does_what_its_name_says(path):
    config = load_config_from_file(str(path))
    kind = {"ddp": "MULTI_GPU", "fsdp2": "FSDP"}.get(path.stem, "DEEPSPEED")
    assert config.distributed_type.value == kind
    if kind == "DEEPSPEED":
        stage = 3 if path.stem == "multi_node" else int(path.stem.partition("zero")[2][0])
        settings = json.loads((ROOT / config.deepspeed_config["deepspeed_config_file"]).read_text())
        assert settings["zero_optimization"]["stage"] == stage
        assert config.deepspeed_config["zero3_init_flag"] is (stage == 3)
        assert ("offload_param" in settings["zero_optimization"]) is path.stem.endswith("offload")
