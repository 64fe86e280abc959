"""One's own documents: files of every kind that `clara_hf.data.sources` reads, folders of them, or a data set.

What cannot be read as a document is reported with its place and left out; it does not stop a run over millions.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from clara_hf.data.files import PACKED, DataError, unpacked_name
from clara_hf.data.sources import ENDINGS, kind_of, read_rows
from clara_hf.data.tables import HUB, read_table


# A longer line is no document; reading it whole would fill the memory.
MAX_DOCUMENT_BYTES = 32 * 2**20
NAMELESS_ROWS = 20  # without a text, from the start: its column has another name


@dataclass(frozen=True)
class Document:
    """A document as it was read: `fault` says why it cannot be used; `source` and `place` say where it is from."""

    id: str
    text: str
    title: str
    source: str
    place: str
    fault: str | None = None


@dataclass(frozen=True)
class Columns:
    """Names of the columns; `title` and `id` may be absent from the data."""

    text: str = "text"
    title: str = "title"
    id: str = "id"


class CorpusFile(NamedTuple):
    """A file, and its name in the data: its path within the corpus, the same on every machine."""

    path: Path
    name: str


def corpus_files(paths: list[str], out: str | Path | None = None) -> list[CorpusFile]:
    """The files of a corpus: those named, and those of known kinds in named folders, in alphabetical order.

    Args:
        paths: files and folders.
        out: the run's own folder, which is left out where it lies in the corpus.

    Raises:
        DataError: a path is not there, is of an unknown kind, or a folder holds no file of a known kind.
    """
    files, known = [], f"{', '.join(ENDINGS)}, those of text with {', '.join(PACKED)} behind them or not"
    own = Path(out).resolve() if out else None
    for given in paths:
        path = Path(given)
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if file.is_file() and _is_known(file))
            found = [file for file in found if own is None or own not in file.resolve().parents]
            if not found:
                raise DataError(f"--corpus: the folder {given} holds no file that ends in {known}.")
            # With several folders, each is told by its name.
            prefix = Path(path.resolve().name) if len(paths) > 1 else Path()
            files += [CorpusFile(file, (prefix / file.relative_to(path)).as_posix()) for file in found]
        elif not path.is_file():
            raise DataError(f"--corpus: there is no file or folder {given}; --dataset takes a data set of the Hub.")
        elif not _is_known(path):
            raise DataError(f"--corpus: {given} must end in {known}.")
        else:
            files.append(CorpusFile(path, path.name))
    return files


def _is_known(path: Path) -> bool:
    return Path(unpacked_name(path)).suffix.lower() in ENDINGS


def read_files(files: list[CorpusFile], columns: Columns) -> Iterator[Document]:
    """The documents of all files, in order.

    Raises:
        DataError: a file cannot be read, or its rows have no column of the text's name.
    """
    for path, name in files:
        yield from _documents(str(path), name, columns)


def read_dataset(name: str, config: str | None, split: str, columns: Columns) -> Iterator[Document]:
    """The rows of a data set: one of the Hub, streamed, or a folder that `save_to_disk` wrote.

    Raises:
        DataError: there is no such data set, configuration or split.
    """
    local = Path(name).is_dir()
    if local and (Path(name) / "state.json").exists():
        source = name  # a data set without splits
    else:
        source = f"{name if local else HUB + name}#{'/'.join(filter(None, [config, split]))}"
    yield from _documents(source, Path(name).resolve().name if local else name, columns)


def _documents(source: str, name: str, columns: Columns) -> Iterator[Document]:
    """Documents of a source's rows, or of what is wrong with one; messages name the source, documents `name`."""
    kind, missing, known = kind_of(source), 0, False
    faults: list[DataError] = []
    rows: Iterator[tuple[int, dict[str, Any]]]
    if kind == "table":
        # Other columns may be large.
        rows = enumerate(read_table(source, (columns.text, columns.title, columns.id)), start=1)
    else:
        rows = read_rows(source, faults.append, MAX_DOCUMENT_BYTES, errors="replace")
    for number, row in rows:
        yield from _faulty(faults, name)
        wanted = "text" if kind == "text" else columns.text
        known, missing = known or wanted in row, missing + (wanted not in row)
        # Rows of some kinds come without what is empty in them.
        if not known and (missing == NAMELESS_ROWS or kind in ("jsonl", "json", "table")):
            raise DataError(
                f"{source}, row {number} has no {wanted!r}, but {sorted(row)[:12]}: "
                "name the text's column by --text_column."
            )
        found, title, given = row.get(wanted), row.get(columns.title), row.get(columns.id)
        default = Path(name).name if kind == "text" and number == 1 else f"{Path(name).name}:{number}"
        id_ = str(given)[:200] if isinstance(given, (str, int)) and str(given).strip() else default
        text = found if isinstance(found, str) and found.strip() else ""
        title = title if isinstance(title, str) and text else ""
        yield Document(id_, text, title, name, str(number), None if text else "no text")
    empty = not known and not missing and not faults
    yield from _faulty(faults, name)
    if empty:
        yield Document(Path(name).name, "", "", name, "1", fault="empty file")


def _faulty(faults: list[DataError], name: str) -> Iterator[Document]:
    for error in faults:
        # Without what differs from row to row: faults are counted.
        reason = error.reason.partition(",")[0]
        yield Document(f"{Path(name).name}:{error.place}", "", "", name, str(error.place), reason)
    faults.clear()
