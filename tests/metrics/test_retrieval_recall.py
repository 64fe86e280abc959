"""The retrieval metric, against cases worked by hand and a second, literal implementation."""

import doctest
import math
import random
from pathlib import Path

import evaluate
import pytest

import clara_hf.metrics.retrieval_recall.retrieval_recall as retrieval_recall
from clara_hf.metrics.retrieval_recall.retrieval_recall import score_ranking


ROOT = Path(__file__).parents[2]


def literal_scores(ranking, gold, k):
    """Each measure as its textbook sum over ranks, nothing shared with the module."""
    relevance = [1 if candidate in gold else 0 for candidate in ranking]
    discount = [1 / math.log2(2 + position) for position in range(max(len(ranking), len(gold)))]
    dcg = sum(gain * discount[position] for position, gain in enumerate(relevance[:k]))
    ideal = sum(discount[: min(k, len(gold))])
    return {
        f"recall@{k}": sum(relevance[:k]) / len(gold),
        f"precision@{k}": sum(relevance[:k]) / k,
        f"all_gold@{k}": 1.0 if set(gold) <= set(ranking[:k]) else 0.0,
        f"ndcg@{k}": dcg / ideal,
        "mrr": next((1 / (position + 1) for position, gain in enumerate(relevance) if gain), 0.0),
    }


def test_one_gold_document_at_rank_two():
    scores = score_ranking([4, 2, 0, 1, 3], [2], ks=(1, 3))
    second = 1 / math.log2(3)
    assert scores == pytest.approx(
        {
            **{"recall@1": 0, "precision@1": 0, "all_gold@1": 0, "ndcg@1": 0},
            **{"recall@3": 1, "precision@3": 1 / 3, "all_gold@3": 1, "ndcg@3": second, "mrr": 0.5},
        }
    )


def test_two_gold_documents_at_ranks_one_and_four():
    scores = score_ranking([7, 1, 2, 5, 0], [5, 7], ks=(1, 3, 5))
    ideal = 1 + 1 / math.log2(3)
    assert scores["recall@1"] == scores["recall@3"] == 0.5 and scores["recall@5"] == 1
    assert scores["all_gold@3"] == 0 and scores["all_gold@5"] == 1
    assert scores["precision@5"] == pytest.approx(0.4)
    assert scores["ndcg@1"] == 1 and scores["ndcg@3"] == pytest.approx(1 / ideal)
    assert scores["ndcg@5"] == pytest.approx((1 + 1 / math.log2(5)) / ideal)
    assert scores["mrr"] == 1


def test_gold_that_is_not_ranked_counts_as_not_found():
    assert set(score_ranking([1, 2], [0]).values()) == {0.0}
    assert set(score_ranking([], [0]).values()) == {0.0}


def test_padding_is_passed_over_as_if_it_were_not_there():
    assert score_ranking([3, 1, -1, -1, -1], [1]) == score_ranking([3, 1], [1])


def test_random_rankings_agree_with_the_literal_definitions():
    chance = random.Random(0)
    for _ in range(300):
        candidates = chance.randint(1, 20)
        ranking = chance.sample(range(candidates), chance.randint(1, candidates))
        gold = chance.sample(range(candidates), chance.randint(1, min(4, candidates)))
        k = chance.randint(1, 25)
        assert score_ranking(ranking, gold, ks=(k,)) == pytest.approx(literal_scores(ranking, gold, k))


def test_a_thousand_random_rankings_agree_with_ir_measures():
    ir = pytest.importorskip("ir_measures")
    chance, ks = random.Random(1), (1, 2, 3, 5, 10, 25)
    relevant, ranked, expected = {}, {}, {}
    for number in range(1000):
        candidates = chance.randint(1, 20)
        ranking = chance.sample(range(candidates), chance.randint(1, candidates))
        gold = chance.sample(range(candidates), chance.randint(1, min(4, candidates)))
        relevant[str(number)] = {str(candidate): int(candidate in gold) for candidate in range(candidates)}
        ranked[str(number)] = {str(candidate): float(-rank) for rank, candidate in enumerate(ranking)}
        expected[str(number)] = score_ranking(ranking, gold, ks)
    names = {ir.RR: "mrr"}
    for k in ks:
        names |= {ir.R @ k: f"recall@{k}", ir.P @ k: f"precision@{k}", ir.nDCG @ k: f"ndcg@{k}"}
    found = list(ir.iter_calc(names, relevant, ranked))
    assert len(found) == 1000 * len(names)
    for value in found:
        scores, name = expected[value.query_id], names[value.measure]
        assert scores[name] == pytest.approx(value.value, abs=1e-9)
        if name.startswith("recall"):
            assert scores[name.replace("recall", "all_gold")] == (value.value == 1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([0, 1], []), "without gold documents"),
        (([0, 1, 0], [1]), "ranked twice"),
        (([0, 1], [1], (0,)), "at least 1"),
        (([0, -2], [1]), "-2"),
        (([0, 1], [-1]), "-1"),
    ],
)
def test_what_has_no_score_is_an_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        score_ranking(*arguments)


def test_the_module_loads_by_path_and_equals_the_functions():
    metric = evaluate.load(str(ROOT / "eval/metrics/retrieval_recall"))
    rankings, gold = [[2, 0, 1], [1, 0], [0]], [[0], [0, 1], [3]]
    expected = [score_ranking(*pair, ks=(1, 2)) for pair in zip(rankings, gold, strict=True)]
    values = metric.compute(predictions=rankings, references=gold, ks=[1, 2], per_example=True)
    assert values == {name: [score[name] for score in expected] for name in expected[0]}
    means = metric.compute(predictions=rankings, references=gold, ks=[1, 2])
    assert means == pytest.approx({name: sum(column) / 3 for name, column in values.items()})
    assert metric.description and metric.citation and "references" in metric.inputs_description


def test_the_examples_in_its_description_run(monkeypatch):
    monkeypatch.chdir(ROOT)
    outcome = doctest.testmod(retrieval_recall, extraglobs={"evaluate": evaluate})
    assert outcome.attempted >= 3 and outcome.failed == 0
