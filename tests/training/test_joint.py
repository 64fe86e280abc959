"""Joint training's options: temperature schedule and frozen parts."""

import pytest
import torch
from conftest import build_clara
from test_trainers import make_trainer, part_of, snapshot

from trainers import JointConfig
from trainers.joint import scheduled_temperature


def record_temperatures(trainer) -> list[float]:
    """Temperatures that the steps' forward passes run with, as training fills the list."""
    seen, original = [], trainer.model.forward

    def forward(*args, **kwargs):
        seen.append(trainer.model.config.temperature)
        return original(*args, **kwargs)

    trainer.model.forward = forward
    return seen


@pytest.mark.parametrize(
    ("schedule", "expected"), [("linear", [0.5, 0.4, 0.3, 0.2, 0.1]), ("cosine", [0.5, 0.441421, 0.3, 0.158579, 0.1])]
)
def test_temperature_goes_from_its_start_to_its_end(schedule, expected, base, tmp_path):
    options = {"temperature": 0.5, "temperature_end": 0.1, "temperature_schedule": schedule}
    batches = {"per_device_train_batch_size": 3, "gradient_accumulation_steps": 2}
    trainer = make_trainer("joint", base, tmp_path, max_steps=5, **batches, **options)
    seen = record_temperatures(trainer)
    trainer.train()
    assert seen[::2] == seen[1::2] == pytest.approx(expected, abs=1e-6)
    assert trainer.model.config.temperature == pytest.approx(0.1)
    assert [scheduled_temperature(0.5, 0.1, step / 4, schedule) for step in range(5)] == pytest.approx(
        expected, abs=1e-6
    )


def test_temperature_schedule_changes_the_training_and_resumes_exactly(base, tmp_path):
    options = {"max_steps": 6, "save_strategy": "steps", "save_steps": 3, "temperature": 0.5}
    whole = make_trainer("joint", base, tmp_path / "whole", temperature_end=0.05, **options)
    whole.train()
    resumed = make_trainer("joint", base, tmp_path / "resumed", temperature_end=0.05, **options)
    seen = record_temperatures(resumed)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert seen == pytest.approx([0.23, 0.14, 0.05])
    expected, found = whole.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(expected[key], found[key]) for key in expected)
    constant = make_trainer("joint", base, tmp_path / "constant", **options)
    constant.train()
    assert any(not torch.equal(expected[key], value) for key, value in constant.model.state_dict().items())


@pytest.mark.parametrize(
    ("options", "trained"),
    [
        ({"freeze_generator": True}, {"query_reasoner"}),
        ({"freeze_query_reasoner": True}, {"generator"}),
        (
            {"freeze_query_reasoner": True, "online": True, "train_compressor": True},
            {"generator", "compressor", "memory_embeddings"},
        ),
        ({"freeze_generator": True, "query_learning_rate": 1e-2}, {"query_reasoner"}),
    ],
)
def test_frozen_parts_stay(options, trained, base, tmp_path):
    model = build_clara(base, lora_dropout=0.0)
    before = snapshot(model)
    make_trainer("joint", base, tmp_path, model, max_steps=2, temperature=0.2, **options).train()
    changed = {part_of(key) for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == trained


def test_mse_weight_counts_where_the_compressor_trains(base, tmp_path):
    model = build_clara(base, lora_dropout=0.0)
    options = {"online": True, "train_compressor": True, "mse_weight": 3.0, "max_steps": 1}
    trainer = make_trainer("joint", base, tmp_path, model, **options)
    trainer.train()
    (row,) = (row for row in trainer.state.log_history if "loss" in row)
    assert row["mse_loss"] > 0.01 and row["loss"] == pytest.approx(row["ce_loss"] + 3 * row["mse_loss"], abs=1e-4)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"temperature_end": 0.0}, "temperature_end must be positive, got 0.0"),
        ({"temperature_schedule": "step"}, "temperature_schedule must be one of .* got 'step'"),
        ({"freeze_generator": True, "freeze_query_reasoner": True}, "leave nothing to train"),
        ({"freeze_query_reasoner": True, "query_learning_rate": 0.1}, "query_learning_rate has no use"),
        ({"mse_weight": 0.1}, "mse_weight has no use without train_compressor"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        JointConfig(output_dir=str(tmp_path), **options)


@pytest.mark.parametrize("estimator", ["soft", "gumbel"])
def test_other_estimators_count_in_training_only_and_are_kept(estimator, base, tmp_path):
    trainer = make_trainer("joint", base, tmp_path, max_steps=2, topk_estimator=estimator, temperature=0.5)
    seen, original = [], trainer.model.forward

    def forward(*args, **kwargs):
        output = original(*args, **kwargs)
        best = output.scores.argsort(dim=1, descending=True, stable=True)[:, : output.topk_indices.shape[1]]
        is_hard = bool((output.topk_weights.amax(dim=-1) > 0.999).all())
        seen.append((trainer.model.training, is_hard, torch.equal(output.topk_indices, best)))
        return output

    trainer.model.forward = forward
    trainer.train()
    trainer.model.eval()
    trainer.compute_loss(trainer.model, next(iter(trainer.get_train_dataloader())))
    trained, evaluated = ([row[1:] for row in seen if row[0] is mode] for mode in (True, False))
    assert evaluated and all(row == (True, True) for row in evaluated)
    assert all(is_hard == (estimator == "gumbel") for is_hard, _ in trained) and len(trained) >= 2
    assert trainer.model.config.topk_estimator == estimator
