"""The question-answering schema: one row per question, in a file of any kind that `clara_hf.data.sources` reads.

    {"id": "q1", "question": "...", "answers": ["...", ...], "docs": ["...", ...], "pos_index": [3], "type": "two-hop"}

`answers` are all accepted answers, `docs` the question's candidates, `pos_index` the positions of the gold documents
among them, `target` is the answer to train on (default: the first of `answers`). `id` (default: the line number),
`pos_index`, `target` and `type` are optional; further keys are kept in `QAExample.extra`.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from clara_hf.data.files import DataError, shown
from clara_hf.data.sources import read_jsonl, read_rows, unit_of


__all__ = [
    "DataError",
    "QAExample",
    "distinct_docs",
    "iter_examples",
    "iter_scp",
    "load_examples",
    "load_scp",
    "parse_example",
    "read_jsonl",
]

REQUIRED = ("question", "answers", "docs")


@dataclass(frozen=True)
class QAExample:
    """One question with its candidates.

    Attributes:
        id: unique in its file.
        question: the question's text.
        answers: accepted answers, at least one, which an evaluation compares with.
        docs: candidate documents, at least one; their order carries no meaning.
        pos_index: positions of the gold documents in `docs`, ascending; `None` where they are not known.
        target: the answer to train on where it is another than `answers[0]`, such as a generated one; or `None`.
        type: the kind of question (`"two-hop"`), or `None`; results are also reported per kind.
        extra: every other key of the line.
    """

    id: str
    question: str
    answers: list[str]
    docs: list[str]
    pos_index: list[int] | None = None
    type: str | None = None
    target: str | None = None
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def gold(self) -> list[str]:
        """Texts of the gold documents; empty where they are not known."""
        return [self.docs[index] for index in self.pos_index or []]


def iter_examples(source: str | Path, needs_answers: bool = True) -> Iterator[QAExample]:
    """Reads and checks questions one after the other; of those read before, only ids are kept.

    Args:
        source: a file, a folder or a data set on the Hub, as in `clara_hf.data.sources`.
        needs_answers: `False` where only retrieval is trained.

    Raises:
        DataError: a row breaks the schema, an id is used twice, or there is no question at all.
    """
    unit = unit_of(source)
    numbers: dict[str, int] = {}
    for number, row in read_rows(source):
        try:
            example = parse_example(row, str(number), needs_answers)
        except ValueError as error:
            raise DataError(f"{source}, {unit} {number}: {error}") from error
        earlier = numbers.setdefault(example.id, number)
        if earlier != number:
            raise DataError(f"{source}, {unit} {number}: id {example.id!r} is already used in {unit} {earlier}.")
        yield example
    if not numbers:
        raise DataError(f"{source}: the file holds no question.")


def load_examples(source: str | Path, needs_answers: bool = True) -> list[QAExample]:
    """Reads and checks all questions of a file, a folder or a data set on the Hub; see [`iter_examples`].

    Raises:
        DataError: as [`iter_examples`].
    """
    return list(iter_examples(source, needs_answers))


def iter_scp(source: str | Path) -> Iterator[dict[str, Any]]:
    """Reads and checks SCP rows one after the other: `data_type` (`qa` or `paraphrase`), `question`, `answers`, `docs`.

    A `qa` row has as many questions as answers; a `paraphrase` row has one answer and no question.

    Raises:
        DataError: a row breaks the schema, or there is no row at all.
    """
    unit, is_empty = unit_of(source), True
    for number, row in read_rows(source):
        try:
            parsed = parse_scp(row)
        except ValueError as error:
            raise DataError(f"{source}, {unit} {number}: {error}") from error
        yield parsed
        is_empty = False
    if is_empty:
        raise DataError(f"{source}: the file holds no row.")


def load_scp(source: str | Path) -> list[dict[str, Any]]:
    """Reads and checks all SCP rows of a file, a folder or a data set on the Hub; see [`iter_scp`].

    Raises:
        DataError: as [`iter_scp`].
    """
    return list(iter_scp(source))


def parse_scp(row: dict[str, Any]) -> dict[str, Any]:
    """Checks one row of the first stage.

    Raises:
        ValueError: says which field is wrong, and how.
    """
    for name in ("data_type", *REQUIRED):
        if name not in row:
            raise ValueError(f"the field {name!r} is missing.")
    kind, questions = row["data_type"], row["question"]
    if kind not in ("qa", "paraphrase"):
        raise ValueError(f"'data_type' must be 'qa' or 'paraphrase', but is {shown(kind)}.")
    check_texts("answers", row["answers"])
    check_texts("docs", row["docs"])
    if kind == "qa":
        check_texts("question", questions)
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
    identifier = default_id if row.get("id") is None else row["id"]
    if type(identifier) not in (str, int):
        raise ValueError(f"'id' must be a string, but is {shown(identifier)}.")
    check_text("id", str(identifier))
    for name in ("type", "target"):
        if row.get(name) is not None:
            check_text(name, row[name])
    check_text("question", row["question"])
    if needs_answers or row["answers"] != []:
        check_texts("answers", row["answers"])
    check_texts("docs", row["docs"])
    return QAExample(
        id=str(identifier),
        question=row["question"],
        answers=row["answers"],
        docs=row["docs"],
        pos_index=_gold(row.get("pos_index"), len(row["docs"])),
        type=row.get("type"),
        target=row.get("target"),
        extra={name: row[name] for name in row if name not in (*REQUIRED, "id", "type", "target", "pos_index")},
    )


def distinct_docs(docs: Sequence[str], pos_index: Iterable[int] = ()) -> tuple[list[str], list[int]]:
    """The distinct texts of `docs`, each at the place of its first copy, and the gold positions among them.

    A text is gold if any of its copies is.

    >>> distinct_docs(["A", "A", "B"], [1, 2])
    (['A', 'B'], [0, 1])

    Raises:
        IndexError: a gold position beyond `docs`.
    """
    place = {text: number for number, text in enumerate(dict.fromkeys(docs))}
    return list(place), sorted({place[docs[index]] for index in pos_index})


def check_text(name: str, value: Any) -> None:
    if not isinstance(value, str):
        raise ValueError(f"{name!r} must be a string, but is {shown(value)}.")
    if not value.strip():
        raise ValueError(f"{name!r} is empty.")
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name!r} holds half a surrogate pair, which no tokenizer can read.") from None


def check_texts(name: str, values: Any) -> None:
    if not isinstance(values, list):
        raise ValueError(f"{name!r} must be a list of strings, but is {shown(values)}.")
    if not values:
        raise ValueError(f"{name!r} is an empty list.")
    for index, value in enumerate(values):
        check_text(f"{name}[{index}]", value)


def _gold(value: Any, num_docs: int) -> list[int] | None:
    if value is None or value == []:
        return None
    if not isinstance(value, list) or any(type(index) is not int for index in value):
        raise ValueError(f"'pos_index' must be a list of integers, but is {shown(value)}.")
    for index in value:
        if not 0 <= index < num_docs:
            raise ValueError(f"gold index {index} in 'pos_index' is out of range for {num_docs} docs.")
    if len(set(value)) < len(value):
        raise ValueError(f"'pos_index' names a document twice: {value}.")
    return sorted(value)
