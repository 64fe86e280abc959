"""Kinds of SCP rows drawn in given shares."""

from collections import Counter

import pytest
import torch
from test_trainers import SCP_ROWS, make_trainer

from clara_hf.program import parse
from clara_hf.program.training import DataArguments
from trainers import SCPConfig
from trainers.batches import MixSampler, exact_shares


KINDS = ["qa"] * 9 + ["paraphrase"] * 3
EPOCH = [0]


def sampler(weights: dict, seed: int = 0, kinds=KINDS) -> MixSampler:
    return MixSampler(kinds, weights, seed, epoch=lambda: EPOCH[0])


@pytest.fixture(autouse=True)
def first_epoch():
    EPOCH[0] = 0


def test_shares_are_exact_and_every_row_of_a_kind_is_drawn_before_any_again():
    drawn = sampler({"qa": 0.5, "paraphrase": 0.5})
    rows = list(drawn)
    assert len(rows) == len(drawn) == 12
    count = Counter(rows)
    assert sum(count[row] for row in range(9)) == 6 and max(count[row] for row in range(9)) == 1
    assert all(count[row] == 2 for row in range(9, 12))
    assert rows != sorted(rows)


def test_order_changes_with_epoch_and_seed_and_with_nothing_else():
    mix = sampler({"qa": 2, "paraphrase": 1})
    first = list(mix)
    assert list(mix) == first == list(sampler({"qa": 2, "paraphrase": 1}))
    EPOCH[0] = 1
    assert list(mix) != first and len(list(mix)) == 12
    assert list(mix) not in (list(sampler({"qa": 2, "paraphrase": 1}, seed=seed)) for seed in (1, 2))


def test_a_kind_can_be_left_out():
    for weights in ({"paraphrase": 3.0}, {"paraphrase": 1, "qa": 0}):
        assert sorted(sampler(weights)) == [9, 10, 11]


def test_rounding_keeps_the_total():
    assert exact_shares(10, {"a": 1, "b": 1, "c": 1}) == {"a": 4, "b": 3, "c": 3}
    assert exact_shares(7, {"a": 0.9, "b": 0.1}) == {"a": 6, "b": 1}
    assert exact_shares(1, {"a": 0.1, "b": 0.9}) == {"a": 0, "b": 1}
    assert sorted(sampler({"qa": 1000, "paraphrase": 1}, kinds=["qa", "paraphrase"])) == [0, 0]


@pytest.mark.parametrize(
    ("mix", "words"),
    [
        ({"qa": -1}, "at least 0, got -1 for 'qa'"),
        ({"qa": "much"}, "at least 0, got 'much' for 'qa'"),
        ({"qa": 0}, "some kind a weight above 0"),
        ({}, "some kind a weight above 0"),
        ("qa, paraphrase", "must be a mapping of kinds to weights, got 'qa, paraphrase'"),
        ("{qa", "no valid YAML"),
    ],
)
def test_mixes_that_say_nothing_are_refused(mix, words, tmp_path):
    with pytest.raises(ValueError, match=words):
        SCPConfig(output_dir=str(tmp_path), data_mix=mix)


def test_a_kind_that_the_data_do_not_have_is_named(base, tmp_path):
    with pytest.raises(ValueError, match=r"draws 'summary', but the data have only \['paraphrase', 'qa'\]"):
        make_trainer("scp", base, tmp_path, data_mix={"qa": 1, "summary": 1})
    with pytest.raises(ValueError, match="data_mix draws rows itself"):
        SCPConfig(output_dir=str(tmp_path), data_mix={"qa": 1}, train_sampling_strategy="group_by_length")


def test_a_mix_is_read_from_yaml_and_from_the_command_line(tmp_path):
    path = tmp_path / "config.yaml"
    path.write_text(
        "train_file: a.jsonl\noutput_dir: runs/x\ndata_mix: {qa: 0.25, paraphrase: 0.75}\n", encoding="utf-8"
    )
    types = (DataArguments, SCPConfig)
    _, args = parse(types, [], path)
    assert args.data_mix == {"qa": 0.25, "paraphrase": 0.75}
    _, args = parse(types, ["--data_mix", "{qa: 1}"], path)
    assert args.data_mix == {"qa": 1}


def drawn_rows(trainer) -> list[int]:
    """Rows of every batch that training takes, as it goes on."""
    rows, original = [], trainer.training_step

    def training_step(model, inputs, *args, **kwargs):
        rows.extend(inputs["example_index"].tolist())
        return original(model, inputs, *args, **kwargs)

    trainer.training_step = training_step
    return rows


def test_training_draws_the_mix_and_a_run_resumed_in_its_second_epoch_draws_alike(base, tmp_path):
    options = {"max_steps": 8, "data_mix": "{qa: 0.75, paraphrase: 0.25}", "save_strategy": "steps", "save_steps": 6}
    whole = make_trainer("scp", base, tmp_path / "whole", **options)
    rows = drawn_rows(whole)
    whole.train()
    # 16 rows make an epoch of four batches; 8 of them are QA, of which 12 are to be drawn.
    kinds = [SCP_ROWS[row]["data_type"] for row in rows]
    assert [Counter(kinds[start : start + 16])["qa"] for start in (0, 16)] == [12, 12]
    assert rows[:16] != rows[16:]
    resumed = make_trainer("scp", base, tmp_path / "resumed", **options)
    again = drawn_rows(resumed)
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-6"))
    assert again == rows[24:]
    expected, found = whole.model.state_dict(), resumed.model.state_dict()
    assert all(torch.equal(expected[key], found[key]) for key in expected)
