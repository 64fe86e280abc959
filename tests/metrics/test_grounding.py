"""Grounding: which of an answer's words stand in the selected documents."""

import doctest
from pathlib import Path

import evaluate
import pytest

import clara_hf.metrics.grounding.grounding as grounding
from clara_hf.metrics.grounding.grounding import score_grounding


ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("answer", "documents", "share"),
    [
        ("Velholm", ["Velholm is a town."], 1),
        ("the town, VELHOLM!", ["Velholm is a", "town"], 1),
        ("Velholm market", ["Velholm is a town."], 0.5),
        ("owl owl cat", ["An owl."], 2 / 3),
        ("owls", ["An owl."], 0),
        ("owl", [], 0),
        ("東京", ["東京 is large"], 1),
        ("yes", ["yes"], None),
        ("No.", ["x"], None),
        ("no one", ["no one came"], 1),
        ("", ["x"], None),
        ("the", ["the"], None),
    ],
)
def test_shares_equal_those_counted_by_hand(answer, documents, share):
    whole = None if share is None else float(share == 1)
    assert score_grounding(answer, documents) == {"grounding": pytest.approx(share), "grounded": whole}


def test_the_module_loads_by_path_and_leaves_out_what_does_not_count(monkeypatch):
    metric = evaluate.load(str(ROOT / "eval/metrics/grounding"))
    given = {"predictions": ["owl cat", "yes", "owl"], "references": [["an owl"], ["yes"], ["an owl", "x"]]}
    assert metric.compute(**given) == {"grounding": 0.75, "grounded": 0.5, "n": 2}
    assert metric.compute(**given, per_example=True) == {"grounding": [0.5, None, 1.0], "grounded": [0.0, None, 1.0]}
    none = metric.compute(predictions=["no"], references=[["x"]])
    assert none == {"grounding": None, "grounded": None, "n": 0}
    assert metric.description and metric.citation and "references" in metric.inputs_description


def test_the_examples_in_its_description_run(monkeypatch):
    monkeypatch.chdir(ROOT)
    outcome = doctest.testmod(grounding, extraglobs={"evaluate": evaluate})
    assert outcome.attempted >= 3 and outcome.failed == 0
