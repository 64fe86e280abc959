"""Rows of data files as memory-mapped data sets: read, checked and written once per node, whatever their size."""

import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash

from clara_hf.data.files import DataError
from clara_hf.data.schema import iter_examples, iter_scp
from clara_hf.data.sources import digest_of


if TYPE_CHECKING:
    from datasets import Dataset


KINDS = ("questions", "labelled", "scp")
FORM = "1"  # changes when the same file gives other rows
WRITTEN_ROWS = 100  # at a time: twenty documents of 100 kB each make 200 MB


def training_rows(
    source: str | Path,
    kind: str = "questions",
    limit: int | None = None,
    targets: bool = True,
    cache_dir: str | Path | None = None,
) -> "Dataset":
    """Checked rows of a source, memory-mapped: no process holds more of them than it reads.

    They are written to the cache of `datasets` (`HF_DATASETS_CACHE`) under the digest of what the source holds, so that
    a second process, run or copy of the file finds them there.

    Args:
        source: of any kind that [`~clara_hf.data.sources.read_rows`] reads.
        kind: `"questions"`: columns `id`, `question`, `answers`, `docs`, `pos_index` (empty: not known). `"labelled"`:
            the same, `answers` may be empty. `"scp"`: `data_type`, `question` (a list), `answers`, `docs`.
        limit: take only so many rows from the start.
        targets: a question's `target` comes first among its answers; `False`: it is none of them, for evaluation.
        cache_dir: instead of the cache of `datasets`.

    Raises:
        DataError: as [`~clara_hf.data.schema.iter_examples`] and [`~clara_hf.data.schema.iter_scp`].
        ValueError: an unknown kind.
    """
    # Imported here: it takes a second.
    import datasets

    if kind not in KINDS:
        raise ValueError(f"kind is {kind!r}; it must be one of {', '.join(KINDS)}.")
    # Long texts have 64-bit places: a column of more than 2 GiB can be taken as a whole.
    texts = datasets.List(datasets.Value("large_string"))
    columns = {"answers": texts, "docs": texts}
    if kind == "scp":
        columns = {"data_type": datasets.Value("string"), "question": texts, **columns}
    else:
        columns = {"id": datasets.Value("string"), "question": datasets.Value("large_string"), **columns}
        columns["pos_index"] = datasets.List(datasets.Value("int64"))
    name = xxhash.xxh3_128_hexdigest(repr((FORM, kind, limit, targets, os.fspath(source), digest_of(source))).encode())
    try:
        return datasets.Dataset.from_generator(
            _rows,
            features=datasets.Features(columns),
            gen_kwargs={"source": os.fspath(source), "kind": kind, "limit": limit, "targets": targets},
            cache_dir=None if cache_dir is None else str(cache_dir),
            fingerprint=name,
            writer_batch_size=WRITTEN_ROWS,
        )
    except datasets.exceptions.DatasetGenerationError as error:
        told = error.__cause__
        if not isinstance(told, DataError | OSError):
            raise
    raise told  # out here: raised from `error`, which it caused, it would be its own cause


def _rows(source: str, kind: str, limit: int | None, targets: bool) -> Iterator[dict]:
    if kind == "scp":
        yield from islice(iter_scp(source), limit)
        return
    for example in islice(iter_examples(source, needs_answers=kind == "questions"), limit):
        answers = example.answers
        if targets and example.target is not None:
            answers = [example.target, *(answer for answer in answers if answer != example.target)]
        row = {"id": example.id, "question": example.question, "answers": answers, "docs": example.docs}
        yield {**row, "pos_index": example.pos_index or []}


def distinct_texts(rows: "Dataset", column: str) -> Iterator[tuple[int, list[str]]]:
    """Row number from 1 and those texts of its `column` that no earlier row has; a few rows in memory at a time."""
    seen: set[int] = set()
    for start in range(0, len(rows), WRITTEN_ROWS):
        batch = rows.select_columns(column)[start : start + WRITTEN_ROWS][column]
        for number, given in enumerate(batch, start=start + 1):
            fresh = []
            for text in [given] if isinstance(given, str) else given:
                key = xxhash.xxh3_64_intdigest(text.encode("utf-8", "surrogatepass"))
                if key not in seen:
                    seen.add(key)
                    fresh.append(text)
            if fresh:
                yield number, fresh


def shared_questions(train: "Dataset", other: "Dataset") -> int:
    """How many rows of `other` ask what a row of `train` asks, but for case and white space.

    Rows without a question (paraphrases) are told by their documents.
    """
    known = {key for key in _asked(train)}
    return sum(key in known for key in _asked(other))


def _asked(rows):
    for start in range(0, len(rows), WRITTEN_ROWS):
        batch = rows[start : start + WRITTEN_ROWS]
        for question, docs in zip(batch["question"], batch["docs"], strict=True):
            text = "\n".join([question] if isinstance(question, str) else question) or "\n".join(docs)
            yield xxhash.xxh3_64_intdigest(" ".join(text.casefold().split()).encode("utf-8", "surrogatepass"))
