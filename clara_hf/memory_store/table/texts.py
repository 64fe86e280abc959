"""The full-text index of a memory store's texts: Lance's, a part of the table's versions.

Rows that came after it are scanned, rows that are gone are not found: it cannot be stale.
"""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

import lance
import numpy as np

from .journal import write_beside
from .layout import SIDE_FOLDER, CorruptMemoryError
from .snapshot import Unreadable, packed, reading


if TYPE_CHECKING:
    from .rows import Rows

FOLDER = "_indices"


class Texts:
    """BM25 over the texts of a table, once there is an index. A file with the hashes of its files lies beside it."""

    def __init__(self, table: "Rows"):
        self._table = table
        self._whole: list[str] = []  # what this process has read and compared

    def indexes(self) -> list[str]:
        """The folders of the index in the version that is read: one, and one for each set of rows added to it."""
        found = self._table.snapshot().dataset.list_indices()
        return [index["uuid"] for index in found if index["fields"] == ["text"]]

    def files(self) -> list[str]:
        """All files of the index, relative to the table's folder."""
        remote = self._table.remote
        names = []
        for index in self.indexes():
            if remote is not None:
                names += remote.names(f"{FOLDER}/{index}")
            else:
                names += [f"{FOLDER}/{index}/{file.name}" for file in (self._folder(index)).iterdir()]
            names += [f"{SIDE_FOLDER}/{file.name}" for file in self._table.side_files(f"texts-{index}.json")]
        return names

    def _folder(self, index: str) -> Path:
        return Path(self._table.path) / FOLDER / index

    def search(self, question: str, count: int, condition: str | None) -> np.ndarray:
        """Packed keys of the rows whose texts fit best, best first; none where no word is found.

        Raises:
            ValueError: there is no index.
            CorruptMemoryError: it is damaged.
        """
        table = self._table
        if not self.indexes():
            raise ValueError(
                f"hybrid search needs an index of the texts, and the memory store at {table.path} has none: call "
                "index_texts() first"
            )
        damaged = self.damaged()
        try:
            if damaged:
                raise Unreadable(f"its file {damaged[0]} is not what was written")
            with reading():
                scanner = table.snapshot().dataset.scanner(
                    columns=["key", "_score"],
                    full_text_query={"columns": ["text"], "query": question},
                    limit=count,
                    filter=condition,
                    prefilter=True,
                )
                found = scanner.to_table().to_pydict()
        except Unreadable as error:
            raise CorruptMemoryError(
                f"the full-text index of the memory store at {table.path} cannot be read ({error}): call index_texts() "
                "again"
            ) from error
        scored = zip((-score for score in found["_score"]), table.digits(found["key"]), strict=True)
        return packed([key for _, key in sorted(scored)])

    def make(self) -> None:
        """Makes an index of all rows, in place of the one that is there. Under the store's exclusive lock."""
        dataset = lance.dataset(str(self._table.path))
        dataset.create_scalar_index("text", "INVERTED", with_position=False, replace=True)
        self._table.refresh()
        self.note()

    def bring_up(self) -> None:
        """Takes rows into the index that it lacks. Under the store's exclusive lock."""
        if self.indexes():
            lance.dataset(str(self._table.path)).optimize.optimize_indices()
            self._table.refresh()
            self.note()

    def note(self) -> None:
        """Writes the hashes of files that have none yet, and drops those of files that are gone."""
        if self._table.remote is not None:
            return
        indexes = self.indexes()
        known = {file.stem.removeprefix("texts-"): file for file in self._table.side_files("texts-*.json")}
        for index in set(indexes) - set(known):
            if not self._folder(index).is_dir():
                continue
            hashes = {file.name: _digest(file) for file in self._folder(index).iterdir()}
            self._table.folder.joinpath(SIDE_FOLDER).mkdir(exist_ok=True)
            write_beside(self._table.folder / SIDE_FOLDER / f"texts-{index}.json", json.dumps(hashes).encode())
        for index in set(known) - set(indexes):
            known[index].unlink(missing_ok=True)

    def damaged(self, again: bool = False) -> list[str]:
        """Files of the index that are not what was written; in object storage, nothing is compared.

        They are read once, or `again`.
        """
        wrong = []
        if again:
            self._whole = []
        for index in self.indexes() if self._table.remote is None else ():
            if index in self._whole:
                continue
            names = []
            for file in self._table.side_files(f"texts-{index}.json"):
                try:
                    hashes = dict(json.loads(file.read_bytes()))
                    names += [name for name, hash in hashes.items() if _digest(self._folder(index) / name) != hash]
                except (OSError, ValueError, TypeError):
                    names.append(file.name)
            wrong += [f"{FOLDER}/{index}/{name}" for name in names]
            self._whole += [] if names else [index]
        return wrong


def _digest(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
