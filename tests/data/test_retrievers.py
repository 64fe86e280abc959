"""BM25 by language, and scores of given candidates."""

import numpy as np
import pytest

from clara_hf.data.retrievers import BM25Retriever, bm25_words


@pytest.mark.parametrize(
    ("language", "text", "words"),
    [
        ("en", "The otters were sleeping", ["otter", "were", "sleep"]),
        ("de", "Die Häuser und Gärten sind schön", ["haus", "gart", "schon"]),
        ("fr", "Les chevaux et les maisons", ["cheval", "maison"]),
        ("zh", "天文台位于山上 abc", ["天", "文", "台", "位", "山", "上", "abc"]),
        ("fi", "taloissa", ["talo"]),
    ],
)
def test_words_are_stemmed_and_stop_words_left_out_by_language(language, text, words):
    assert bm25_words([text], language) == [words]


def test_an_unknown_language_is_named_with_those_that_are_known():
    with pytest.raises(ValueError, match="'xx'.*da, de, el, en"):
        BM25Retriever(["text"], "xx")


def test_a_question_finds_other_forms_of_its_words_in_its_own_language():
    texts = ["Die Gärten liegen am Fluss.", "Das Haus steht am Berg."]
    assert BM25Retriever(texts, "de").search(["Wo ist der Garten?"], 2) == [[0]]
    assert BM25Retriever(texts, "en").search(["Wo ist der Garten?"], 2) == [[]]


def test_scores_of_candidates_are_those_of_the_search():
    chance = np.random.default_rng(0)
    words = [f"word{number}" for number in range(40)]
    texts = [" ".join(chance.choice(words, 12)) for _ in range(60)]
    retriever, questions = BM25Retriever(texts), [" ".join(chance.choice(words, 3)) for _ in range(9)]
    rows = [chance.permutation(60)[:25].tolist() for _ in questions]
    found = retriever.search(questions, 60)
    for scores, candidates, best in zip(retriever.scores(questions, rows), rows, found, strict=True):
        assert [row in best for row in candidates] == (scores > 0).tolist()
        ranks = [best.index(row) for row, score in zip(candidates, scores, strict=True) if score > 0]
        by_rank = [scores[candidates.index(best[rank])] for rank in sorted(ranks)]
        assert by_rank == sorted(by_rank, reverse=True)
