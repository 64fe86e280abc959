"""What was computed, by its content: rankings and answers that no later evaluation computes again.

A record's place is a *shelf*, named by what made it (a system, its options, a digest of its model's files), and its key
is a digest of what it was made from (a question and its documents). So a system, a file, a seed or a larger limit that
comes later finds what it shares with earlier ones, in whatever order and on however many processes that was made.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.utils import gather_object

from clara_hf.evaluation.plan import UsageError, file_name


class CacheError(UsageError):
    """A file of the cache is damaged in a way that no kill can explain; the message names file and line."""


class Cache:
    """Shelves of records in a folder, or in memory.

    Args:
        folder: where the files lie; made when the first record is written. `None` keeps records in this object.
    """

    def __init__(self, folder: str | Path | None = None):
        self.folder = None if folder is None else Path(folder)
        self._shelves: dict[str, Shelf] = {}

    def shelf(self, kind: str, label: str, maker: Any) -> "Shelf":
        """The records of one `kind`, as `"rankings"`, by one maker.

        Args:
            label: tells people what a file holds; does not count.
            maker: what decides about the records besides what they are made from, as JSON can hold it.
        """
        name = f"{kind}/{digest(kind, maker)}"
        if name not in self._shelves:
            path = None
            if self.folder is not None:
                stem = f"{file_name(label)[-60:].lstrip('-.')}-{digest(kind, maker)}"
                path = self._of_other_label(self.folder / kind / stem)
            self._shelves[name] = Shelf(path)
        return self._shelves[name]

    def _of_other_label(self, path: Path) -> Path:
        """The files of the same maker, which may have had another label."""
        found = sorted(path.parent.glob(f"*-{path.name.rsplit('-', 1)[1]}.*.jsonl"))
        return found[0].with_name(found[0].name.rsplit(".", 2)[0]) if found else path


class Shelf:
    """Records by key. Every process appends to a file of its own; reading joins the files of all.

    A kill can leave half a last line: it is not read, and cut off by the next append.

    Args:
        path: of the files, before the process's number; `None` keeps the records in memory.

    Attributes:
        records: all that are known to this process.

    Raises:
        CacheError: a whole line is no record.
    """

    def __init__(self, path: Path | None):
        self.records: dict[str, dict] = {}
        self._new: dict[str, dict] = {}
        self._path = None if path is None else path.with_name(f"{path.name}.{PartialState().process_index}.jsonl")
        if path is not None:
            for part in sorted(path.parent.glob(f"{path.name}.*.jsonl")):
                self.records.update(_records(part))
        # Nobody writes before everybody has read: all see the same records, and so have the same work to do.
        PartialState().wait_for_everyone()
        if self._path is not None and self._path.exists():
            _cut_half_line(self._path)

    def add(self, records: dict[str, dict]) -> None:
        """Writes records, in one write; other processes see them after `share`."""
        self.records.update(records)
        self._new.update(records)
        if self._path is not None and records:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            lines = (json.dumps({"key": key, **record}, ensure_ascii=False) + "\n" for key, record in records.items())
            with open(self._path, "ab") as file:
                file.write("".join(lines).encode())

    def share(self) -> None:
        """Gives every process what all have added; called by all of them."""
        for records in gather_object([self._new]):
            self.records.update(records)
        self._new = {}


class Orders:
    """What a stage set out to do, kept until it is done.

    Batches are cut from what is missing when a stage begins. A call that goes on after a kill finds less missing, but
    takes up the order as it was: the last bits of a result depend on the batch that it was made in.

    Args:
        shelf: where orders are kept.
    """

    def __init__(self, shelf: Shelf):
        self.shelf = shelf

    def begin(self, stage: str, missing: list[str]) -> list[str]:
        """The keys to cut batches from: those that are missing, or those of an order that was not carried out."""
        begun = self.shelf.records.get(stage, {}).get("keys", [])
        if set(missing) <= set(begun):
            return begun
        self._note(stage, missing)
        return missing

    def end(self, stage: str) -> None:
        if self.shelf.records.get(stage, {}).get("keys"):
            self._note(stage, [])

    def _note(self, stage: str, keys: list[str]) -> None:
        if PartialState().is_main_process:
            self.shelf.add({stage: {"keys": keys}})
        self.shelf.records[stage] = {"keys": keys}


def digest(*parts: Any) -> str:
    """24 hex digits of what JSON can hold."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]


def _cut_half_line(path: Path) -> None:
    content = path.read_bytes()
    whole = content.rfind(b"\n") + 1
    if whole < len(content):
        with open(path, "r+b") as file:
            file.truncate(whole)


def _records(path: Path) -> dict[str, dict]:
    records = {}
    content = path.read_bytes()
    for number, line in enumerate(content[: content.rfind(b"\n") + 1].split(b"\n")[:-1], start=1):
        try:
            record = json.loads(line)
            records[record.pop("key")] = record
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CacheError(
                f"{path}, line {number} is damaged: delete that line, or the file, and run it again."
            ) from error
    return records
