"""Which documents a question is answered from, where no ranking decides."""

from collections.abc import Iterable
from dataclasses import replace

import numpy as np
from transformers.utils import logging

from clara_hf.data.schema import QAExample
from clara_hf.evaluation.plan import SHUFFLED
from clara_hf.metrics.answer_f1.answer_f1 import normalize_answer


logger = logging.get_logger(__name__)


def distinct_candidates(examples: list[QAExample], dataset: str) -> tuple[list[QAExample], dict[str, list[int]]]:
    """Questions whose candidates are distinct texts: copies are one candidate, gold where any copy is.

    Returns:
        The questions, and for those that had copies, by id, the position in the file of every candidate that is left.
    """
    distinct, places = [], {}
    for one in examples:
        docs = list(dict.fromkeys(one.docs))
        if len(docs) < len(one.docs):
            gold = one.pos_index and sorted({docs.index(one.docs[at]) for at in one.pos_index})
            places[one.id] = [one.docs.index(document) for document in docs]
            one = replace(one, docs=docs, pos_index=gold)
        distinct.append(one)
    if places:
        logger.warning(f"{dataset}: {len(places)} questions have candidates with equal texts, which count as one.")
    return distinct, places


def fixed_documents(chooser: str, examples: list[QAExample], seed: int) -> list[list[str] | None]:
    """The documents of a system that ranks none (`UNRANKED`); `None` for a question that it does not apply to."""
    if chooser in ("gold", SHUFFLED):
        return [example.gold or None for example in examples]
    if chooser == "no-memory":
        return [[] for _ in examples]
    return wrong_documents(examples, seed)


def wrong_documents(examples: list[QAExample], seed: int) -> list[list[str] | None]:
    """For each question the gold documents of another question that has other answers, as many as its own.

    Where no such question has as many, documents of several are put together. None of them is a gold document of the
    question itself. `None` where the question's gold documents are not known, or too few others are.
    """
    answers = [{normalize_answer(answer) for answer in example.answers} for example in examples]
    starts = np.random.default_rng(seed).integers(len(examples), size=len(examples))
    chosen = []
    for index, example in enumerate(examples):
        # A generator: nearly always the first question that it gives will do.
        others = (
            examples[other].gold
            for other in (np.arange(len(examples)) + starts[index]) % len(examples)
            if answers[other].isdisjoint(answers[index]) and set(examples[other].gold).isdisjoint(example.gold)
        )
        chosen.append(_as_many(len(example.gold), others) if example.gold else None)
    return chosen


def _as_many(count: int, others: Iterable[list[str]]) -> list[str] | None:
    pool = {}
    for documents in others:
        if len(documents) == count:
            return documents
        pool.update(dict.fromkeys(documents))
    return list(pool)[:count] if len(pool) >= count else None
