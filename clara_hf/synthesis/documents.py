"""One's own documents: JSONL, Parquet, text files, folders of them, or a data set of the `datasets` library.

What cannot be read as a document is reported with its place and left out; it does not stop a run over millions.
"""

import gzip
import json
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

from clara_hf.synthesis.errors import UsageError


TEXT_ENDINGS = (".txt", ".md", ".rst", ".text")
ENDINGS = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet", *TEXT_ENDINGS)
# A longer line is no document; reading it whole would fill the memory.
MAX_DOCUMENT_BYTES = 32 * 2**20
# Text files are read in pieces of this size, cut at the last blank line or newline.
TEXT_BLOCK_BYTES = 2**20
PARQUET_BATCH = 256
BOM = "\ufeff".encode()


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
        UsageError: a path is not there, is of an unknown kind, or a folder holds no file of a known kind.
    """
    files = []
    own = Path(out).resolve() if out else None
    for given in paths:
        path = Path(given)
        if path.is_dir():
            found = sorted(file for file in path.rglob("*") if file.is_file() and _ends(file, ENDINGS))
            found = [file for file in found if own is None or own not in file.resolve().parents]
            if not found:
                raise UsageError(f"--corpus: the folder {given} holds no file that ends in {', '.join(ENDINGS)}.")
            # With several folders, each is told by its name.
            prefix = Path(path.resolve().name) if len(paths) > 1 else Path()
            files += [CorpusFile(file, (prefix / file.relative_to(path)).as_posix()) for file in found]
        elif not path.is_file():
            raise UsageError(f"--corpus: there is no file or folder {given}; --dataset takes a data set of the Hub.")
        elif not _ends(path, ENDINGS):
            raise UsageError(f"--corpus: {given} must end in {', '.join(ENDINGS)}.")
        else:
            files.append(CorpusFile(path, path.name))
    return files


def _ends(path: Path, endings: tuple[str, ...]) -> bool:
    return path.name.lower().endswith(endings)


def read_files(files: list[CorpusFile], columns: Columns) -> Iterator[Document]:
    """The documents of all files, in order."""
    for path, name in files:
        if _ends(path, TEXT_ENDINGS):
            yield from _text_file(path, name)
        else:
            rows = _parquet(path, columns) if _ends(path, (".parquet",)) else _jsonl(path)
            yield from _rows(rows, str(path), name, columns)


def read_dataset(name: str, config: str | None, split: str, columns: Columns) -> Iterator[Document]:
    """The rows of a data set: one of the Hub, streamed, or a folder that `save_to_disk` wrote.

    Raises:
        UsageError: there is no such data set, configuration or split.
    """
    from datasets import Dataset, load_dataset, load_from_disk

    try:
        if Path(name).is_dir():
            rows = load_from_disk(name)
            rows = rows if isinstance(rows, Dataset) else rows[split]
        else:
            rows = load_dataset(name, config, split=split, streaming=True)
    except (OSError, ValueError, KeyError) as error:
        raise UsageError(f"--dataset {name}, split {split!r}, cannot be loaded: {error}") from error
    shown = Path(name).resolve().name if Path(name).is_dir() else name
    yield from _rows(((str(number), row) for number, row in enumerate(rows, start=1)), name, shown, columns)


def _rows(rows: Iterator[tuple[str, Any]], given: str, source: str, columns: Columns) -> Iterator[Document]:
    """Documents of rows, or of what is wrong with one; messages name what was given, documents their source."""
    seen_text, place = False, ""
    for place, row in rows:
        id_ = f"{Path(source).name}:{place}"
        if isinstance(row, str):
            yield Document(id_, "", "", source, place, fault=row)
            continue
        text, title = row.get(columns.text), row.get(columns.title)
        if not seen_text and columns.text not in row:
            raise UsageError(
                f"{given}, row {place} has no {columns.text!r}, but {sorted(row)[:12]}: "
                "name the text's column by --text_column."
            )
        seen_text = True
        given = row.get(columns.id)
        id_ = str(given)[:200] if isinstance(given, (str, int)) and str(given).strip() else id_
        if not isinstance(text, str) or not text.strip():
            yield Document(id_, "", "", source, place, fault="no text")
        else:
            yield Document(id_, text, title if isinstance(title, str) else "", source, place)
    if not place:
        yield Document(Path(source).name, "", "", source, "1", fault="empty file")


def _jsonl(path: Path) -> Iterator[tuple[str, dict | str]]:
    """Line number with the row, or with what is wrong with the line."""
    number = 0
    try:
        with gzip.open(path) if _ends(path, (".gz",)) else open(path, "rb") as file:
            while line := file.readline(MAX_DOCUMENT_BYTES + 1):
                number += 1
                if number == 1 and line.removeprefix(BOM).lstrip().startswith(b"["):
                    raise UsageError(f"{path} holds a JSON array: write it as JSON lines, one object per line.")
                if number == 1 and line.removeprefix(BOM).strip() == b"{":
                    yield "1", "JSON over several lines, where each line must be an object"
                    return
                if len(line) > MAX_DOCUMENT_BYTES:
                    _skip_line(file)
                    yield str(number), "line too long"
                elif line.strip():
                    yield str(number), _parse(line)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UsageError(f"{path}, after line {number}: the gzip data is damaged ({error}).") from error


def _parse(line: bytes) -> dict | str:
    try:
        row = json.loads(line.decode("utf-8-sig", "replace"))
    except (ValueError, RecursionError):
        return "malformed JSON"
    return row if isinstance(row, dict) else "no JSON object"


def _skip_line(file: IO[bytes]) -> None:
    while (part := file.readline(MAX_DOCUMENT_BYTES)) and not part.endswith(b"\n"):
        pass


def _parquet(path: Path, columns: Columns) -> Iterator[tuple[str, dict]]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        file = pyarrow.parquet.ParquetFile(path)
        names = file.schema_arrow.names
        wanted = [name for name in (columns.text, columns.title, columns.id) if name in names]
        for batch in file.iter_batches(PARQUET_BATCH, columns=wanted or names):
            for row in batch.to_pylist():
                number += 1
                yield str(number), row
    except pyarrow.ArrowException as error:
        raise UsageError(f"{path}, after row {number}: the Parquet file cannot be read ({error}).") from error


def _text_file(path: Path, source: str) -> Iterator[Document]:
    """The file as one document, or, where it is long, as one per block."""
    with open(path, "rb") as file:
        block, rest = 0, b""
        while piece := file.read(TEXT_BLOCK_BYTES):
            rest += piece
            if len(piece) < TEXT_BLOCK_BYTES:
                break
            cut = max(rest.rfind(b"\n\n"), rest.rfind(b"\n") if b"\n\n" not in rest else -1)
            cut = cut if cut > 0 else rest.rfind(b" ") if b" " in rest else _character_start(rest)
            yield _block(source, block, rest[:cut])
            block, rest = block + 1, rest[cut:]
        if rest.strip() or block == 0:
            yield _block(source, block, rest)


def _character_start(data: bytes) -> int:
    """The last position at which a UTF-8 character can begin."""
    position = len(data) - 1
    while position > max(0, len(data) - 4) and data[position] & 0xC0 == 0x80:
        position -= 1
    return max(position, 1)


def _block(source: str, number: int, data: bytes) -> Document:
    text = data.decode("utf-8" if number else "utf-8-sig", "replace")
    fault = None if text.strip() else "no text"
    name = Path(source).name
    return Document(f"{name}:{number + 1}" if number else name, text, "", source, str(number + 1), fault)
