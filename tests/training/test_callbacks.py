"""What training logs beside its loss, the local log, and how a diverging run stops."""

import json
import math
import time

import pytest
import torch
from conftest import build_clara
from processes import in_processes
from test_trainers import QUESTIONS, SCP_ROWS, make_trainer

from modeling_clara import CLaRaForRetrievalGeneration
from trainers.callbacks import DivergedError, TrainingClock, count_batch, take_means
from trainers.losses import batch_recall, chosen_mass


def rows_of(trainer) -> list[dict]:
    return [row for row in trainer.state.log_history if "loss" in row]


def poison_loss(trainer, call: int, value: float = math.nan) -> None:
    """Make the loss of the model's `call`-th forward pass, from 1, a number that is not finite."""
    calls, original = [], trainer.model.forward

    def forward(*args, **kwargs):
        outputs = original(*args, **kwargs)
        calls.append(1)
        if len(calls) == call:
            outputs.loss = outputs.loss * value
        return outputs

    trainer.model.forward = forward


@pytest.mark.parametrize("accumulation", [1, 2])
def test_loss_is_the_sum_of_its_logged_parts(accumulation, base, tmp_path):
    trainer = make_trainer(
        "scp", base, tmp_path, max_steps=3, gradient_accumulation_steps=accumulation, mse_weight=0.7, logging_steps=3
    )
    trainer.train()
    (row,) = rows_of(trainer)
    assert row["mse_loss"] > 0.01
    assert row["loss"] == pytest.approx(row["ce_loss"] + 0.7 * row["mse_loss"], abs=1e-5)


def test_batch_recall_is_the_mean_over_questions_with_gold_documents():
    is_positive = torch.tensor([[True, True, False, False], [False, False, False, False], [False, False, True, False]])
    indices = torch.tensor([[1, 3], [0, 1], [0, -1]])
    total, count = batch_recall(indices, is_positive)
    assert (total.item(), count.item()) == (0.5, 2)
    # A slot without a candidate is not the first candidate.
    total, count = batch_recall(torch.tensor([[2, -1]]), torch.tensor([[True, False, False]]))
    assert (total.item(), count.item()) == (0.0, 1)


@pytest.mark.parametrize("taken_mask", ["exact", "published"])
def test_chosen_mass_is_each_slot_s_softmax_over_what_is_left(taken_mask):
    scores = torch.tensor([[0.3, 0.5, 0.1], [0.2, float("-inf"), float("-inf")]])
    indices = torch.tensor([[1, 0], [0, -1]])
    small = 1e-8 if taken_mask == "published" else 0.0
    one, two, three = (math.exp(score / 0.1) for score in (0.5, 0.3, 0.1))
    expected = [one / (one + two + three), two / (two + three + small * one), 1.0]
    assert chosen_mass(scores, indices, 0.1, taken_mask).tolist() == pytest.approx(expected)


def test_joint_training_logs_what_its_slots_choose(base, tmp_path):
    rows = QUESTIONS.select(range(4))
    model = build_clara(base, lora_dropout=0.0)
    trainer = make_trainer("joint", base, tmp_path, model, rows=rows, max_steps=1, learning_rate=0.0, temperature=0.3)
    trainer.train()
    (row,) = rows_of(trainer)
    first, both, mass = [], [], []
    for example in rows:
        memories = model.compress(example["docs"]).half().float()
        found = model.retrieve([example["question"]], memories, n_docs=len(memories))
        order, scores = found.indices[0].tolist(), found.scores[0]
        first.append(order[0] in example["pos_index"])
        both.append(bool(set(order[:2]) & set(example["pos_index"])))
        mass += [torch.softmax(scores[slot:] / 0.3, dim=0)[0].item() for slot in range(2)]
    assert row["recall@1"] == pytest.approx(sum(first) / 4)
    assert row["recall@2"] == pytest.approx(sum(both) / 4)
    assert row["chosen_mass"] == pytest.approx(sum(mass) / 8, abs=1e-4)
    assert row["chosen_share"] == pytest.approx(sum(value > 0.5 for value in mass) / 8)


def test_recall_is_left_out_where_gold_documents_are_not_known(base, tmp_path):
    trainer = make_trainer("joint", base, tmp_path, rows=QUESTIONS.remove_columns("pos_index"), max_steps=1)
    trainer.train()
    (row,) = rows_of(trainer)
    assert "chosen_mass" in row and not any(name.startswith("recall") for name in row)


def test_contrastive_training_logs_the_recall_of_its_batches(base, tmp_path):
    rows = QUESTIONS.select(range(4))
    model = build_clara(base, lora_dropout=0.0)
    trainer = make_trainer("contrastive", base, tmp_path, model, rows=rows, eval_rows=rows, max_steps=1)
    expected = trainer.evaluate()
    trainer.train()
    (row,) = rows_of(trainer)
    assert row["recall@1"] == pytest.approx(expected["eval_recall@1"])
    assert row["loss"] == pytest.approx(expected["eval_loss"], abs=1e-5)


@pytest.mark.parametrize(
    ("stage", "parts", "max_grad_norm"),
    [("scp", 3, 1e9), ("scp", 3, 1e-3), ("scp", 3, 0.0), ("joint", 2, 1e-3), ("contrastive", 1, 1e-3)],
)
def test_gradient_norms_of_the_parts_make_up_the_whole_before_clipping(stage, parts, max_grad_norm, base, tmp_path):
    trainer = make_trainer(stage, base, tmp_path, max_steps=1, max_grad_norm=max_grad_norm)
    trainer.train()
    (row,) = rows_of(trainer)
    norms = [value for name, value in row.items() if name.startswith("grad_norm_")]
    assert len(norms) == parts and min(norms) > 0
    assert math.hypot(*norms) == pytest.approx(row["grad_norm"], rel=1e-4) and row["grad_norm"] > 0.01


