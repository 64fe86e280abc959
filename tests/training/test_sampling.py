"""The order of training rows: one for a seed and an epoch, in a run that was resumed and in any number of processes."""

import pytest
import torch
from accelerate.data_loader import BatchSamplerShard
from conftest import build_base
from datasets import Dataset
from processes import in_processes
from test_mix import drawn_rows
from test_trainers import QUESTIONS, SCP_ROWS, make_trainer
from torch.utils.data import BatchSampler

from trainers.batches import LengthSampler


LENGTHS = [(7 * row) % 31 for row in range(128)]
GROUPED = {"train_sampling_strategy": "group_by_length"}
WORKERS = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True}


def sampler(seed: int = 0, epoch: int = 0, batch_size: int = 8) -> LengthSampler:
    return LengthSampler(LENGTHS, batch_size, seed, epoch=lambda: epoch)


def test_rows_of_a_batch_are_alike_in_length():
    rows = list(sampler())
    assert sorted(rows) == list(range(128)) and len(sampler()) == 128
    batches = [[LENGTHS[row] for row in rows[start : start + 8]] for start in range(0, 128, 8)]
    assert sorted(max(batch) - min(batch) for batch in batches)[8] < 12
    assert max(LENGTHS) == LENGTHS[rows[0]]


def test_order_changes_with_epoch_and_seed_and_with_nothing_else():
    first = list(sampler())
    torch.rand(3)
    assert list(sampler()) == first
    assert list(sampler(epoch=1)) not in (first, list(sampler(seed=1)))


@pytest.mark.parametrize(("processes", "accumulated"), [(1, 4), (2, 1), (2, 2), (4, 2)])
def test_processes_divide_the_global_batches_of_one(processes, accumulated, base, tmp_path, monkeypatch):
    rows = Dataset.from_list([SCP_ROWS[length % 16] for length in LENGTHS[:64]])
    options = {**GROUPED, "rows": rows}
    alone = make_trainer("scp", base, tmp_path, per_device_train_batch_size=8, **options)
    expected = list(BatchSampler(alone._get_train_sampler(), 8, drop_last=False))
    size = {"per_device_train_batch_size": 8 // processes // accumulated, "gradient_accumulation_steps": accumulated}
    shared = make_trainer("scp", base, tmp_path, **size, **options)
    monkeypatch.setattr(type(shared.args), "world_size", processes)
    batches = BatchSampler(shared._get_train_sampler(), size["per_device_train_batch_size"], drop_last=False)
    shares = [list(BatchSamplerShard(batches, processes, rank)) for rank in range(processes)]
    steps = [
        sum((share[step : step + accumulated] for share in shares), [])
        for step in range(0, 8 * accumulated, accumulated)
    ]
    assert [sorted(sum(step, [])) for step in steps] == [sorted(batch) for batch in expected]


@pytest.mark.parametrize(
    "options",
    [GROUPED, {**GROUPED, "gradient_accumulation_steps": 2}, WORKERS],
    ids=["grouped", "accumulated", "workers"],
)
def test_run_resumed_in_its_second_epoch_equals_an_uninterrupted_one(options, base, tmp_path, forkserver):
    batch_size = 4 // options.get("gradient_accumulation_steps", 1)
    options = {**options, "per_device_train_batch_size": batch_size, "max_steps": 9, "save_strategy": "steps"}
    options |= {"save_steps": 5, "eval_strategy": "steps", "eval_steps": 3, "eval_rows": QUESTIONS.select(range(2))}
    whole = make_trainer("joint", base, tmp_path / "whole", **options)
    whole.train()
    resumed = make_trainer("joint", base, tmp_path / "resumed", **options)
    # Of twelve rows, an epoch makes three steps.
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    losses = [[row["loss"] for row in t.state.log_history if "loss" in row] for t in (whole, resumed)]
    assert losses[0] == losses[1]
    expected, found = whole.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(expected[key], found[key]) for key in expected)


def train_in_job(rank: int, base: str, folder) -> list[int]:
    trainer = make_trainer("joint", base, folder, max_steps=6, per_device_train_batch_size=2, **GROUPED)
    rows = drawn_rows(trainer)
    trainer.train()
    torch.distributed.destroy_process_group()
    return rows


@pytest.mark.slow
def test_two_processes_with_dropout_train_every_row_once_an_epoch(tmp_path):
    base = build_base(tmp_path / "base")
    first, second = in_processes(2, train_in_job, tmp_path, base, tmp_path / "run")
    assert len(first) == len(second) == 12
    for epoch in (slice(6), slice(6, 12)):
        assert sorted(first[epoch] + second[epoch]) == list(range(12))
