"""Batches of a number of tokens: which rows they have, that processes have as many, and that they train like others."""

import random

import pytest
import torch
from conftest import build_base, build_clara
from processes import in_processes
from test_dro import ROWS as DRO_ROWS
from test_dro import make as make_dro
from test_mix import drawn_rows
from test_trainers import QUESTIONS, SCP_ROWS, make_trainer

from modeling_clara.functional_clara import token_batches
from trainers.arguments import CLaRaTrainingArguments
from trainers.batches import GRAIN, MixSampler, TokenSampler, row_tokens


LENGTHS = [random.Random(row).randrange(10, 90) for row in range(101)]
BY_TOKENS = {"per_device_train_batch_size": 8, "max_tokens_per_batch": 700}  # 8 is the Trainer's own number


def sampler(processes: int = 1, rank: int = 0, epoch: int = 0, seed: int = 0, lengths=LENGTHS, most: int = 200):
    rows = list(range(len(lengths)))
    return TokenSampler(lengths, most, lambda _: rows, 1, seed, lambda: epoch, rank, processes)


def test_batches_hold_as_many_padded_tokens_as_they_may_and_depend_on_no_other_batch():
    batches = token_batches(LENGTHS, 200)
    assert sorted(sum(batches, [])) == list(range(101))
    for batch, after in zip(batches, [*batches[1:], None], strict=True):
        longest = max(LENGTHS[row] for row in batch)
        assert LENGTHS[batch[0]] == longest and len(batch) * longest <= 200
        assert after is None or (len(batch) + 1) * longest > 200 and LENGTHS[after[0]] <= LENGTHS[batch[-1]]
    for left_out in range(len(batches)):
        kept = sorted(sum(batches[:left_out] + batches[left_out + 1 :], []))
        again = token_batches([LENGTHS[row] for row in kept], 200)
        assert [[kept[place] for place in batch] for batch in again] == batches[:left_out] + batches[left_out + 1 :]
    assert token_batches([], 5) == []
    with pytest.raises(ValueError, match=r"max_tokens_per_batch is 80, but a text has 8\d tokens"):
        token_batches(LENGTHS, 80)


@pytest.mark.parametrize("processes", [1, 2, 3, 4])
def test_every_epoch_has_each_row_once_in_as_many_batches_for_every_process(processes):
    orders = []
    for epoch in range(3):
        shares = [list(sampler(processes, rank, epoch)) for rank in range(processes)]
        assert {len(share) for share in shares} == {len(sampler(processes))}
        batches = sum(shares, [])
        assert sorted(sum(batches, [])) == list(range(101))
        assert all(len(batch) * max(LENGTHS[row] for row in batch) <= 200 for batch in batches)
        orders.append(shares)
    assert orders[0] != orders[1]
    assert {frozenset(batch) for batch in sum(orders[0], [])} != {frozenset(batch) for batch in sum(orders[1], [])}
    torch.rand(3)
    assert [list(sampler(processes, rank)) for rank in range(processes)] == orders[0]
    assert list(sampler(processes, 0, seed=1)) != orders[0][0]


def test_fewer_rows_than_processes_are_trained_on_more_than_once():
    shares = [list(sampler(4, rank, lengths=[30, 40, 50])) for rank in range(4)]
    assert [len(share) for share in shares] == [1, 1, 1, 1]
    assert {row for share in shares for row in share[0]} == {0, 1, 2}


def test_epochs_that_draw_other_rows_have_as_many_batches():
    kinds = ["long" if length > 60 else "short" for length in LENGTHS]
    mix = MixSampler(kinds, {"long": 0.5, "short": 0.5}, 0, lambda: 0)
    natural, found = set(), set()
    for epoch in range(4):
        made = TokenSampler(LENGTHS, 200, mix.rows_of, 4, 0, lambda epoch=epoch: epoch, 1, 2)
        natural.add(len(token_batches([made.lengths[row] for row in mix.rows_of(epoch)], 200)))
        found.add(len(list(made)))
        assert len(made) in found
    assert len(found) == 1 and len(natural) > 1 and 2 * found.pop() >= max(natural)


@pytest.mark.parametrize(
    "other",
    [
        {"per_device_train_batch_size": 16},
        {"auto_find_batch_size": True},
        {"train_sampling_strategy": "group_by_length"},
        {"dataloader_drop_last": True},
    ],
)
def test_what_else_says_how_large_a_batch_is_is_refused(other, tmp_path):
    with pytest.raises(ValueError, match=r"max_tokens_per_batch is 64, .*" + next(iter(other))):
        CLaRaTrainingArguments(output_dir=str(tmp_path), use_cpu=True, max_tokens_per_batch=64, **other)
    CLaRaTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **other)


@pytest.mark.parametrize("stage", ["scp", "joint", "contrastive"])
def test_tokens_of_a_row_are_those_that_its_step_reads(stage, base, tmp_path):
    trainer = make_trainer(stage, base, tmp_path, **({"online": True} if stage == "joint" else {}))
    found = row_tokens(trainer.train_dataset, trainer.model.config.num_memory_tokens)
    for row, tokens in zip(trainer.train_dataset, found, strict=True):
        batch = trainer.data_collator([row])
        masks = [value for name, value in batch.items() if name.endswith("attention_mask")]
        assert tokens == sum(int(mask.sum()) for mask in masks)
    assert len(set(found)) > 1