@pytest.mark.parametrize(("stage", "documents"), [("scp", 1), ("joint", 3)])
def test_tokens_and_documents_are_counted_once_each(stage, documents, base, tmp_path):
    trainer = make_trainer(stage, base, tmp_path)
    batch = trainer.data_collator([trainer.train_dataset[0]])
    counters = {}
    count_batch(counters, batch)
    found = take_means(counters, 0.5, trainer.accelerator)
    assert not counters
    masks = [value for name, value in batch.items() if name.endswith("attention_mask")]
    assert len(masks) == 2 and found["tokens_per_second"] == 2 * sum(int(mask.sum()) for mask in masks)
    assert found["documents_per_second"] == 2 * documents
    assert 0.01 < found["peak_memory_gib"] < 1000


def test_evaluation_and_saving_do_not_count_as_training_time():
    clock = TrainingClock()
    clock.on_train_begin(None, None, None)
    for event in (clock.on_evaluate, clock.on_save):
        time.sleep(0.2)
        event(None, None, None)
    time.sleep(0.05)
    clock.on_step_end(None, None, None)
    assert 0.05 <= clock.take() < 0.15 and clock.take() == 0.0


def test_local_log_holds_every_row_once_also_after_a_resume(base, tmp_path):
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "eval_strategy": "steps", "eval_steps": 2}
    rows = SCP_ROWS.select(range(4))
    first = make_trainer("scp", base, tmp_path, eval_rows=rows, **options)
    first.train()
    path = tmp_path / "log.jsonl"
    logged = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert logged == first.state.log_history
    with open(path, "a", encoding="utf-8") as file:
        file.write('{"step": 2, "los')
    resumed = make_trainer("scp", base, tmp_path, eval_rows=rows, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    logged = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    assert [row["step"] for row in logged if "loss" in row] == [1, 2, 3, 4]
    assert logged == resumed.state.log_history
    make_trainer("scp", base, tmp_path, max_steps=1).train()
    assert [json.loads(line)["step"] for line in path.read_text(encoding="utf-8").splitlines()] == [1, 1]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_stops_the_run_with_its_rows_and_leaves_the_last_checkpoint(value, base, tmp_path):
    rows = SCP_ROWS.add_column("id", [f"row-{place}" for place in range(len(SCP_ROWS))])
    options = {"save_strategy": "steps", "save_steps": 1, "gradient_accumulation_steps": 2, "logging_steps": 50}
    trainer = make_trainer("scp", base, tmp_path, rows=rows, **options)
    seen, original = [], trainer.data_collator

    def collate(features):
        seen.append([row["example_index"] for row in features])
        return original(features)

    trainer.data_collator = collate
    # The second micro-batch of the third step.
    poison_loss(trainer, call=6, value=value)
    with pytest.raises(DivergedError, match=f"the loss is {value} at step 3.*diverged.json.*checkpoint-2"):
        trainer.train()
    found = json.loads((tmp_path / "diverged.json").read_text(encoding="utf-8"))
    assert (found["step"], found["loss"]) == (3, str(value))
    assert found["rows"] == seen[5] and found["ids"] == [f"row-{place}" for place in seen[5]]
    assert [batch["rows"] for batch in found["batches"]] == seen[4:6]
    assert math.isfinite(float(found["batches"][0]["loss"]))
    assert not (tmp_path / "checkpoint-3").exists()
    kept = CLaRaForRetrievalGeneration.from_pretrained(tmp_path / "checkpoint-2")
    assert all(parameter.isfinite().all() for parameter in kept.parameters())
    resumed = make_trainer("scp", base, tmp_path, rows=rows, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert resumed.state.global_step == 6 and not (tmp_path / "diverged.json").exists()


def test_gradients_that_are_not_finite_stop_the_run_before_it_saves(base, tmp_path):
    trainer = make_trainer("joint", base, tmp_path, save_strategy="steps", save_steps=1, max_steps=3)
    trainer.model.part_parameters("generator")[0].register_hook(lambda gradient: gradient * math.inf)
    with pytest.raises(DivergedError, match="the gradients are not finite at step 1.*No checkpoint was saved before"):
        trainer.train()
    found = json.loads((tmp_path / "diverged.json").read_text(encoding="utf-8"))
    assert len(found["rows"]) == 4 and math.isfinite(float(found["loss"]))
    assert not list(tmp_path.glob("checkpoint-*"))


def diverge(rank, base, folder):
    trainer = make_trainer("scp", base, folder, save_strategy="steps", save_steps=1)
    if rank == 1:
        poison_loss(trainer, call=3)
    trainer.train()


@pytest.mark.slow
def test_all_processes_stop_when_one_diverges(base, tmp_path):
    told = in_processes(2, diverge, tmp_path, base, tmp_path)
    assert all("DivergedError: Training diverged: the loss is nan at step 3" in error for error in told)
    found = json.loads((tmp_path / "diverged.json").read_text(encoding="utf-8"))
    bad = [batch for batch in found["batches"] if batch["loss"] == "nan"]
    assert len(found["batches"]) == 2 and len(bad) == 1
    assert bad[0]["process"] == 1 and bad[0]["rows"] == found["rows"]
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
