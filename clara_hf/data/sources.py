"""Rows of data files of any kind, one after the other, each with its number: the one reader of all programs.

| source | rows |
|---|---|
| `F.jsonl` (and what has no ending below) | one JSON object per line; blank lines are skipped |
| `F.json` | a JSON array of objects, one object over several lines, or as above |
| `F.csv`, `F.tsv` | a header, then records; lists are JSON in their cell; an empty cell is no value |
| `F.parquet`, `F.arrow` | |
| `F.txt`, `F.text`, `F.md`, `F.rst` | the file as one `text`, or, where it is long, one per MiB |
| a folder | a data set that was saved by `save_to_disk`, or one with such files, laid out as on the Hub |
| `hf://datasets/USER/NAME`, with or without `@REVISION` | a data set on the Hub |

Text may be packed: `.gz`, `.bz2`, `.zst`. Endings count in any case; a path is never a pattern. The last two may be
followed by `#SPLIT` or `#CONFIG/SPLIT`; a data set with one split needs none. All are streamed. Text is read here and
not by `datasets`, whose readers do not tell which line is broken.
"""

import csv
import io
import json
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from clara_hf.data.files import DataError, content_digest, damage_told, open_unpacked, shown, unpacked_name
from clara_hf.data.tables import HUB, SAVED, folder_files, hub_commit, read_hub, read_saved, read_table


LISTS = ("answers", "docs", "pos_index", "positives")
CHUNK = 2**20  # characters of a JSON array read at a time
TEXT_BLOCK = 2**20  # bytes of a text file in a row, cut at the last blank line or newline
KINDS = {
    **{".json": "json", ".csv": "csv", ".tsv": "csv", ".parquet": "table", ".arrow": "table"},
    **dict.fromkeys((".txt", ".text", ".md", ".rst"), "text"),
}
ENDINGS = (".jsonl", *KINDS)

Report = Callable[[DataError], None]


