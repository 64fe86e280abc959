"""A memory store with the files that its passages are from: what is added, removed and searched."""

import json
import sqlite3
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch

from clara_hf.data.documents import Document
from clara_hf.memory_store import MemoryStore
from clara_hf.program.paths import local_path
from clara_hf.serving.documents import Unreadable
from clara_hf.synthesis.leaks import LeakIndex
from clara_hf.synthesis.passages import PassageMaker


DATABASE = "files.sqlite"
# Passages compressed before others get their turn; each call of `MemoryStore.add` writes a version of its table.
CHUNK = 256
# Memories up to this size are kept in memory and scored there; beyond it, the store searches.
RESIDENT_BYTES = 2**30
TABLES = """
CREATE TABLE IF NOT EXISTS about (name TEXT PRIMARY KEY, value TEXT NOT NULL);
CREATE TABLE IF NOT EXISTS files (
    id TEXT PRIMARY KEY, name TEXT NOT NULL, bytes INTEGER NOT NULL, changed INTEGER, created INTEGER NOT NULL,
    attributes TEXT NOT NULL
);
CREATE TABLE IF NOT EXISTS passages (
    key TEXT NOT NULL, file TEXT NOT NULL REFERENCES files (id), number INTEGER NOT NULL, place TEXT NOT NULL,
    start INTEGER NOT NULL, end INTEGER NOT NULL, PRIMARY KEY (file, number)
);
CREATE INDEX IF NOT EXISTS passages_by_key ON passages (key);
"""


@dataclass(frozen=True)
class StoredFile:
    """A file of the collection; `changed` is its time of change in nanoseconds where it was read from a disk."""

    id: str
    name: str
    bytes: int
    created: int
    changed: int | None = None
    attributes: dict[str, Any] = field(default_factory=dict)
    passages: int = 0


@dataclass(frozen=True)
class PassageRow:
    """A passage of a file: its text, and its place there (page or part, characters of the cleaned text)."""

    text: str
    place: str
    start: int
    end: int


@dataclass(frozen=True)
class FileEntry:
    """A file to take in; `replaces` is the id of the file whose place it takes, in the same transaction."""

    name: str
    rows: list[PassageRow]
    bytes: int
    changed: int | None = None
    attributes: dict[str, Any] = field(default_factory=dict)
    id: str | None = None
    replaces: str | None = None


@dataclass(frozen=True)
class Hit:
    """A passage that was found: cosine of its memory with the question, and where it is from."""

    key: str
    score: float
    text: str
    file_id: str | None = None
    filename: str = ""
    number: int = 0
    place: str = ""
    start: int = 0
    end: int = 0


