"""What candidate pools give away: found where it was put in, and not where there is none."""

import random

import conftest
import pytest

from clara_hf.data.leak_checks import AnswerFinder, blind_rankings, format_report, leak_report
from clara_hf.data.schema import QAExample, load_examples


WORDS = [
    f"{first}{second}" for first in ("ba", "ko", "mi", "tu", "re", "so") for second in ("n", "lt", "rk", "sh", "v")
]
SHARED = conftest.SHARED / "data"


def text(chance, marked=False):
    words = chance.choices(WORDS, k=30)
    return " ".join(words) + (" (said to be so)." if marked else ".")


def pools(count, marked, distinct=True, seed=0):
    """`count` questions with ten candidates each; gold documents are written another way if `marked`."""
    chance = random.Random(seed)
    passages = [text(chance) for _ in range(count)]
    examples = []
    for number in range(count):
        gold = text(chance, marked) if distinct else passages[number]
        others = [text(chance) if distinct else passages[(number + 1 + step) % count] for step in range(9)]
        position = chance.randrange(10)
        docs = [*others[:position], gold, *others[position:]]
        examples.append(QAExample(str(number), "Where?", ["nowhere at all"], docs, [position]))
    return examples


def recall(rankings, examples):
    return sum(ranking[0] in example.pos_index for ranking, example in zip(rankings, examples, strict=True)) / len(
        examples
    )


@pytest.mark.parametrize("distinct", [True, False])
def test_gold_documents_of_the_same_style_are_not_found_blindly(distinct):
    # Where each gold document is another question's negative, knowing which documents were gold must not help or harm.
    examples = pools(300, marked=False, distinct=distinct)
    assert recall(blind_rankings(examples), examples) == pytest.approx(0.1, abs=0.06)


def test_gold_documents_of_another_style_are_found_blindly():
    examples = pools(300, marked=True)
    assert recall(blind_rankings(examples), examples) > 0.9
    assert blind_rankings(examples) == blind_rankings(examples)


def test_gold_documents_in_front_show_in_the_file_order():
    examples = [QAExample(e.id, e.question, e.answers, e.gold + e.docs[:5], [0]) for e in pools(30, marked=False)]
    report = leak_report(examples)
    assert report["file_order"] == {"recall@1": 1.0, "recall@3": 1.0, "recall@5": 1.0}
    assert report["random"] == pytest.approx({"recall@1": 1 / 6, "recall@3": 0.5, "recall@5": 5 / 6})
    assert "Recall@1/3/5 in the file's order: 100.0% / 100.0% / 100.0%" in format_report(report)


@pytest.mark.parametrize(
    ("answers", "document", "found"),
    [
        (["The Otter"], "An otter, asleep.", True),
        (["otter"], "Otters sleep.", False),
        (["U.S."], "It is in the US now", True),
        (["sleeping otter"], "otter sleeping", False),
        (["yes"], "yes, it is", False),
        (["no", "lynx"], "no lynx", True),
        (["the"], "the", False),
        ([], "anything", False),
        (["goat"], "\ufeffGoat, a friend.", True),
        (["goat"], "A friend is a goat \n", True),
    ],
)
def test_answers_are_looked_for_word_by_word(answers, document, found):
    assert AnswerFinder(answers).found_in(document) is found


def test_answers_in_negatives_are_counted():
    examples = [
        QAExample("1", "Who?", ["otter"], ["The otter.", "An otter!", "A lynx."], [0]),
        QAExample("2", "Who?", ["heron"], ["A lynx.", "The heron."], [1]),
        QAExample("3", "Is it?", ["yes"], ["yes", "yes"], [1]),
        QAExample("4", "Who?", ["lynx"], ["A lynx."], None),
    ]
    report = leak_report(examples)
    assert (report["questions"], report["with_gold"], report["candidates"]) == (4, 3, 2)
    assert (report["answer_in_gold"], report["answer_in_negatives"]) == (1.0, 0.5)
    assert report["negatives_with_answer"] == pytest.approx(1 / 3)
    assert report["question_blind"] is None
    unknown = leak_report(examples[3:])
    assert unknown["random"] is unknown["file_order"] is unknown["answer_in_gold"] is None
    assert "1 questions, 1.0 candidates each; 0 with gold documents" in format_report(unknown)


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason="CLARA_SHARED is not there")
@pytest.mark.parametrize(("name", "low", "high"), [("hotpotqa_dev10", 62, 76), ("nq_dev20_matched", 20, 30)])
def test_known_artefacts_of_real_pools_are_found(name, low, high):
    """HotpotQA's own distractors give gold away (chance is 50); gold passages of other questions do not (25)."""
    report = leak_report(load_examples(SHARED / f"{name}.jsonl.gz"))
    assert low < 100 * report["question_blind"]["recall@5"] < high
