"""Arguments that all stages share."""

from pathlib import Path

import pytest
import yaml
from conftest import build_clara
from test_trainers import QUESTIONS, make_trainer

from clara_hf.program import UsageError
from clara_hf.program.models import CLaRaModelArguments
from clara_hf.program.stages import move_settings
from trainers import ContrastiveConfig, JointConfig, JointTrainer
from trainers import arguments as base_module
from trainers.arguments import CLaRaTrainingArguments


@pytest.mark.parametrize(("computes", "warns"), [(False, True), (True, False)])
def test_bfloat16_on_a_cpu_without_its_instructions_is_warned_of(tmp_path, monkeypatch, computes, warns):
    said = []
    monkeypatch.setattr(base_module, "cpu_computes_bfloat16", lambda: computes)
    monkeypatch.setattr(base_module.logger, "warning", said.append)
    CLaRaTrainingArguments(output_dir=str(tmp_path), use_cpu=True, bf16=True)
    assert any("bf16" in text for text in said) == warns
    said.clear()
    CLaRaTrainingArguments(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    assert not said


def test_whether_the_cpu_computes_bfloat16_is_known():
    assert base_module.cpu_computes_bfloat16() in (True, False)


def test_a_run_with_deepspeed_on_a_cpu_compiles_no_kernel_that_only_inference_calls(monkeypatch, tmp_path):
    ops = pytest.importorskip("deepspeed", reason="DeepSpeed is an extra").ops
    monkeypatch.setattr(ops, "__compatible_ops__", {"deepspeed_shm_comm": True}, raising=False)
    monkeypatch.setattr(base_module.TrainingArguments, "__post_init__", lambda self: 1 / 0)
    for uses, kernel in (("false", True), ("true", False)):
        monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", uses)
        with pytest.raises(ZeroDivisionError):
            CLaRaTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
        assert ops.__compatible_ops__["deepspeed_shm_comm"] is kernel


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("label_smoothing_factor", 0.3),
        ("use_liger_kernel", True),
        ("liger_kernel_config", {"rope": True}),
        ("optim_target_modules", ["q_proj"]),
        ("label_names", ["labels"]),
        ("length_column_name", "tokens"),
        ("train_sampling_strategy", "batch_rebalance"),
        ("accelerator_config", {"dispatch_batches": True}),
        ("gradient_accumulation_steps", 0),
        ("per_device_train_batch_size", -3),
        ("generation_max_new_tokens", 0),
        ("lr_scheduler_kwargs", {"unknown": 1}),
        ("optim_args", "betas"),
    ],
)
def test_settings_without_effect_here_or_that_fail_later_are_refused_by_name(name, value, tmp_path):
    with pytest.raises(ValueError, match="dispatch_batches" if name == "accelerator_config" else name):
        CLaRaTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [("batch_eval_metrics", True), ("eval_do_concat_batches", False), ("include_for_metrics", ["loss"])],
)
def test_settings_that_need_metrics_of_one_s_own_are_refused_without_them(name, value, base, tmp_path):
    with pytest.raises(ValueError, match=f"{name} is .* give compute_metrics"):
        make_trainer("joint", base, tmp_path, **{name: value})


def test_a_loss_function_that_would_be_passed_over_is_refused(base, tmp_path):
    args = JointConfig(output_dir=str(tmp_path), use_cpu=True)
    with pytest.raises(ValueError, match="compute_loss_func"):
        JointTrainer(model=base, args=args, train_dataset=QUESTIONS, compute_loss_func=lambda *_, **__: 0)


def test_noise_on_embeddings_is_not_passed_over(base, tmp_path):
    losses = []
    for alpha in (None, 50.0):
        model = build_clara(base, lora_dropout=0.0)
        trainer = make_trainer("joint", base, tmp_path / str(alpha), model, max_steps=1, neftune_noise_alpha=alpha)
        trainer.train()
        losses.append(trainer.state.log_history[0]["loss"])
    assert abs(losses[0] - losses[1]) > 1e-3


@pytest.mark.parametrize("name", ["gradient_checkpointing", "activation_checkpointing"])
def test_checkpointing_has_both_names_and_no_warning(name, tmp_path, recwarn):
    options = {name: True, f"{name}_kwargs": {"use_reentrant": False}}
    args = CLaRaTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **options)
    assert args.gradient_checkpointing is True
    assert args.gradient_checkpointing_kwargs == {"use_reentrant": False}
    args = CLaRaTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    assert not args.gradient_checkpointing and not args.activation_checkpointing
    assert not [warning for warning in recwarn if "checkpointing" in str(warning.message)]


def test_settings_of_a_stage_have_one_home(tmp_path):
    model, stage = CLaRaModelArguments("base", clara_config={"top_k": 3, "lora_r": 4}), JointConfig(str(tmp_path))
    move_settings(model, stage)
    assert model.clara_config == {"lora_r": 4} and stage.top_k == 3
    model = CLaRaModelArguments("base", clara_config={"top_k": 3})
    with pytest.raises(UsageError, match="top_k is given twice"):
        move_settings(model, JointConfig(str(tmp_path), top_k=5))
    # The temperature of the contrastive loss is another one than that of the checkpoint's top-k.
    model = CLaRaModelArguments("base", clara_config={"temperature": 0.1})
    move_settings(model, ContrastiveConfig(str(tmp_path)))
    assert model.clara_config == {"temperature": 0.1}


@pytest.mark.parametrize("path", sorted((Path(__file__).parents[3] / "recipes").glob("*/*.yaml")), ids=str)
def test_shipped_recipes_say_a_setting_in_one_place(path):
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert not {"top_k", "temperature", "topk_taken_mask", "mse_weight"} & set(values.get("clara_config") or {})


@pytest.mark.parametrize(("name", "value"), [("dtype", "float16"), ("decoder_config", {}), ("pad_token_id", 3)])
def test_what_is_no_field_to_set_is_refused(name, value):
    with pytest.raises(UsageError, match=name):
        CLaRaModelArguments("somewhere", clara_config={name: value})
