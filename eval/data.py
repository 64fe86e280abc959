"""The question-answering schema: one JSON object per line, `.gz` or not.

    {"id": "q1", "question": "...", "answers": ["...", ...], "docs": ["...", ...], "pos_index": [3], "type": "two-hop"}

`answers` are all accepted answers (the first is the training target), `docs` the question's candidates, `pos_index` are
the positions of the gold documents among them. `id` (default: the line number), `pos_index` and `type` are optional;
further keys are kept in `QAExample.extra`. Blank lines are skipped.
"""

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


REQUIRED = ("question", "answers", "docs")


class DataError(ValueError):
    """A data file breaks the schema; the message names the file, the line and what is wrong."""


@dataclass(frozen=True)
class QAExample:
    """One question with its candidates.

    Attributes:
        id: unique in its file.
        question: the question's text.
        answers: accepted answers, at least one.
        docs: candidate documents, at least one; their order carries no meaning.
        pos_index: positions of the gold documents in `docs`, ascending; `None` where they are not known.
        type: the kind of question (`"two-hop"`), or `None`; results are also reported per kind.
        extra: every other key of the line.
    """

    id: str
    question: str
    answers: list[str]
    docs: list[str]
    pos_index: list[int] | None = None
    type: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def gold(self) -> list[str]:
        """Texts of the gold documents; empty where they are not known."""
        return [self.docs[index] for index in self.pos_index or []]


def read_jsonl(path: str | Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (line number from 1, object) of a JSONL file, gzipped where its name ends in `.gz`.

    Raises:
        DataError: the file cannot be read, or a line is not UTF-8, not JSON or not an object.
    """
    number = 0
    try:
        with gzip.open(path) if str(path).endswith(".gz") else open(path, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                if line.strip():
                    yield number, _parse(path, number, line)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise DataError(f"{path}, after line {number}: the gzip data is damaged ({error}).") from error
    except OSError as error:
        raise DataError(f"{path}: the file cannot be read ({error.strerror}).") from error


def load_examples(path: str | Path, needs_answers: bool = True) -> list[QAExample]:
    """Reads and checks a whole file of questions; `needs_answers=False` where only retrieval is trained.

    Raises:
        DataError: a line breaks the schema, an id is used twice, or there is no question at all.
    """
    examples, lines = [], {}
    for number, row in read_jsonl(path):
        try:
            example = parse_example(row, str(number), needs_answers)
        except ValueError as error:
            raise DataError(f"{path}, line {number}: {error}") from error
        if example.id in lines:
            raise DataError(f"{path}, line {number}: id {example.id!r} is already used in line {lines[example.id]}.")
        lines[example.id] = number
        examples.append(example)
    if not examples:
        raise DataError(f"{path}: the file holds no question.")
    return examples


def load_scp(path: str | Path) -> list[dict[str, Any]]:
    """Reads and checks a file of SCP rows: `data_type` (`qa` or `paraphrase`), `question`, `answers`, `docs`.

    A `qa` row has as many questions as answers; a `paraphrase` row has one answer and no question.

    Raises:
        DataError: a line breaks the schema, or there is no row at all.
    """
    rows = []
    for number, row in read_jsonl(path):
        try:
            rows.append(_parse_scp(row))
        except ValueError as error:
            raise DataError(f"{path}, line {number}: {error}") from error
    if not rows:
        raise DataError(f"{path}: the file holds no row.")
    return rows


def _parse_scp(row: dict[str, Any]) -> dict[str, Any]:
    for name in ("data_type", *REQUIRED):
        if name not in row:
            raise ValueError(f"the field {name!r} is missing.")
    kind, questions = row["data_type"], row["question"]
    if kind not in ("qa", "paraphrase"):
        raise ValueError(f"'data_type' must be 'qa' or 'paraphrase', but is {_shown(kind)}.")
    _check_texts("answers", row["answers"])
    _check_texts("docs", row["docs"])
    if kind == "qa":
        _check_texts("question", questions)
        if len(questions) != len(row["answers"]):
            raise ValueError(f"there are {len(questions)} questions, but {len(row['answers'])} answers.")
    elif questions != [] or len(row["answers"]) != 1:
        raise ValueError("a paraphrase has one answer and an empty list as 'question'.")
    return {"data_type": kind, "question": list(questions), "answers": row["answers"], "docs": row["docs"]}


def parse_example(row: dict[str, Any], default_id: str, needs_answers: bool = True) -> QAExample:
    """Checks one row of the schema; with `needs_answers=False` it may be without `answers`.

    Raises:
        ValueError: says which field is wrong, and how.
    """
    if not needs_answers:
        row = {"answers": [], **row}
    for name in REQUIRED:
        if name not in row:
            raise ValueError(f"the field {name!r} is missing.")
    identifier = row.get("id", default_id)
    if type(identifier) not in (str, int):
        raise ValueError(f"'id' must be a string, but is {_shown(identifier)}.")
    kind = row.get("type")
    if kind is not None:
        _check_text("type", kind)
    _check_text("question", row["question"])
    if needs_answers or row["answers"] != []:
        _check_texts("answers", row["answers"])
    _check_texts("docs", row["docs"])
    return QAExample(
        id=str(identifier),
        question=row["question"],
        answers=row["answers"],
        docs=row["docs"],
        pos_index=_gold(row.get("pos_index"), len(row["docs"])),
        type=kind,
        extra={name: row[name] for name in row if name not in (*REQUIRED, "id", "type", "pos_index")},
    )


def _parse(path: str | Path, number: int, line: bytes) -> dict[str, Any]:
    where = f"{path}, line {number}"
    try:
        # Files saved on Windows may start with a byte order mark.
        row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8").strip())
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 text (byte {error.start}).") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: malformed JSON, {error.msg} at column {error.colno}.") from error
    if not isinstance(row, dict):
        raise DataError(f"{where}: a JSON object is expected, but the line holds {_shown(row)}.")
    return row


def _check_text(name: str, value: Any) -> None:
    if not isinstance(value, str):
        raise ValueError(f"{name!r} must be a string, but is {_shown(value)}.")
    if not value.strip():
        raise ValueError(f"{name!r} is empty.")
    if any("\ud800" <= character <= "\udfff" for character in value):
        raise ValueError(f"{name!r} holds half a surrogate pair, which no tokenizer can read.")


def _check_texts(name: str, values: Any) -> None:
    if not isinstance(values, list):
        raise ValueError(f"{name!r} must be a list of strings, but is {_shown(values)}.")
    if not values:
        raise ValueError(f"{name!r} is an empty list.")
    for index, value in enumerate(values):
        _check_text(f"{name}[{index}]", value)


def _gold(value: Any, num_docs: int) -> list[int] | None:
    if value is None or value == []:
        return None
    if not isinstance(value, list) or any(type(index) is not int for index in value):
        raise ValueError(f"'pos_index' must be a list of integers, but is {_shown(value)}.")
    for index in value:
        if not 0 <= index < num_docs:
            raise ValueError(f"gold index {index} in 'pos_index' is out of range for {num_docs} docs.")
    if len(set(value)) < len(value):
        raise ValueError(f"'pos_index' names a document twice: {value}.")
    return sorted(value)


def _shown(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + "..."
