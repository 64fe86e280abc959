"""Candidate pools: what is in them, for which retriever, and the sentence for what cannot be built."""

import numpy as np
import pytest

from eval.candidates import build_candidates, distinct_passages
from eval.retrievers import BM25Retriever, random_rows


ANIMALS = ("heron", "otter", "badger", "lynx", "marten", "beaver", "falcon", "plover", "weasel", "ibex")
PLACES = ("harbour", "quarry", "orchard", "meadow", "glacier")
CORPUS = {f"{animal}-{place}": f"The {animal} sleeps near the old {place}." for animal in ANIMALS for place in PLACES}


def question(name, **fields):
    animal, place = name.split("-")
    text = f"Which animal, a {animal}, sleeps near the {place}?"
    return {"id": f"q-{name}", "question": text, "answers": [animal], "positives": [name], **fields}


QUESTIONS = [question(name) for name in CORPUS]


def test_oracle_pools_hold_every_positive_once_and_the_best_ranked_others():
    questions = [question("otter-quarry", positives=["otter-quarry", "heron-glacier"])]
    (row,) = build_candidates(questions, CORPUS, size=8)
    assert len(row["docs"]) == len(set(row["docs"])) == 8
    assert {row["doc_ids"][position] for position in row["pos_index"]} == {"otter-quarry", "heron-glacier"}
    assert row["docs"] == [CORPUS[name] for name in row["doc_ids"]]
    # The five others about the animal or the place that BM25 puts first share a word with the question.
    negatives = set(row["doc_ids"]) - {"otter-quarry", "heron-glacier"}
    assert all("otter" in name or "quarry" in name for name in negatives)
    assert row["positives"] == ["otter-quarry", "heron-glacier"] and row["answers"] == ["otter"]


def test_normal_pools_are_the_retrievers_best_whether_gold_or_not():
    questions = [question("otter-quarry", positives=["heron-glacier"]), question("otter-quarry", id="with gold")]
    without, found = build_candidates(questions, CORPUS, size=6, mode="normal")
    ranking = BM25Retriever(list(CORPUS.values())).search([questions[0]["question"]], 6)[0]
    assert set(without["doc_ids"]) == {list(CORPUS)[row] for row in ranking}
    assert without["pos_index"] == []
    assert [found["doc_ids"][position] for position in found["pos_index"]] == ["otter-quarry"]


@pytest.mark.parametrize("mode", ["oracle", "normal"])
def test_copies_of_a_passage_count_once(mode):
    name = "otter-quarry"
    copies = {"copy": CORPUS[name].upper(), "second copy": CORPUS[name].replace(" ", "\n ")}
    texts, ids, rows_of = distinct_passages({**CORPUS, **copies})
    assert len(texts) == len(ids) == len(CORPUS) and rows_of["copy"] == rows_of["second copy"] == rows_of[name]
    # The question names the passage and both of its copies.
    questions = [question(name, positives=[name, "copy", "second copy"])]
    (row,) = build_candidates(questions, {**CORPUS, **copies}, size=20, mode=mode)
    folded = [" ".join(text.casefold().split()) for text in row["docs"]]
    assert len(set(folded)) == 20 and len(row["pos_index"]) == 1


def test_the_order_carries_no_meaning_and_depends_on_seed_and_id_alone():
    rows = build_candidates(QUESTIONS, CORPUS, size=10)
    places = [row["pos_index"][0] for row in rows]
    assert len(set(places)) >= 8
    backwards = build_candidates(QUESTIONS[::-1], CORPUS, size=10)
    assert backwards[::-1] == rows == build_candidates(QUESTIONS, CORPUS, size=10)
    assert rows != build_candidates(QUESTIONS, CORPUS, size=10, seed=1)


def test_what_is_not_found_is_filled_up_by_chance():
    questions = [{"question": "東京?", "answers": ["x"], "positives": ["lynx-meadow"], "id": str(n)} for n in range(30)]
    rows = build_candidates(questions, CORPUS, size=10)
    assert all(len(set(row["docs"])) == 10 for row in rows)
    assert len({name for row in rows for name in row["doc_ids"]}) > 40
    (whole,) = build_candidates(questions[:1], CORPUS, size=len(CORPUS), mode="normal")
    assert sorted(whole["doc_ids"]) == sorted(CORPUS)


def test_negatives_with_an_answer_can_be_left_out():
    (plain,) = build_candidates([question("otter-quarry")], CORPUS, size=10)
    (clean,) = build_candidates([question("otter-quarry")], CORPUS, size=10, exclude_answers=True)
    assert sum("otter" in name for name in plain["doc_ids"]) > 1
    assert [name for name in clean["doc_ids"] if "otter" in name] == ["otter-quarry"]
    with pytest.raises(
        ValueError, match="question 'q-otter-quarry': only 46 passages hold none of its answers, 47 are"
    ):
        build_candidates([question("otter-quarry")], CORPUS, size=47, exclude_answers=True)


def test_ids_default_to_the_position_and_further_keys_are_kept():
    row = {"question": "Where is the lynx?", "answers": ["meadow"], "positives": ["lynx-meadow"], "level": "hard"}
    first, second = build_candidates([row, row], CORPUS, size=5)
    assert (first["id"], second["id"], first["level"]) == ("1", "2", "hard")


@pytest.mark.parametrize(
    ("questions", "options", "message"),
    [
        (QUESTIONS, {"mode": "gold"}, "mode is 'gold'; it must be 'oracle' or 'normal'"),
        (QUESTIONS, {"size": 0}, "size is 0; it must be at least 1"),
        (QUESTIONS, {"size": 51}, "the corpus holds 50 distinct passages, too few for pools of 51"),
        ([question("lynx-meadow", positives=["x"])], {}, "'q-lynx-meadow': its positive 'x' is not in the corpus"),
        ([question("lynx-meadow", positives=[])], {}, "'q-lynx-meadow' has no positives: give them, or use the mode"),
        ([question("lynx-meadow", positives=list(CORPUS))], {}, "has 50 positives, more than its pool of 20 holds"),
    ],
)
def test_what_cannot_be_built_is_named(questions, options, message):
    with pytest.raises(ValueError, match=message):
        build_candidates(questions, CORPUS, **options)


def test_random_rows_are_distinct_free_and_reach_every_row():
    chance = np.random.default_rng(0)
    for size, count, taken in ((1000, 5, {1, 2}), (10, 5, {1, 2, 3}), (4, 9, {0}), (3, 1, {0, 1, 2})):
        rows = random_rows(chance, size, count, taken)
        assert len(rows) == len(set(rows)) == min(count, size - len(taken)) and not taken & set(rows)
    assert {row for _ in range(200) for row in random_rows(chance, 30, 3, {0})} == set(range(1, 30))