def read_rows(
    source: str | Path, on_error: Report | None = None, max_bytes: int | None = None, errors: str = "strict"
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (number from 1, row) of a file, a folder or a data set of the Hub; a row has no values that are `None`.

    The number is that of the line in JSONL and CSV (of a record's last line), of the item in an array, else of the row.

    Args:
        source: one of the kinds above.
        on_error: called with each broken row of text that the next one can be found behind (JSONL; items of arrays that
            are no objects; cells of CSV), which is then passed over. Default: it is raised.
        max_bytes: a longer line of JSONL is broken, and never in memory as a whole.
        errors: `"replace"`: bytes that are not UTF-8 become U+FFFD; `"strict"`: they are an error.

    Raises:
        DataError: the source cannot be read, or a row is malformed.
    """
    kind, (place, config, split) = kind_of(source), _place(source)
    if kind == "jsonl":
        yield from read_jsonl(source, on_error, max_bytes, errors)
    elif kind == "json":
        yield from _read_array(source, on_error, errors)
    elif kind == "csv":
        yield from _read_csv(source, on_error, errors)
    elif kind == "text":
        yield from _read_text(source, errors)
    elif kind == "table":
        yield from _numbered(read_table(source))
    elif kind == "hub":
        yield from _numbered(read_hub(str(source), place, config, split))
    elif any(Path(place, name).exists() for name in SAVED):
        yield from _numbered(read_saved(str(source), place, split))
    else:
        with folder_files(str(source), place, config, split) as (folder, files):
            try:
                yield from _numbered(row for file in files for _, row in read_rows(file, on_error, max_bytes, errors))
            except DataError as error:
                raise DataError(str(error).replace(folder, place)) from error


def _numbered(rows):
    # A column's missing values come as None.
    for number, row in enumerate(rows, start=1):
        yield number, {name: value for name, value in row.items() if value is not None}


def kind_of(source: str | Path) -> str:
    """`"jsonl"`, `"json"` (an array), `"csv"`, `"text"`, `"table"` (Parquet, Arrow), `"folder"` or `"hub"`."""
    if str(source).startswith(HUB):
        return "hub"
    if Path(_place(source)[0]).is_dir():
        return "folder"
    kind = KINDS.get(Path(unpacked_name(source)).suffix.lower(), "jsonl")
    if kind == "table" and unpacked_name(source) != Path(source).name:
        raise DataError(f"{source}: a Parquet or Arrow file packs its columns itself: unpack this one first.")
    return "jsonl" if kind == "json" and not _starts_array(source) else kind


def unit_of(source: str | Path) -> str:
    """What the numbers of [`read_rows`] count, for messages: `"line"`, `"item"`, `"block"` or `"row"`."""
    return {"jsonl": "line", "csv": "line", "json": "item", "text": "block"}.get(kind_of(source), "row")


def source_name(source: str | Path) -> str:
    """A short name for results: the file's without its endings, or the data set's with its configuration and split."""
    place, config, split = _place(source)
    name = Path(place).name.split("@")[0] if str(source).startswith(HUB) else unpacked_name(place)
    ending = Path(name).suffix
    return "-".join(filter(None, [name.removesuffix(ending) if ending.lower() in ENDINGS else name, config, split]))


def digest_of(source: str | Path, algorithm: str = "xxh3") -> str:
    """Changes with what a source holds; of a data set on the Hub, with the commit that its name stands for.

    Raises:
        DataError: the source cannot be read, or the Hub does not tell.
    """
    place, _, _ = _place(source)
    if str(source).startswith(HUB):
        return hub_commit(str(source), place)
    try:
        if Path(place).is_dir():
            return content_digest(Path(place), [path for path in Path(place).rglob("*") if path.is_file()], algorithm)
        return content_digest(Path(place).parent, [Path(place)], algorithm)
    except OSError as error:
        raise DataError(f"{source}: the file cannot be read ({error.strerror or error}).") from error


def is_digest_of(recorded: str, source: str | Path) -> bool:
    """Whether a recorded digest, of this or of an earlier version (SHA-256), is that of the source as it is now."""
    return recorded == digest_of(source, "xxh3" if ":" in recorded else "sha256")


def read_jsonl(
    path: str | Path, on_error: Report | None = None, max_bytes: int | None = None, errors: str = "strict"
) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yields (line number from 1, object) of a JSONL file, packed or not; arguments as of [`read_rows`].

    Raises:
        DataError: the file cannot be read or, without `on_error`, a line is not UTF-8, not JSON or not an object.
    """
    number, limit = 0, -1 if max_bytes is None else max_bytes + 1
    with damage_told(path) as damage, open_unpacked(path) as lines:
        while line := lines.readline(limit):
            number += 1
            damage.after = f"line {number}"
            if max_bytes is not None and len(line) > max_bytes:
                _skip_line(lines, line)
                line = None
            if number == 1 and line and (whole := _whole_object(path, line, lines)):
                yield 1, whole
            elif line is None or line.strip():
                yield from _rows(number, partial(_parse, path, number, line, errors), on_error)


def _whole_object(path, line, lines):
    """The object that all of a `.json` file is, where its first line is not one; else `None`."""
    if not unpacked_name(path).lower().endswith(".json") or not line.strip().endswith((b"{", b"[", b",")):
        return None
    try:
        found = json.loads((line + lines.read()).decode("utf-8-sig"))
    except (RecursionError, ValueError):
        return None
    return found if isinstance(found, dict) else None


def _skip_line(lines: io.BufferedIOBase, part: bytes) -> None:
    while part and not part.endswith(b"\n"):
        part = lines.readline(CHUNK)


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


def _broken(path, unit, number, reason):
    return DataError(f"{path}, {unit} {number}: {reason}.", number, reason)


def _parse(path, number, line, errors):
    broken = partial(_broken, path, "line", number)
    if line is None:
        raise broken("line too long")
    try:
        # Files saved on Windows may start with a byte order mark.
        row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8", errors).strip())
    except UnicodeDecodeError as error:
        raise broken(f"not UTF-8 text (byte {error.start})") from error
    except json.JSONDecodeError as error:
        raise broken(f"malformed JSON, {error.msg} at column {error.colno}") from error
    except (RecursionError, ValueError) as error:
        raise broken(f"malformed JSON, {_limit(error)}") from error
    return _object(path, "line", number, row)


def _limit(error):
    # Python reads no integer of more than 4,300 digits.
    return "nested too deeply" if isinstance(error, RecursionError) else "a number has too many digits"


def _object(path, unit, number, row):
    if not isinstance(row, dict):
        raise _broken(path, unit, number, f"a JSON object is expected, but the {unit} holds {shown(row)}")
    return row


def _starts_array(path):
    with damage_told(path), open_unpacked(path) as file:
        return file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"[")


def _read_array(path, on_error, errors):
    """Items of a JSON array, one in memory at a time: such files hold gigabytes in a single line."""
    decoder = json.JSONDecoder()
    with (
        damage_told(path) as damage,
        io.TextIOWrapper(open_unpacked(path), encoding="utf-8-sig", errors=errors) as file,
    ):
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
            yield from _rows(number, partial(_object, path, "item", number, row), on_error)


def _past_space(text, place):
    while text[place : place + 1].isspace():
        place += 1
    return place


def _read_csv(path, on_error, errors):
    # The default limit of a cell is 128 KiB, less than twenty long documents.
    csv.field_size_limit(sys.maxsize)
    delimiter = "\t" if unpacked_name(path).lower().endswith(".tsv") else ","
    with (
        damage_told(path) as damage,
        io.TextIOWrapper(open_unpacked(path), encoding="utf-8-sig", errors=errors, newline="") as file,
    ):
        records = csv.reader(file, delimiter=delimiter, strict=True)
        try:
            names = next(records, [])
            if len(set(names)) < len(names):
                raise DataError(f"{path}, line 1: a column is named twice: {', '.join(names)}.")
            for cells in records:
                damage.after = f"line {records.line_num}"
                if cells:
                    number = records.line_num
                    yield from _rows(number, partial(_record, path, number, names, cells), on_error)
        except csv.Error as error:
            raise DataError(f"{path}, line {records.line_num}: malformed CSV, {error}.") from error


def _record(path, number, names, cells):
    if len(cells) != len(names):
        raise _broken(path, "line", number, f"{len(cells)} cells, but {len(names)} columns")
    row = {name: cell for name, cell in zip(names, cells, strict=True) if cell != ""}
    for name in LISTS:
        if name in row:
            try:
                row[name] = json.loads(row[name])
            except (RecursionError, ValueError) as error:
                reason = f"{name!r} must be a JSON list, but is {shown(row[name])}"
                raise _broken(path, "line", number, reason) from error
    return row


def _read_text(path, errors):
    """The file as one row, or, where it is long, as one per block."""
    with damage_told(path) as damage, open_unpacked(path) as file:
        number, rest = 0, b""
        while piece := file.read(TEXT_BLOCK):
            rest += piece
            if len(piece) < TEXT_BLOCK:
                break
            cut = max(rest.rfind(b"\n\n"), rest.rfind(b"\n") if b"\n\n" not in rest else -1)
            cut = cut if cut > 0 else rest.rfind(b" ") if b" " in rest else _character_start(rest)
            number += 1
            yield number, _block(rest[:cut], number, errors)
            damage.after, rest = f"block {number}", rest[cut:]
        if rest.strip() or number == 0:
            yield number + 1, _block(rest, number + 1, errors)


def _block(data, number, errors):
    return {"text": data.decode("utf-8-sig" if number == 1 else "utf-8", errors)}


def _character_start(data: bytes) -> int:
    """The last position at which a UTF-8 character can begin."""
    position = len(data) - 1
    while position > max(0, len(data) - 4) and data[position] & 0xC0 == 0x80:
        position -= 1
    return max(position, 1)


def _place(source: str | Path) -> tuple[str, str | None, str | None]:
    """Path or Hub name, configuration and split; a path that exists as it stands has neither."""
    place, _, selection = str(source).rpartition("#")
    if not place or (not place.startswith(HUB) and Path(source).exists()):
        return str(source), None, None
    config, _, split = selection.rpartition("/")
    return place, config or None, split
