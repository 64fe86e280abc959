"""Rows of data files of any kind, one after the other, each with its number; and the way back to a file.

| source | rows |
|---|---|
| `F.jsonl`, `F.jsonl.gz` | one JSON object per line; blank lines are skipped |
| `F.json`, `F.json.gz` | a JSON array of objects, or as above |
| `F.csv`, `F.tsv`, each also `.gz` | a header, then records; lists are JSON in their cell; an empty cell is no value |
| `F.parquet` | |
| a folder | a data set that was saved by `save_to_disk`, or one with data files as on the Hub |
| `hf://datasets/USER/NAME`, with or without `@REVISION` | a data set on the Hub |

The last two may be followed by `#SPLIT` or `#CONFIG/SPLIT`; a data set with one split needs none. All are streamed.
Text is read here and not by `datasets`, whose readers do not tell which line is broken; the rest is read by `datasets`.
"""

import csv
import gzip
import io
import json
import os
import sys
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any


HUB = "hf://datasets/"
LISTS = ("answers", "docs", "pos_index", "positives")
CHUNK = 2**20  # characters of a JSON array read at a time


class DataError(ValueError):
    """A data file breaks the schema; the message names the file, the line and what is wrong."""


def read_rows(
    source: str | Path, on_error: Callable[[DataError], None] | None = None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (number from 1, row) of a file, a folder or a data set of the Hub.

    The number is that of the line in JSONL and CSV (of a record's last line), of the item in an array, else of the row.

    Args:
        source: one of the kinds above.
        on_error: called with each broken row of text that the next one can be found behind (JSONL; items of arrays that
            are no objects; cells of CSV), which is then passed over. Default: it is raised.

    Raises:
        DataError: the source cannot be read, or a row is malformed.
    """
    kind = kind_of(source)
    if kind == "jsonl":
        yield from read_jsonl(source, on_error)
    elif kind == "json":
        yield from _read_array(source, on_error)
    elif kind == "csv":
        yield from _read_csv(source, on_error)
    else:
        yield from _read_dataset(source, kind)


def kind_of(source: str | Path) -> str:
    """`"jsonl"`, `"json"` (an array), `"csv"`, `"parquet"`, `"folder"` or `"hub"`."""
    if str(source).startswith(HUB):
        return "hub"
    if Path(_place(source)[0]).is_dir():
        return "folder"
    suffix = Path(str(source).removesuffix(".gz")).suffix.lower()
    if suffix == ".json":
        return "json" if _starts_array(source) else "jsonl"
    return {".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}.get(suffix, "jsonl")


def unit_of(source: str | Path) -> str:
    """What the numbers of [`read_rows`] count, for messages: `"line"`, `"item"` or `"row"`."""
    return {"jsonl": "line", "csv": "line", "json": "item"}.get(kind_of(source), "row")


def source_name(source: str | Path) -> str:
    """A short name for results: the file's without its endings, or the data set's with its configuration and split."""
    place, config, split = _place(source)
    name = Path(place).name.split("@")[0] if str(source).startswith(HUB) else Path(place).name.removesuffix(".gz")
    for ending in (".jsonl", ".json", ".csv", ".tsv", ".parquet"):
        name = name.removesuffix(ending)
    return "-".join(filter(None, [name, config, split]))


def read_jsonl(
    path: str | Path, on_error: Callable[[DataError], None] | None = None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (line number from 1, object) of a JSONL file, gzipped where its name ends in `.gz`.

    Raises:
        DataError: the file cannot be read or, without `on_error`, a line is not UTF-8, not JSON or not an object.
    """
    with _Damage(path) as damage, _open(path) as lines:
        for number, line in enumerate(lines, start=1):
            damage.after = f"line {number}"
            if line.strip():
                yield from _rows(number, partial(_parse, path, number, line), on_error)


def write_jsonl(path: str | Path, rows: Iterable[dict[str, Any]]) -> int:
    """Writes JSONL, gzipped where the name ends in `.gz`; equal rows give equal bytes. Returns the number of rows.

    The file appears when it is whole: nothing is left of a write that fails or is interrupted.
    """
    number = 0
    with _staged(path) as file:
        with gzip.GzipFile("", "wb", 6, file, mtime=0) if str(path).endswith(".gz") else nullcontext(file) as packed:
            for row in rows:
                packed.write(_line(row))
                number += 1
    return number


def _line(row):
    try:
        return (json.dumps(row, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:  # half a surrogate pair can only be written escaped
        return (json.dumps(row) + "\n").encode()


def write_text(path: str | Path, text: str) -> None:
    """Writes a text file as [`write_jsonl`] does: whole, or not at all."""
    with _staged(path) as file:
        file.write(text.encode())


@contextmanager
def _staged(path):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    staged = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(staged, "wb") as file:
            yield file
        os.replace(staged, path)
    finally:
        staged.unlink(missing_ok=True)


def shown(value: Any) -> str:
    """A value in a message, cut to 60 characters."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


class _Damage:
    """Turns what goes wrong while a file is read into a `DataError` that names the last place read."""

    def __init__(self, path):
        self.path, self.after = path, "line 0"

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        if isinstance(error, EOFError | zlib.error | gzip.BadGzipFile):
            raise DataError(f"{self.path}, after {self.after}: the gzip data is damaged ({error}).") from error
        if isinstance(error, UnicodeDecodeError):
            raise DataError(f"{self.path}, after {self.after}: not UTF-8 text ({error.reason}).") from error
        if isinstance(error, OSError):
            raise DataError(f"{self.path}: the file cannot be read ({error.strerror or error}).") from error


def _rows(number: int, row: Callable[[], dict], on_error) -> Iterator[tuple[int, dict[str, Any]]]:
    """The row with its number, or none where it is broken and `on_error` takes that."""
    try:
        found = row()
    except DataError as error:
        if on_error is None:
            raise
        on_error(error)
        return
    yield number, found


def _open(path):
    return gzip.open(path) if str(path).endswith(".gz") else open(path, "rb")


def _parse(path: str | Path, number: int, line: bytes) -> dict[str, Any]:
    where = f"{path}, line {number}"
    try:
        # Files saved on Windows may start with a byte order mark.
        row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8").strip())
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: not UTF-8 text (byte {error.start}).") from error
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: malformed JSON, {error.msg} at column {error.colno}.") from error
    except (RecursionError, ValueError) as error:
        raise DataError(f"{where}: malformed JSON, {_limit(error)}.") from error
    return _object(where, row, "line")


def _limit(error):
    # Python reads no integer of more than 4,300 digits.
    return "nested too deeply" if isinstance(error, RecursionError) else "a number has too many digits"


def _object(where, row, unit):
    if not isinstance(row, dict):
        raise DataError(f"{where}: a JSON object is expected, but the {unit} holds {shown(row)}.")
    return row


def _starts_array(path):
    with _Damage(path), _open(path) as file:
        return file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


def _read_array(path, on_error):
    """Items of a JSON array, one in memory at a time: such files hold gigabytes in a single line."""
    decoder = json.JSONDecoder()
    with _Damage(path) as damage, io.TextIOWrapper(_open(path), encoding="utf-8-sig") as file:
        text, place, number, chunk = file.read(4096).lstrip(), 1, 0, CHUNK
        while True:
            # Past white space and, after the first item, one comma.
            place = _past_space(text, place)
            comma = number > 0 and text[place : place + 1] == ","
            start = _past_space(text, place + comma)
            where = f"{path}, item {number + 1}"
            if text[start : start + 1] == "]" and not comma:
                return
            if number and not comma and start < len(text):
                raise DataError(f"{where}: malformed JSON, a comma or the array's end is expected.")
            try:
                row, end = decoder.raw_decode(text, start)
            except json.JSONDecodeError as error:
                # Only at the end of what was read may more text mend it; a string is blamed on its start.
                mendable = error.msg.startswith("Unterminated string") or error.pos > len(text) - 16
                more = file.read(chunk) if mendable else ""
                if not more:
                    raise DataError(f"{where}: malformed JSON, {error.msg}.") from error
                text, place, chunk = text[place:] + more, 0, 2 * chunk
                continue
            except (RecursionError, ValueError) as error:
                raise DataError(f"{where}: malformed JSON, {_limit(error)}.") from error
            number, place, chunk = number + 1, end, CHUNK
            damage.after = f"item {number}"
            yield from _rows(number, partial(_object, where, row, "item"), on_error)


def _past_space(text, place):
    while text[place : place + 1].isspace():
        place += 1
    return place


def _read_csv(path, on_error):
    # The default limit of a cell is 128 KiB, less than twenty long documents.
    csv.field_size_limit(sys.maxsize)
    delimiter = "\t" if str(path).removesuffix(".gz").lower().endswith(".tsv") else ","
    with _Damage(path) as damage, io.TextIOWrapper(_open(path), encoding="utf-8-sig", newline="") as file:
        records = csv.reader(file, delimiter=delimiter, strict=True)
        try:
            names = next(records, [])
            if len(set(names)) < len(names):
                raise DataError(f"{path}, line 1: a column is named twice: {', '.join(names)}.")
            for cells in records:
                damage.after = f"line {records.line_num}"
                if cells:
                    number = records.line_num
                    yield from _rows(number, partial(_record, f"{path}, line {number}", names, cells), on_error)
        except csv.Error as error:
            raise DataError(f"{path}, line {records.line_num}: malformed CSV, {error}.") from error


def _record(where, names, cells):
    if len(cells) != len(names):
        raise DataError(f"{where}: {len(cells)} cells, but {len(names)} columns.")
    row = {name: cell for name, cell in zip(names, cells, strict=True) if cell != ""}
    for name in LISTS:
        if name in row:
            try:
                row[name] = json.loads(row[name])
            except (RecursionError, ValueError) as error:
                raise DataError(f"{where}: {name!r} must be a JSON list, but is {shown(row[name])}.") from error
    return row


def _place(source: str | Path) -> tuple[str, str | None, str | None]:
    """Path or Hub name, configuration and split; a path that exists as it stands has neither."""
    place, _, selection = str(source).rpartition("#")
    if not place or (not place.startswith(HUB) and Path(source).exists()):
        return str(source), None, None
    config, _, split = selection.rpartition("/")
    return place, config or None, split


def _read_dataset(source, kind):
    # Imported here: reading a JSONL file does not need it.
    import datasets

    place, config, split = _place(source)
    try:
        if kind == "parquet":
            found = datasets.load_dataset("parquet", data_files=str(place), streaming=True)
        elif kind == "hub":
            name, _, revision = place.removeprefix(HUB).partition("@")
            found = datasets.load_dataset(name, config, revision=revision or None, streaming=True)
        elif any(Path(place, name).exists() for name in ("state.json", "dataset_dict.json")):
            found = datasets.load_from_disk(place)
        else:
            found = datasets.load_dataset(place, config, streaming=True)
    except Exception as error:  # datasets raises nearly every kind, down to those of its file systems
        raise DataError(f"{source}: the data set cannot be loaded ({_reason(error)}).") from error
    if isinstance(found, dict):
        splits = ", ".join(found)
        if split is None and len(found) > 1:
            raise DataError(f"{source}: it has the splits {splits}: add #SPLIT to its name.")
        if split is not None and split not in found:
            raise DataError(f"{source}: there is no split {split!r}, it has {splits}.")
        found = found[split or next(iter(found))]
    elif split is not None:
        raise DataError(f"{source}: it was saved without splits: leave #{split} out.")
    number, rows = 0, iter(found)
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as error:
            raise DataError(f"{source}, after row {number}: it cannot be read ({_reason(error)}).") from error
        number += 1
        # A column's missing values come as None.
        yield number, {name: value for name, value in row.items() if value is not None}


def _reason(error):
    cause = error.__cause__ or error
    # The second line of some names what there is to choose from.
    lines = [line.strip() for line in str(cause).strip().splitlines()[:2]]
    return " ".join(lines).rstrip(".") or type(cause).__name__
