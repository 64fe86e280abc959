"""Files as they are on the disk: opened by what their names end in, written whole or not at all, told by a digest."""

import bz2
import gzip
import hashlib
import io
import json
import zlib
from collections.abc import Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from clara_hf.program import UsageError, written_beside


PACKED = (".gz", ".bz2", ".zst")  # in any case
BLOCK = 2**20


class DataError(UsageError):
    """A data file breaks the schema; the message names the file, the place in it and what is wrong.

    Attributes:
        place: number of the broken row as in `read_rows`, or 0 where the file as a whole cannot be read.
        reason: the message without file and place.
    """

    def __init__(self, message: str, place: int = 0, reason: str = ""):
        super().__init__(message)
        self.place, self.reason = place, reason or message


def unpacked_name(path: str | Path) -> str:
    """A file's name without what says that it is compressed."""
    name = Path(path).name
    return next((name[: -len(ending)] for ending in PACKED if name.lower().endswith(ending)), name)


def open_unpacked(path: str | Path) -> io.BufferedIOBase:
    """Opens a file for reading bytes, through gzip, bzip2 or Zstandard where its name ends in `.gz`, `.bz2` or `.zst`.

    Raises:
        DataError: the package `zstandard` is needed and not installed.
        OSError: the file cannot be opened. Damage shows while reading; see [`damage_told`].
    """
    ending = Path(path).suffix.lower()
    if ending == ".gz":
        return gzip.open(path)
    if ending == ".bz2":
        return bz2.open(path)
    return io.BufferedReader(_Zstandard(path), BLOCK) if ending == ".zst" else open(path, "rb")


class _Zstandard(io.RawIOBase):
    """Unpacks frame by frame. The package's own reader takes a file that was cut off for a whole one."""

    def __init__(self, path):
        try:
            import zstandard
        except ImportError as error:
            raise DataError(f"{path}: reading .zst needs `pip install zstandard`.") from error
        self.zstandard, self.file = zstandard, open(path, "rb")
        self.frame, self.given, self.ready = None, b"", b""

    def readable(self):
        return True

    def readinto(self, buffer):
        while not self.ready:
            given, self.given = self.given or self.file.read(BLOCK), b""
            if not given:
                if self.frame is not None:
                    raise EOFError("the file ended before its frame did")
                return 0
            # Windows of up to 2 GiB, as `zstd --long=31` makes them.
            frame = self.frame or self.zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj()
            try:
                self.ready = frame.decompress(given)
            except self.zstandard.ZstdError as error:
                raise EOFError(str(error)) from error
            self.frame, self.given = (None, frame.unused_data) if frame.eof else (frame, b"")
        size = min(len(buffer), len(self.ready))
        buffer[:size], self.ready = self.ready[:size], self.ready[size:]
        return size

    def close(self):
        self.file.close()
        super().close()


class damage_told:
    """Turns what goes wrong while a file is read into a `DataError` that names the last place read, `after`."""

    def __init__(self, path: str | Path):
        self.path, self.after = path, "line 0"

    def __enter__(self):
        return self

    def __exit__(self, kind, error, trace):
        # bzip2 and gzip raise errors of the operating system's kind, but without its number.
        if isinstance(error, EOFError | zlib.error) or isinstance(error, OSError) and error.errno is None:
            raise DataError(f"{self.path}, after {self.after}: the compressed data is damaged ({error}).") from error
        if isinstance(error, UnicodeDecodeError):
            raise DataError(f"{self.path}, after {self.after}: not UTF-8 text ({error.reason}).") from error
        if isinstance(error, OSError):
            raise DataError(f"{self.path}: the file cannot be read ({error.strerror or error}).") from error


def content_digest(root: Path, paths: Iterable[Path], algorithm: str = "xxh3") -> str:
    """Changes with names, sizes or contents of files; with a bar from 1 GiB on.

    Args:
        root: folder that the names are relative to.
        algorithm: `"xxh3"` (128 bits), or `"sha256"`, which earlier versions recorded.

    Returns:
        `"xxh3:"` and 32 hexadecimal digits, or 64 of SHA-256 alone.
    """
    import xxhash
    from tqdm.auto import tqdm

    files = sorted((path.relative_to(root).as_posix(), path, path.stat().st_size) for path in paths)
    total = sum(size for _, _, size in files)
    digest = xxhash.xxh3_128() if algorithm == "xxh3" else hashlib.sha256()
    bar = tqdm(total=total, desc="Hashing", unit="B", unit_scale=True, disable=total < 2**30, leave=False)
    with bar:
        for name, path, size in files:
            digest.update(f"{name}\0{size}\0".encode())
            with open(path, "rb") as file:
                while block := file.read(BLOCK):
                    digest.update(block)
                    bar.update(len(block))
    return f"xxh3:{digest.hexdigest()}" if algorithm == "xxh3" else digest.hexdigest()


def check_output(path: str, overwrite: bool) -> None:
    """See whether a program may write its JSONL to what `--output` names.

    Raises:
        UsageError: another ending, a folder, or the file is there already and is not to be replaced.
    """
    if not path.endswith((".jsonl", ".jsonl.gz")):
        raise UsageError(f"--output must end in .jsonl or .jsonl.gz, but is {path}.")
    if Path(path).is_dir():
        raise UsageError(f"--output {path} is a folder: name a file.")
    if Path(path).exists() and not overwrite:
        raise UsageError(f"{path} is there already: give another --output, or --overwrite.")


def write_jsonl(path: str | Path, rows: Iterable[dict[str, Any]]) -> int:
    """Writes JSONL, gzipped where the name ends in `.gz`; equal rows give equal bytes. Returns the number of rows.

    The file appears when it is whole: nothing is left of a write that fails or is interrupted.
    """
    number = 0
    with written_beside(path) as beside, open(beside, "wb") as file:
        with gzip.GzipFile("", "wb", 6, file, mtime=0) if str(path).endswith(".gz") else nullcontext(file) as packed:
            for row in rows:
                packed.write(_line(row))
                number += 1
    return number


def holds_jsonl(path: str | Path, rows: Iterable[dict[str, Any]]) -> int | None:
    """How many rows a file of [`write_jsonl`] has where they are these; `None` where it holds anything else."""
    number = 0
    try:
        with gzip.open(path) if str(path).endswith(".gz") else open(path, "rb") as file:
            for row in rows:
                if file.readline() != _line(row):
                    return None
                number += 1
            return number if not file.read(1) else None
    except (gzip.BadGzipFile, EOFError, zlib.error):
        return None


def _line(row):
    try:
        return (json.dumps(row, ensure_ascii=False) + "\n").encode()
    except UnicodeEncodeError:  # half a surrogate pair can only be written escaped
        return (json.dumps(row) + "\n").encode()


def shown(value: Any) -> str:
    """A value in a message, cut to 60 characters."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."