def test_a_row_that_fits_no_batch_is_named(base, tmp_path):
    trainer = make_trainer("scp", base, tmp_path, per_device_train_batch_size=8, max_tokens_per_batch=20)
    with pytest.raises(ValueError, match=r"max_tokens_per_batch is 20, but row \d+ has \d+ tokens"):
        trainer.get_train_dataloader()


def weights(trainer) -> dict[str, torch.Tensor]:
    return {key: value for key, value in trainer.model.state_dict().items() if "lora" in key or "memory" in key}


@pytest.mark.parametrize("stage", ["scp", "instruct", "joint", "contrastive", "dro"])
def test_a_step_of_uneven_batches_is_that_of_all_its_rows_at_once(stage, base, tmp_path):
    """Once through the data in one step of SGD, in batches of some tokens each, or in one of all rows."""
    options = {"optim": "sgd", "max_steps": 1, "learning_rate": 0.1, "max_grad_norm": 0.0, "warmup_steps": 0}

    def make(folder: str, **own):
        if stage == "dro":
            return make_dro(base, tmp_path / folder, rows=DRO_ROWS, supervised_steps=1, **options, **own)
        model, rows = build_clara(base, lora_dropout=0.0), SCP_ROWS if stage == "scp" else QUESTIONS
        return make_trainer(stage, base, tmp_path / folder, model, rows.select(range(7)), **options, **own)

    whole = make("whole", per_device_train_batch_size=7)
    longest = max(row_tokens(whole.train_dataset, 0 if stage == "dro" else 4))
    most = 2 * longest if stage == "dro" else 2 * (longest + GRAIN)
    own = {"per_device_train_batch_size": 8, "max_tokens_per_batch": most}
    parts = make("probe", **own)
    batches = [len(batch) for batch in parts.get_train_dataloader().batch_sampler]
    assert len(set(batches)) > 1
    parts = make("parts", gradient_accumulation_steps=len(batches), **own)
    whole.train(), parts.train()
    expected, found = weights(whole), weights(parts)
    start = weights(make("start", per_device_train_batch_size=7))
    moved = [key for key, value in expected.items() if not torch.equal(value, start[key])]
    assert moved
    for key in moved:
        step = (expected[key] - start[key]).abs().max()
        assert (found[key] - expected[key]).abs().max() <= 1e-3 * step + 1e-7, key
    losses = [trainer.state.log_history[0]["loss"] for trainer in (whole, parts)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("options", [{}, {"data_mix": {"qa": 0.75, "paraphrase": 0.25}}], ids=["all", "mixed"])
def test_run_resumed_in_its_second_epoch_equals_an_uninterrupted_one(options, base, tmp_path):
    options = {**options, **BY_TOKENS, "max_steps": 7, "gradient_accumulation_steps": 2}
    options |= {"save_strategy": "steps", "save_steps": 4}
    whole = make_trainer("scp", base, tmp_path / "whole", **options)
    steps = -(-len(whole.get_train_dataloader()) // 2)
    assert steps == 3  # so that the fourth one ends within an epoch
    rows = drawn_rows(whole)
    whole.train()
    resumed = make_trainer("scp", base, tmp_path / "resumed", **options)
    rows_after = drawn_rows(resumed)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-4"))
    assert rows_after == rows[-len(rows_after) :] and 0 < len(rows_after) < len(rows)
    expected, found = whole.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(expected[key], found[key]) for key in expected)


def test_rows_per_second_count_the_rows(base, tmp_path):
    trainer = make_trainer("scp", base, tmp_path, **{**BY_TOKENS, "max_steps": -1, "num_train_epochs": 1})
    rows = drawn_rows(trainer)
    metrics = trainer.train().metrics
    assert sorted(rows) == list(range(16))
    assert metrics["train_samples_per_second"] * metrics["train_runtime"] == pytest.approx(16, rel=0.01)
    epoch = len(trainer.get_train_dataloader())
    again = make_trainer("scp", base, tmp_path, **{**BY_TOKENS, "max_steps": 2 * epoch})
    metrics = again.train().metrics
    assert metrics["train_samples_per_second"] * metrics["train_runtime"] == pytest.approx(32, rel=0.01)


def train_in_job(rank: int, base: str, folder, processes: int) -> tuple[list[int], list[torch.Tensor]]:
    options = {**BY_TOKENS, "max_steps": -1, "num_train_epochs": 2, "optim": "sgd"}
    trainer = make_trainer("scp", base, folder, model=build_clara(base, lora_dropout=0.0), **options)
    rows = drawn_rows(trainer)
    trainer.train()
    found = [value.tolist() for value in weights(trainer).values()]
    if processes > 1:
        torch.distributed.destroy_process_group()
    return rows, found


@pytest.mark.slow
def test_two_processes_take_the_batches_of_one_and_end_alike(tmp_path):
    base = build_base(tmp_path / "base")
    (first, one), (second, other) = in_processes(2, train_in_job, tmp_path, base, tmp_path / "run", 2)
    assert one == other and len(first) + len(second) == 32
    assert sorted(first + second) == sorted([*range(16), *range(16)])
