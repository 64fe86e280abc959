"""A corpus of one's own, and questions about it, before they have candidates."""

from collections.abc import Mapping
from itertools import count
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm

from clara_hf.data.files import shown
from clara_hf.data.schema import DataError, check_text, check_texts, parse_example
from clara_hf.data.sources import read_rows, unit_of


TEXTS = ("text", "contents", "content")


def read_corpus(source: str | Path, show_progress: bool = False) -> dict[str, str]:
    """Passages by id: `text` (or `contents`, `content`) behind its `title`, if it has one, and a line break.

    Raises:
        DataError: a row has no text, an id is used twice, or there is no row at all.
    """
    corpus: dict[str, str] = {}
    unit = unit_of(source)
    rows = read_rows(source)
    for number, row in tqdm(rows, desc="reading the corpus", unit=" passages", disable=not show_progress, leave=False):
        try:
            # An id that is null is none, as in eval/data.py.
            name = str(next((row[key] for key in ("id", "_id") if row.get(key) is not None), number))
            field_name = next((name for name in TEXTS if name in row), "text")
            check_text(field_name, row.get(field_name))
            if name in corpus:
                raise ValueError(f"id {name!r} is already used.")
            corpus[name] = f"{row['title']}\n{row[field_name]}" if row.get("title") else row[field_name]
        except ValueError as error:
            raise DataError(f"{source}, {unit} {number}: {error}") from error
    if not corpus:
        raise DataError(f"{source}: the file holds no passage.")
    return corpus


def read_questions(source: str | Path, corpus: dict[str, str], pooled: bool = False) -> list[dict[str, Any]]:
    """Questions for [`build_candidates`], whose gold documents become `positives`.

    Args:
        source: rows with `question` and optionally `answers`, `id` and `positives`, or `docs` and `pos_index`.
        corpus: passages by id; gold documents that it lacks are added under new ids, so that they are candidates of
            other questions, too.
        pooled: all `docs` are added, not the gold ones alone.

    Raises:
        DataError: a row breaks the schema, an id is used twice, or there is no question at all.
    """
    ids = {same_text_key(text): name for name, text in corpus.items()}
    unit, questions, numbers = unit_of(source), [], {}
    for number, row in read_rows(source):
        try:
            question = _question(row, str(number))
            if question["id"] in numbers:
                raise ValueError(f"id {question['id']!r} is already used in {unit} {numbers[question['id']]}.")
        except ValueError as error:
            raise DataError(f"{source}, {unit} {number}: {error}") from error
        numbers[question["id"]] = number
        gold = [question["docs"][position] for position in question.pop("pos_index")]
        for text in [*gold, *(question["docs"] if pooled else ())]:
            if (key := same_text_key(text)) not in ids:
                ids[key] = _unused_id(corpus)
                corpus[ids[key]] = text
        question["positives"] = question["positives"] or [ids[same_text_key(text)] for text in gold]
        del question["docs"]
        questions.append(question)
    if not questions:
        raise DataError(f"{source}: the file holds no question.")
    return questions


def _unused_id(corpus):
    return next(name for number in count(len(corpus)) if (name := f"doc:{number}") not in corpus)


def _question(row, default_id):
    positives = row.get("positives") or []
    if not isinstance(positives, list) or any(type(name) not in (str, int) for name in positives):
        raise ValueError(f"'positives' must be a list of ids, but is {shown(positives)}.")
    if row.get("docs"):
        example = parse_example(row, default_id, needs_answers=False)
        checked = {"docs": example.docs, "pos_index": example.pos_index or [], "id": example.id}
    else:
        if "question" not in row:
            raise ValueError("the field 'question' is missing.")
        check_text("question", row["question"])
        if row.get("answers", []) != []:
            check_texts("answers", row["answers"])
        checked = {"docs": [], "pos_index": [], "id": default_id if row.get("id") is None else str(row["id"])}
    return {"answers": [], **row, **checked, "positives": [str(name) for name in positives]}


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
