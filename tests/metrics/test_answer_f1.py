"""The answer metric, against cases worked by hand and against the definitions of SQuAD v1.1 and HotpotQA."""

import doctest
import random
import re
import string
from collections import Counter
from pathlib import Path

import evaluate
import pytest

import clara_hf.metrics.answer_f1.answer_f1 as answer_f1
from clara_hf.metrics.answer_f1.answer_f1 import (
    ANSWER_METRICS,
    cover_exact_match,
    exact_match,
    normalize_answer,
    score_answer,
    token_f1,
)


ROOT = Path(__file__).parents[2]
WORDS = [
    *(
        "the",
        "The",
        "a",
        "An",
        "an",
        "ant",
        "theatre",
        "yes",
        "No",
        "noanswer",
        "no.",
        "Yes!",
        "U.S.",
        "don't",
        "rock-n-roll",
    ),
    *(
        "Köln",
        "İzmir",
        "ß",
        "naïve",
        "東京",
        "ﬁre",
        "１２",
        "12",
        "12.5",
        "«quoted»",
        "it’s",
        "…",
        "-",
        "'",
        "red",
        "red",
        "blue",
    ),
    *("", " ", "\t", "\u00a0", "e\u0301", "é"),
]


def official_normalize(text):
    """SQuAD v1.1: white_space_fix(remove_articles(remove_punc(lower(s))))."""
    lowered = text.lower()
    excluded = set(string.punctuation)
    without = "".join(character for character in lowered if character not in excluded)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", without).split())


def official_f1(prediction, answer):
    """HotpotQA's f1_score, which is SQuAD v1.1's with the rule for yes, no and noanswer in front."""
    prediction, answer = official_normalize(prediction), official_normalize(answer)
    if prediction in ["yes", "no", "noanswer"] and prediction != answer:
        return 0
    if answer in ["yes", "no", "noanswer"] and prediction != answer:
        return 0
    common = Counter(prediction.split()) & Counter(answer.split())
    num_same = sum(common.values())
    if num_same == 0:
        return 0
    precision = 1.0 * num_same / len(prediction.split())
    recall = 1.0 * num_same / len(answer.split())
    return (2 * precision * recall) / (precision + recall)


def random_pairs(count=1000):
    """Pairs of short texts that share some words."""
    chance = random.Random(0)
    for _ in range(count):
        pool = chance.sample(WORDS, 6)
        yield tuple(chance.choice("   ,").join(chance.choices(pool, k=chance.randint(0, 4))) for _ in range(2))


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("The  Battle of\tGuam!", "battle of guam"),
        ("U.S.", "us"),
        ("a theatre, an ant", "theatre ant"),
        ("the", ""),
        ("", ""),
        ("L'Été", "lété"),
        ("it’s «x»", "it’s «x»"),
        ("a-b", "ab"),
    ],
)
def test_normalisation_drops_case_ascii_punctuation_and_articles(text, expected):
    assert normalize_answer(text) == expected


@pytest.mark.parametrize(
    ("prediction", "answer", "em", "f1", "cover_em"),
    [
        ("the Battle of Guam.", "Battle of Guam", 1, 1, 1),
        ("in Paris, France", "Paris", 0, 0.5, 1),
        ("Paris", "Paris, France", 0, 2 / 3, 0),
        ("France Paris", "Paris, France", 0, 1, 1),
        ("red red", "red", 0, 2 / 3, 1),
        ("red", "red red", 0, 2 / 3, 1),
        ("", "red", 0, 0, 0),
        ("red", "the", 0, 0, 0),
        ("", "", 1, 0, 1),
        ("The", "an", 1, 0, 1),
        ("Köln", "köln", 1, 1, 1),
        ("Koln", "Köln", 0, 0, 0),
        ("no", "No.", 1, 1, 1),
        ("yes", "no", 0, 0, 0),
        ("yes it is", "yes", 0, 0, 1),
        ("no", "no one", 0, 0, 0),
        ("noanswer", "noanswer at all", 0, 0, 0),
        ("yes no", "yes it is", 0, 0.4, 0),
    ],
)
def test_scores_equal_those_worked_by_hand(prediction, answer, em, f1, cover_em):
    expected = {"em": em, "f1": f1, "cover_em": cover_em}
    assert score_answer(prediction, [answer]) == pytest.approx(expected)


def test_a_thousand_random_pairs_agree_with_the_published_definitions():
    different = 0
    for prediction, answer in random_pairs():
        assert normalize_answer(prediction) == official_normalize(prediction)
        assert exact_match(prediction, answer) == (official_normalize(prediction) == official_normalize(answer))
        assert token_f1(prediction, answer) == pytest.approx(official_f1(prediction, answer), abs=1e-12)
        different += 0 < token_f1(prediction, answer) < 1
    assert different > 50


def test_a_thousand_random_pairs_agree_with_another_librarys_squad():
    """torchmetrics scores SQuAD v2: two empty answers are equal there; and SQuAD has no rule for yes and no."""
    squad = pytest.importorskip("torchmetrics.functional.text").squad
    compared = closed = 0
    for prediction, answer in random_pairs(2400):
        normalized = {official_normalize(prediction), official_normalize(answer)}
        target = {"id": "1", "answers": {"answer_start": [0], "text": [answer]}}
        found = squad([{"id": "1", "prediction_text": prediction}], [target])
        assert 100 * exact_match(prediction, answer) == found["exact_match"].item()
        if len(normalized) == 2 and normalized & {"yes", "no", "noanswer"}:
            closed += 1
            assert token_f1(prediction, answer) == 0
        elif "" not in normalized:
            compared += 1
            assert 100 * token_f1(prediction, answer) == pytest.approx(found["f1"].item(), abs=1e-4)
    assert compared > 1000 and closed > 10


def test_cover_em_is_never_below_em():
    assert all(cover_exact_match(*pair) >= exact_match(*pair) for pair in random_pairs())


def test_each_score_is_the_maximum_over_the_accepted_answers():
    scores = score_answer("in the city of Lyon", ["Lyon", "city of Lyon France", "Paris"])
    assert scores == pytest.approx({"em": 0, "f1": 0.75, "cover_em": 1})


def test_a_question_without_accepted_answers_is_an_error():
    with pytest.raises(ValueError, match="without accepted answers"):
        score_answer("red", [])


def test_the_module_loads_by_path_and_equals_the_functions():
    metric = evaluate.load(str(ROOT / "eval/metrics/answer_f1"))
    pairs = list(random_pairs(50))
    predictions, references = [pair[0] for pair in pairs], [[pair[1], "red"] for pair in pairs]
    expected = [score_answer(*pair) for pair in zip(predictions, references, strict=True)]
    values = metric.compute(predictions=predictions, references=references, per_example=True)
    assert values == {name: [score[name] for score in expected] for name in ANSWER_METRICS}
    means = metric.compute(predictions=predictions, references=references)
    assert means == pytest.approx({name: sum(column) / 50 for name, column in values.items()})
    assert metric.description and metric.citation and "references" in metric.inputs_description


def test_the_examples_in_its_description_run(monkeypatch):
    monkeypatch.chdir(ROOT)
    outcome = doctest.testmod(answer_f1, extraglobs={"evaluate": evaluate})
    assert outcome.attempted >= 4 and outcome.failed == 0
