"""Arguments that all stages share."""

import pytest

from trainers import trainer as base
from trainers.trainer import CLaRaTrainingArguments


@pytest.mark.parametrize(("computes", "warns"), [(False, True), (True, False)])
def test_bfloat16_on_a_cpu_without_its_instructions_is_warned_of(tmp_path, monkeypatch, computes, warns):
    said = []
    monkeypatch.setattr(base, "cpu_computes_bfloat16", lambda: computes)
    monkeypatch.setattr(base.logger, "warning", said.append)
    CLaRaTrainingArguments(output_dir=str(tmp_path), use_cpu=True, bf16=True)
    assert any("bf16" in text for text in said) == warns
    said.clear()
    CLaRaTrainingArguments(output_dir=str(tmp_path), use_cpu=True, bf16=False)
    assert not said


def test_whether_the_cpu_computes_bfloat16_is_known():
    assert base.cpu_computes_bfloat16() in (True, False)


def test_a_run_with_deepspeed_on_a_cpu_compiles_no_kernel_that_only_inference_calls(monkeypatch, tmp_path):
    ops = pytest.importorskip("deepspeed", reason="DeepSpeed is an extra").ops
    monkeypatch.setattr(ops, "__compatible_ops__", {"deepspeed_shm_comm": True}, raising=False)
    monkeypatch.setattr(base.TrainingArguments, "__post_init__", lambda self: 1 / 0)
    for uses, kernel in (("false", True), ("true", False)):
        monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", uses)
        with pytest.raises(ZeroDivisionError):
            CLaRaTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
        assert ops.__compatible_ops__["deepspeed_shm_comm"] is kernel