class Library:
    """Files over a [`MemoryStore`]: their names and passages are in `files.sqlite` in the store's folder.

    A passage counts as stored once both its memory and its place are on disk: the memory is written first, the places
    of a whole file follow in one transaction, and only then does `record` return. What a crash leaves between the two
    is no part of any answer, and is used when the file is added again. Not thread-safe: one thread uses it at a time.

    Example:

    ```python
    library = Library.open("notes.clara", model)
    rows, _ = library.split(read_text("a.txt", "Mara keeps bees. Oren reads."))
    library.add([FileEntry("a.txt", rows, bytes=28)])
    library.search(["Who keeps bees?"], n_docs=1)[0][0].filename  # "a.txt"
    ```
    """

    def __init__(self, store: MemoryStore, database: sqlite3.Connection, model, read_only: bool):
        self.store, self.model, self.read_only = store, model, read_only
        self._database = database
        self._keys: list[str] = []
        self._places: dict[str, int] = {}
        self._bank: torch.Tensor | None = None
        self._is_resident = True
        self._stale = True

    @classmethod
    def open(cls, path: str | Path, model, read_only: bool = False) -> "Library":
        """Opens the collection at `path`, or creates it. A store without files of ours is one file to it.

        Raises:
            FileNotFoundError: `read_only`, and nothing is at `path`.
            ValueError: what is at `path` is no store, or another compressor's.
        """
        path = local_path(path)
        if read_only and not path.is_dir():
            raise FileNotFoundError(f"no memory store at {path}: build it first, or mend the path")
        store = MemoryStore.open(path, model)
        file = path / DATABASE
        if not read_only:
            database = sqlite3.connect(file, check_same_thread=False)
            database.execute("PRAGMA synchronous = FULL")
        elif file.exists():
            database = sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True, check_same_thread=False)
            return cls(store, database, model, read_only)
        else:
            database = sqlite3.connect(":memory:", check_same_thread=False)
        library = cls(store, database, model, read_only)
        if not database.execute("SELECT 1 FROM sqlite_master WHERE name = 'passages'").fetchone():
            library._begin()
        return library

    def _begin(self) -> None:
        self._database.executescript(TABLES)
        keys = list(self.store)
        if keys:
            now = int(time.time())
            with self._database as write:
                write.execute(
                    "INSERT INTO files VALUES ('file-store', ?, 0, NULL, ?, '{}')", (self.store.path.name, now)
                )
                rows = ((key, "file-store", number, "", 0, 0) for number, key in enumerate(keys, start=1))
                write.executemany("INSERT INTO passages VALUES (?, ?, ?, ?, ?, ?)", rows)

    def close(self) -> None:
        self._database.close()

    @staticmethod
    def remembered(path: str | Path, name: str) -> str | None:
        """What [`remember`] has kept in the collection at `path`, without opening it; `None` if there is none."""
        file = local_path(path) / DATABASE
        if not file.exists():
            return None
        with closing(sqlite3.connect(f"{file.as_uri()}?mode=ro", uri=True)) as database:
            row = database.execute("SELECT value FROM about WHERE name = ?", (name,)).fetchone()
        return row and row[0]

    def remember(self, name: str, value: str) -> None:
        with self._database as write:
            write.execute("INSERT OR REPLACE INTO about VALUES (?, ?)", (name, value))

    # Files

    def files(self) -> list[StoredFile]:
        """All files, in the order in which they were added."""
        return self._files("", ())

    def file(self, id_: str) -> StoredFile | None:
        return next(iter(self._files("WHERE files.id = ?", (id_,))), None)

    def _files(self, where: str, values: tuple) -> list[StoredFile]:
        rows = self._database.execute(
            "SELECT files.id, name, bytes, created, changed, attributes, COUNT(passages.key) FROM files "
            f"LEFT JOIN passages ON passages.file = files.id {where} GROUP BY files.id ORDER BY files.rowid",
            values,
        )
        return [
            StoredFile(id_, name, size, created, changed, json.loads(attributes), passages)
            for id_, name, size, created, changed, attributes, passages in rows
        ]

    def split(self, documents: Iterable[Document]) -> tuple[list[PassageRow], list[str]]:
        """Passages of a file's documents within the compressor's budget, and what cannot be used, with the reason."""
        tokenizer, processor = self.model.processor.tokenizer, self.model.processor

        def starts(text: str) -> list[int]:
            found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
            return sorted(begin for begin, end in found["offset_mapping"] if end > begin)

        maker = PassageMaker(starts, self.model.config.doc_max_length, 1, "en", LeakIndex())
        rows, unusable = [], []
        for document in documents:
            for passage, fault in maker.passages(document):
                if passage.text.strip() and any(token in passage.text for token in processor.reserved_texts):
                    unusable.append(f"{passage.id}: holds a token that the model reserves")
                elif passage.text.strip():  # short ones and tables can hold an answer too
                    rows.append(PassageRow(passage.text, passage.place, passage.start, passage.end))
                else:
                    unusable.append(f"{passage.id}: {fault or 'no text'}")
        return rows, unusable

    def compress(self, rows: Sequence[PassageRow]) -> Iterator[int]:
        """Stores the passages' memories, chunk by chunk; yields how many of `rows` are stored."""
        for start in range(0, len(rows), CHUNK):
            chunk = rows[start : start + CHUNK]
            self.store.add([row.text for row in chunk], show_progress=False)
            yield start + len(chunk)

    def record(self, entries: Sequence[FileEntry]) -> list[StoredFile]:
        """Takes files in whose passages [`compress`] has stored: all of them, or none.

        Raises:
            Unreadable: a file has no passage.
            ValueError: there is a file with such an id.
        """
        files, before = [], []
        with self._database as write:
            for entry in entries:
                if not entry.rows:
                    raise Unreadable("no passage that can be used")
                before += self._keys_of(entry.replaces)
                self._delete(write, entry.replaces)
                files.append(self._insert(write, entry))
        self._stale = True
        self._discard(before)
        return files

    def _insert(self, write: sqlite3.Connection, entry: FileEntry) -> StoredFile:
        id_ = entry.id or f"file-{uuid4().hex[:24]}"
        if write.execute("SELECT 1 FROM files WHERE id = ?", (id_,)).fetchone():
            raise ValueError(f"file_id {id_!r} is taken: remove that file first, or choose another id")
        file = StoredFile(
            id_, entry.name, entry.bytes, int(time.time()), entry.changed, entry.attributes, len(entry.rows)
        )
        values = (id_, file.name, file.bytes, file.changed, file.created, json.dumps(file.attributes))
        write.execute("INSERT INTO files VALUES (?, ?, ?, ?, ?, ?)", values)
        keys = self.store.keys([row.text for row in entry.rows])
        places = zip(keys, enumerate(entry.rows, start=1), strict=True)
        write.executemany(
            "INSERT INTO passages VALUES (?, ?, ?, ?, ?, ?)",
            ((key, id_, number, row.place, row.start, row.end) for key, (number, row) in places),
        )
        return file

    def add(self, entries: Sequence[FileEntry]) -> list[StoredFile]:
        """[`compress`] and [`record`] in one."""
        for _ in self.compress([row for entry in entries for row in entry.rows]):
            pass
        return self.record(entries)

    def remove(self, id_: str) -> bool:
        """Takes a file out; its passages that no other file has are found no more. `False` if there is no such file."""
        if self.file(id_) is None:
            return False
        before = self._keys_of(id_)
        with self._database as write:
            self._delete(write, id_)
        self._stale = True
        self._discard(before)
        return True

    def _keys_of(self, id_: str | None) -> list[str]:
        return [row[0] for row in self._database.execute("SELECT DISTINCT key FROM passages WHERE file = ?", (id_,))]

    def _delete(self, write: sqlite3.Connection, id_: str | None) -> None:
        write.execute("DELETE FROM passages WHERE file = ?", (id_,))
        write.execute("DELETE FROM files WHERE id = ?", (id_,))

    def _discard(self, keys: Sequence[str]) -> None:
        """Deletes those memories that no file needs any more."""
        query = "SELECT 1 FROM passages WHERE key = ?"
        unused = [key for key in dict.fromkeys(keys) if not self._database.execute(query, (key,)).fetchone()]
        if unused:
            self.store.delete(unused)

    # Search

    def __len__(self) -> int:
        """Distinct passages."""
        self._refresh()
        return len(self._keys)

    def _refresh(self) -> None:
        """Reads memories that were added since, and drops those that were removed."""
        if not self._stale:
            return
        query = "SELECT key FROM passages JOIN files ON files.id = file GROUP BY key ORDER BY MIN(passages.rowid)"
        wanted = [row[0] for row in self._database.execute(query)]
        config, device, dtype = self.model.config, self.model.device, self.model.dtype
        size = len(wanted) * config.num_memory_tokens * config.hidden_size * dtype.itemsize
        self._is_resident = size <= RESIDENT_BYTES
        known = self._places if self._bank is not None else {}
        if self._is_resident:
            bank = torch.empty((0, config.num_memory_tokens, config.hidden_size)) if self._bank is None else self._bank
            kept = [known[key] for key in wanted if key in known]
            new = [key for key in wanted if key not in known]
            parts = [bank.to(device, dtype)[torch.tensor(kept, dtype=torch.long, device=device)]]
            if new:
                parts.append(self.store.get(new).to(device, dtype))
            wanted = [*(key for key in wanted if key in known), *new]
            self._bank = torch.cat(parts)
        else:
            self._bank = None
        self._keys = wanted
        self._places = {key: number for number, key in enumerate(wanted)}
        self._stale = False

    def search(self, questions: Sequence[str], n_docs: int) -> list[list[Hit]]:
        """The best passages for each question, best first; none where the collection is empty.

        Scores are the exact ones of [`model.retrieve`]. A collection too large for the memory is searched by
        [`MemoryStore.search`].
        """
        self._refresh()
        if not self._keys:
            return [[] for _ in questions]
        n_docs = min(n_docs, len(self._keys))
        if self._is_resident:
            found = self.model.retrieve(list(questions), self._bank, n_docs=n_docs)
            keys = [[self._keys[index] for index in row if index >= 0] for row in found.indices.tolist()]
        else:
            strays = len(self.store) - len(self._keys)  # memories of files that a crash kept from being recorded
            found = self.store.search(list(questions), top_k=n_docs + strays)
            keys = found.keys
        distinct = list(dict.fromkeys(key for row in keys for key in row if key in self._places))
        texts = dict(zip(distinct, self.store.columns(distinct, ["text"])["text"], strict=True))
        places = {key: self._place(key) for key in distinct}
        hits = [
            [
                Hit(key, score, texts[key], *places[key])
                for key, score in zip(row, scores, strict=False)
                if key in places
            ]
            for row, scores in zip(keys, found.scores.tolist(), strict=True)
        ]
        return [row[:n_docs] for row in hits]

    def _place(self, key: str) -> tuple:
        return self._database.execute(
            "SELECT files.id, name, number, place, start, end FROM passages JOIN files ON files.id = file "
            "WHERE key = ? ORDER BY files.rowid, number LIMIT 1",
            (key,),
        ).fetchone()

    def memories(self, keys: Sequence[str]) -> torch.Tensor:
        """Memories of found passages, `[len(keys), l, H]`, in the model's dtype and on its device."""
        if not keys or not self._is_resident:
            return self.store.get(list(keys)).to(self.model.device, self.model.dtype)
        return self._bank[torch.tensor([self._places[key] for key in keys], dtype=torch.long, device=self._bank.device)]
