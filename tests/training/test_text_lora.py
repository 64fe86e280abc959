"""The text baseline: what TRL trains on is what the prompts say."""

import json

import pytest
import torch
from conftest import TEXTS, build_clara
from peft import PeftModel
from transformers import AutoModelForCausalLM

from clara_hf.program import UsageError
from recipes import text_lora


ROWS = [
    {"question": "Who keeps bees?", "answers": ["Mara Brandel"], "docs": TEXTS[:2]},
    {"question": "What is sold?", "answers": ["copper lanterns"], "docs": TEXTS[1:3]},
]


def test_two_steps_lower_the_loss_of_the_answers_alone_and_the_adapter_loads(base, tmp_path):
    clara = build_clara(base)
    clara.save_pretrained(tmp_path / "clara")
    data = tmp_path / "qa.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS), encoding="utf-8")
    values = {
        "model_name_or_path": base,
        "clara_checkpoint": str(tmp_path / "clara"),
        "use_peft": True,
        "lora_target_modules": ["all-linear"],
        "train_file": str(data),
        "validation_file": str(data),
        "eval_strategy": "steps",
        "eval_steps": 1,
        "eval_on_start": True,
        "output_dir": str(tmp_path / "run"),
        "max_steps": 2,
        "per_device_train_batch_size": 2,
        "learning_rate": 1e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_steps": 1,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "disable_tqdm": True,
    }
    (tmp_path / "config.yaml").write_text(json.dumps(values), encoding="utf-8")
    for _ in range(2):  # the second time, the finished run is reused
        text_lora.main(["--config", str(tmp_path / "config.yaml")])
    state = json.loads((tmp_path / "run" / "trainer_state.json").read_text(encoding="utf-8"))
    losses = [row["eval_loss"] for row in state["log_history"] if "eval_loss" in row]
    assert state["global_step"] == 2 and losses[0] > losses[1] > losses[2]
    # Who may read the adapter's configuration may read its weights.
    rights = {path.stat().st_mode for path in (tmp_path / "run").glob("**/adapter_*") if path.is_file()}
    assert rights == {(tmp_path / "run" / "adapter_config.json").stat().st_mode}

    def answer_loss(model) -> float:
        """Over the tokens of the answers, which nothing but the prompts' own texts precedes."""
        total = number = 0
        for row in ROWS:
            answer = clara.processor.target("answer", row["answers"])
            example = clara.processor.training_example("answer", "\n".join(row["docs"]), answer, row["question"])
            ids, labels = torch.tensor([example["input_ids"]]), torch.tensor([example["labels"]])
            targets = labels[0, 1:] != -100
            assert clara.processor.tokenizer.decode(labels[labels != -100]).startswith(row["answers"][0])
            logits = model(ids).logits[0, :-1][targets]
            total += torch.nn.functional.cross_entropy(logits, ids[0, 1:][targets], reduction="sum").item()
            number += int(targets.sum())
        return total / number

    plain = AutoModelForCausalLM.from_pretrained(base).eval()
    assert answer_loss(plain) == pytest.approx(losses[0], rel=1e-4)
    tuned = PeftModel.from_pretrained(plain, tmp_path / "run").eval()
    assert answer_loss(tuned) == pytest.approx(losses[2], rel=1e-4)


def test_the_checkpoint_whose_prompts_are_used_must_be_given(base, tmp_path):
    arguments = ["--model_name_or_path", base, "--train_file", "x.jsonl", "--output_dir", str(tmp_path / "run")]
    (tmp_path / "empty.yaml").write_text("{}")
    with pytest.raises(UsageError, match="clara_checkpoint"):
        text_lora.main(["--config", str(tmp_path / "empty.yaml"), *arguments])
