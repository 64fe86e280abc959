"""Arguments that all stages share."""

import pytest

from trainers import base
from trainers.base import CLaRaTrainingArguments


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
