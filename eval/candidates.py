"""Candidate pools for one's own corpus: questions and passages in, questions with `docs` and `pos_index` out."""

import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from eval.leak_checks import AnswerFinder
from eval.retrievers import Retriever, make_retriever, random_rows


MODES = ("oracle", "normal")


def build_candidates(
    questions: Sequence[Mapping[str, Any]],
    corpus: Mapping[str, str],
    retriever: str | Retriever = "bm25",
    size: int = 20,
    mode: str = "oracle",
    seed: int = 0,
    exclude_answers: bool = False,
    show_progress: bool = False,
) -> list[dict[str, Any]]:
    """Gives each question `size` distinct candidates of the corpus, in a random order.

    Passages are the same where they differ only in case and white space: such copies count once, so that a positive is
    never in a pool twice, nor its copy a negative. What the retriever does not find (BM25: no common word) is filled up
    with passages drawn by chance. A question's pool depends on `seed`, its id and the corpus alone.

    Args:
        questions: rows with `question`, `answers`, and optionally `id` (default: the position from 1) and `positives`,
            ids of the corpus. Further keys are kept.
        corpus: passage id -> text.
        retriever: `"bm25"`, the name or folder of a sentence-transformers bi-encoder, or a [`Retriever`] over
            `distinct_passages(corpus)[0]`.
        size: candidates per question (the paper's N).
        mode: `"oracle"`: all positives, filled up with the best-ranked others. `"normal"`: the best `size`, whether
            positives are among them or not.
        seed: of the order and of what is drawn by chance.
        exclude_answers: leave out negatives that contain an accepted answer.
        show_progress: progress bars.

    Returns:
        The rows with `id`, `docs`, `doc_ids` (ids in the corpus) and `pos_index` (positions of positives in `docs`,
        ascending; empty where none is in the pool).

    Raises:
        ValueError: an unknown mode, a size below 1, a corpus or a question that cannot fill a pool, a positive that is
            not in the corpus, or in oracle mode a question without positives.
    """
    if mode not in MODES:
        raise ValueError(f"mode is {mode!r}; it must be 'oracle' or 'normal'.")
    if size < 1:
        raise ValueError(f"size is {size}; it must be at least 1.")
    texts, ids, rows_of = distinct_passages(corpus)
    if len(texts) < size:
        raise ValueError(f"the corpus holds {len(texts)} distinct passages, too few for pools of {size}.")
    positives = [_positive_rows(name, question, rows_of, size, mode) for name, question in _named(questions)]
    if isinstance(retriever, str):
        retriever = make_retriever(retriever, texts, show_progress=show_progress)
    # As many more as could be passed over, so that the pool is filled from the ranking.
    depth = (3 if exclude_answers else 2) * size
    rankings = retriever.search([question["question"] for question in questions], depth)
    pools = []
    for (name, question), gold, ranking in zip(_named(questions), positives, rankings, strict=True):
        chance = np.random.default_rng([seed, zlib.crc32(name.encode())])
        answers = AnswerFinder(question["answers"] if exclude_answers else ())
        pool = dict.fromkeys(gold if mode == "oracle" else ())
        passed = set(pool)
        while len(pool) < size:
            for row in ranking:
                if len(pool) < size and row not in passed:
                    passed.add(row)
                    if row in gold or not answers.found_in(texts[row]):
                        pool[row] = None
            if len(pool) < size and len(passed) == len(texts):
                raise ValueError(
                    f"question {name!r}: only {len(pool)} passages hold none of its answers, {size} are needed."
                )
            # Twice as many each time, should nearly all of them hold an answer.
            ranking = random_rows(chance, len(texts), max(size, len(passed)), passed)
        order = chance.permutation(list(pool)).tolist()
        pools.append(
            {
                **question,
                "id": name,
                "docs": [texts[row] for row in order],
                "doc_ids": [ids[row] for row in order],
                "pos_index": [position for position, row in enumerate(order) if row in gold],
            }
        )
    return pools


def distinct_passages(corpus: Mapping[str, str]) -> tuple[list[str], list[str], dict[str, int]]:
    """Texts of the corpus without copies, the ids of their first occurrence, and for every id the row of its text."""
    texts, ids, rows_of, seen = [], [], {}, {}
    for name, text in corpus.items():
        row = seen.setdefault(same_text_key(text), len(texts))
        rows_of[name] = row
        if row == len(texts):
            texts.append(text)
            ids.append(name)
    return texts, ids, rows_of


def same_text_key(text: str) -> str:
    """What two texts share when they differ only in case and white space."""
    return " ".join(text.casefold().split())


def _named(questions):
    return ((str(question.get("id", number)), question) for number, question in enumerate(questions, start=1))


def _positive_rows(name, question, rows_of, size, mode):
    positives = question.get("positives") or []
    for positive in positives:
        if positive not in rows_of:
            raise ValueError(f"question {name!r}: its positive {positive!r} is not in the corpus.")
    rows = {rows_of[positive] for positive in positives}
    if mode == "oracle" and not rows:
        raise ValueError(f"question {name!r} has no positives: give them, or use the mode 'normal'.")
    if len(rows) > size:
        raise ValueError(f"question {name!r} has {len(rows)} positives, more than its pool of {size} holds.")
    return rows
