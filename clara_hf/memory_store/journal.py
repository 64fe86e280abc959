"""What a memory store keeps beside its table: parts on their way into it, and which of its files are known to be sound.

A part is a data file that is finished but not in the table yet. It is announced by a small JSON file, written once the
data are safely on disk, so that neither a kill nor a power cut leaves anything that looks finished and is not.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from uuid import uuid4

from transformers.utils import logging

from clara_hf.program.paths import is_plain_name


logger = logging.get_logger(__name__)

FOLDER = "_parts"
SOUND_FILE = "sound.json"
# Of a file: bytes and time of its last change in nanoseconds; None for a file that is gone.
Signature = list[int] | None


class Parts:
    """Announced parts, and the signatures of the files in which every row was found to be what was written."""

    def __init__(self, path: Path):
        self.path = path
        self.folder = path / FOLDER

    def announce(self, fragments: list[dict], files: list[str]) -> dict:
        """Records a part of these Lance fragments, whose data are in `files`; returns the record."""
        for name in files:
            _sync(self.path / name)
        part = {"name": f"{uuid4().hex}.part.json", "fragments": fragments, "files": self.signatures(files)}
        self._write(part["name"], part)
        return part

    def waiting(self) -> list[dict]:
        """The announced parts, oldest first."""
        found = []
        for file in sorted(self.folder.glob("*.part.json"), key=lambda file: file.stat().st_mtime_ns):
            if file.is_dir():
                logger.warning(f"{file} is a folder, which no memory store makes: it is passed over; remove it")
                continue
            try:
                part = json.loads(file.read_text(encoding="utf-8"))
            except (ValueError, OSError, RecursionError):
                part = None
            # What is written here names files to open and to remove: only what `announce` could have written counts.
            if file.is_symlink() or not _is_part(part, file.name):
                logger.warning(f"{file} is damaged: the memories that it announced are made again")
                file.unlink()
            else:
                found.append(part)
        return found

    def discard(self, names: Iterable[str]) -> None:
        for name in names:
            if is_plain_name(name):
                (self.folder / name).unlink(missing_ok=True)

    def signatures(self, files: Iterable[str]) -> dict[str, Signature]:
        return {name: _signature(self.path / name) for name in files}

    def sound(self) -> dict[str, Signature]:
        """Signatures that the sound files had."""
        try:
            known = json.loads((self.folder / SOUND_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError):  # then all are checked again
            known = None
        return known if isinstance(known, dict) else {}

    def trust(self, signatures: dict[str, Signature], present: Iterable[str]) -> None:
        """Adds sound files to those known, and forgets those that are not `present` in the table."""
        known = self.sound()
        kept = {name: (known | signatures).get(name) for name in present}
        kept = {name: signature for name, signature in kept.items() if signature is not None}
        if kept != known:
            self._write(SOUND_FILE, kept)

    def _write(self, name: str, content: dict) -> None:
        self.folder.mkdir(exist_ok=True)
        unfinished = self.folder / f"{uuid4().hex}.unfinished"
        try:
            unfinished.write_text(json.dumps(content))
            _sync(unfinished)
            os.replace(unfinished, self.folder / name)
        finally:
            unfinished.unlink(missing_ok=True)


def _is_part(part, name: str) -> bool:
    """Whether `part` is a record of the file `name` that names files in the table's `data` folder alone."""
    if not isinstance(part, dict) or part.get("name") != name:
        return False
    fragments, files = part.get("fragments"), part.get("files")
    if not isinstance(fragments, list) or not isinstance(files, dict):
        return False
    listed = [file for each in fragments for file in (each.get("files") if isinstance(each, dict) else None) or [None]]
    named = [file.get("path") if isinstance(file, dict) and file.get("base_id") is None else None for file in listed]
    return all(map(is_plain_name, named)) and {f"data/{path}" for path in named} == set(files)


def _signature(file: Path) -> Signature:
    try:
        found = file.stat()
    except OSError:
        return None
    return [found.st_size, found.st_mtime_ns]


def _sync(file: Path) -> None:
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
