"""What a memory store keeps beside its table: parts on their way into it, and the lock of those that write.

A part is a data file that is finished but not in the table yet. It is announced by a small JSON file, written once the
data are safely on disk, so that neither a kill nor a power cut leaves anything that looks finished and is not.
"""

import errno
import fcntl
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeGuard
from uuid import uuid4

from transformers.utils import logging

from clara_hf.program.paths import is_plain_name

from .remote import Remote


logger = logging.get_logger(__name__)

FOLDER = "_parts"
LOCK_FILE = "lock"
PART_ENDING = ".part.json"
TOKEN_ENDING = ".token"


class Parts:
    """Announced parts of the table at `path`. In object storage, where one process writes at a time, there are none."""

    def __init__(self, path: Path, remote: Remote | None = None):
        self.path = path
        self.remote = remote
        self.folder = path / FOLDER

    def announce(self, fragments: list[dict], files: list[str], columns: list[str], replaced: list[str]) -> dict:
        """Records a part of Lance fragments, whose data are in `files`, with our `columns`; returns the record.

        Rows of the keys `replaced` are removed when the part goes into the table.
        """
        for name in files:
            sync(self.path / name)
        sizes = {name: (self.path / name).stat().st_size for name in files}
        name = f"{uuid4().hex}{PART_ENDING}"
        part = {"name": name, "fragments": fragments, "files": sizes, "columns": columns, "replaced": replaced}
        self.folder.mkdir(exist_ok=True)
        write_beside(self.folder / name, json.dumps(part).encode())
        return part

    def waiting(self) -> list[dict]:
        """The announced parts, oldest first; records that are damaged, or whose data are not whole, are removed."""
        found = []
        for file in sorted(self.folder.glob(f"*{PART_ENDING}"), key=lambda file: file.lstat().st_mtime_ns):
            if file.is_dir() and not file.is_symlink():
                logger.warning(f"{file} is a folder, which no memory store makes: it is passed over; remove it")
                continue
            try:
                part = None if file.is_symlink() else json.loads(file.read_text(encoding="utf-8"))
            except (ValueError, OSError, RecursionError):
                part = None
            # What is written here names files to open and to remove: only what `announce` could have written counts.
            if _is_part(part, file.name) and self._is_whole(part):
                found.append(part)
            else:
                logger.warning(f"{file} or its data are damaged: the memories that it announced are made again")
                file.unlink(missing_ok=True)
        return found

    def are_waiting(self) -> bool:
        return any(self.folder.glob(f"*{PART_ENDING}"))

    def _is_whole(self, part: dict) -> bool:
        try:
            # Before, a size came with a time of change.
            sizes = {name: size[0] if isinstance(size, list) else size for name, size in part["files"].items()}
            return all((self.path / name).lstat().st_size == size for name, size in sizes.items())
        except (OSError, IndexError):
            return False

    def is_announced(self, part: dict) -> bool:
        """Whether a part still waits: another process may have taken it into the table."""
        return (self.folder / part["name"]).exists()

    def discard(self, names: Iterable[str]) -> None:
        for name in names:
            if is_plain_name(name):
                (self.folder / name).unlink(missing_ok=True)

    @contextmanager
    def lock(self, exclusive: bool, wait: bool = True) -> Iterator[bool]:
        """Holds the store's lock: shared, while parts are written, or exclusive, while the table changes.

        A killed process loses it, and with it what `token` wrote. Yields whether it was got, which is not sure only
        without `wait`.

        Raises:
            OSError: another process has the lock of a store in object storage, where nobody is waited for.
        """
        if self.remote is not None:
            with self.remote.lock() as got:
                if wait and not got:
                    raise OSError(
                        errno.EBUSY,
                        f"{self.remote.holder()} writes to the memory store at {self.remote.url}, where only one can: "
                        "try again when it has ended; if it was killed, call unlock() first",
                    )
                yield got
            return
        self.folder.mkdir(exist_ok=True)
        with open(self.folder / LOCK_FILE, "ab") as file:
            kind = fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH
            try:
                fcntl.flock(file, kind | fcntl.LOCK_NB)
                got = True
            except BlockingIOError:
                got = wait
                if wait:
                    logger.warning(f"another process writes to the memory store at {self.path}: waiting for it")
                    fcntl.flock(file, kind)
            if got and exclusive:
                self.discard(file.name for file in self.folder.glob(f"*{TOKEN_ENDING}"))
            yield got

    @contextmanager
    def token(self) -> Iterator[str]:
        """The name of a file that is in `folder` meanwhile: other machines that see it share the folder."""
        if self.remote is not None:
            yield ""
            return
        with self.lock(exclusive=False):
            name = f"{uuid4().hex}{TOKEN_ENDING}"
            (self.folder / name).touch()
            yield name
            self.discard([name])

    def sees(self, token: str) -> bool:
        return self.remote is not None or (self.folder / token).exists()


def _is_part(part, name: str) -> TypeGuard[dict]:
    """Whether `part` is a record of the file `name` that names files in the table's `data` folder alone."""
    if not isinstance(part, dict) or part.get("name") != name:
        return False
    fragments, files = part.get("fragments"), part.get("files")
    if not isinstance(fragments, list) or not isinstance(files, dict) or not isinstance(part.get("replaced", []), list):
        return False
    listed = [file for each in fragments for file in (each.get("files") if isinstance(each, dict) else None) or [None]]
    named = [file.get("path") if isinstance(file, dict) and file.get("base_id") is None else None for file in listed]
    return all(map(is_plain_name, named)) and {f"data/{path}" for path in named} == set(files)


def write_beside(path: Path, content: bytes) -> None:
    """Writes a file that is there whole, and safely on the disk, or not at all."""
    unfinished = path.with_name(f"{uuid4().hex}.unfinished")
    try:
        unfinished.write_bytes(content)
        sync(unfinished)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def sync(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
