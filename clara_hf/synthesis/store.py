"""The state of a run in one SQLite file: what is to be done, every reply received, and what came of each item.

An item (a passage, a question) is finished by one transaction. Killing the process loses at most the replies of the
last moment; an exclusive lock keeps a second process away. Memory does not grow with the number of items.
"""

import hashlib
import json
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from clara_hf.program import UsageError


STORE_FILE = "run.sqlite"
TABLES = """
CREATE TABLE IF NOT EXISTS meta (name TEXT PRIMARY KEY, value TEXT) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS items (number INTEGER PRIMARY KEY, digest BLOB UNIQUE, payload TEXT);
CREATE TABLE IF NOT EXISTS dropped (number INTEGER PRIMARY KEY, items INTEGER, payload TEXT);
CREATE TABLE IF NOT EXISTS names (name TEXT PRIMARY KEY, times INTEGER) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS replies (
    number INTEGER, step TEXT, request BLOB, reply TEXT, PRIMARY KEY (number, step)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS records (
    number INTEGER PRIMARY KEY, failed INTEGER, kept INTEGER, rejected INTEGER, prompt_tokens INTEGER,
    completion_tokens INTEGER, payload TEXT);
"""
COMMIT_SECONDS = 0.2
PAGE = 256


class Totals(NamedTuple):
    """Sums over the finished items."""

    items: int = 0
    kept: int = 0
    rejected: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Record(NamedTuple):
    """What came of an item: `payload` is what the output is made from, the rest is for sums."""

    payload: dict[str, Any]
    kept: int
    rejected: int
    prompt_tokens: int
    completion_tokens: int
    failed: bool = False


def digest_of(*parts: Any) -> bytes:
    """16 bytes that depend on the parts alone."""
    text = json.dumps(parts, ensure_ascii=False, sort_keys=True, separators=(",", ":"))
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def to_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":"))


class RunStore:
    """Opens, or starts, the state of a run in `folder`.

    Args:
        folder: the output folder.
        read_only: for reading the replies of another run.

    Raises:
        UsageError: another process works in the folder, or the file is no state of a run.
    """

    def __init__(self, folder: str | Path, read_only: bool = False):
        path = Path(folder, STORE_FILE)
        mode = "ro" if read_only else "rwc"
        try:
            # One process: no shared memory is needed, so that the file may lie on a network drive.
            self.connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode={mode}", uri=True, timeout=1.0)
            if not read_only:
                self.connection.execute("PRAGMA locking_mode = EXCLUSIVE")
                self.connection.execute("PRAGMA journal_mode = WAL")
                self.connection.execute("PRAGMA synchronous = NORMAL")
                self.connection.executescript(TABLES)
            self.connection.execute("SELECT count(*) FROM meta").fetchone()
        except sqlite3.Error as error:
            hint = "another process works in the folder" if "locked" in str(error) else "it is no state of a run"
            raise UsageError(f"{path} cannot be opened ({error}): {hint}.") from error
        self._committed = time.monotonic()

    def close(self) -> None:
        """Close the file; a transaction that was not committed, half a batch of documents, never was."""
        self.connection.close()

    def __enter__(self) -> "RunStore":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def meta(self, name: str, default: Any = None) -> Any:
        row = self.connection.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
        return default if row is None else json.loads(row[0])

    def set_meta(self, **values: Any) -> None:
        """Put values in place within the open transaction."""
        rows = [(name, to_json(value)) for name, value in values.items()]
        self.connection.executemany("INSERT OR REPLACE INTO meta VALUES (?, ?)", rows)

    def add_item(self, key: str, payload: dict) -> bool:
        """Append an item, in the open transaction; `False` where one with this key is there."""
        statement = "INSERT OR IGNORE INTO items (digest, payload) VALUES (?, ?)"
        return self.connection.execute(statement, (digest_of(key), to_json(payload))).rowcount == 1

    def unique_name(self, name: str) -> str:
        """The name, in the open transaction; where it is taken, with `~2` or a higher number behind it."""
        statement = "INSERT INTO names VALUES (?, 1) ON CONFLICT DO UPDATE SET times = times + 1 RETURNING times"
        found = name
        while (times := self.connection.execute(statement, (found,)).fetchone()[0]) > 1:
            found = f"{name}~{times}" if found == name else f"{found}~{times}"
        return found

    def drop(self, payload: dict) -> None:
        """Append what became no item, with its reason, in the open transaction."""
        statement = "INSERT INTO dropped (items, payload) VALUES ((SELECT coalesce(max(number), 0) FROM items), ?)"
        self.connection.execute(statement, (to_json(payload),))

    def commit(self) -> None:
        self.connection.commit()
        self._committed = time.monotonic()

    def count(self, limit: int | None) -> int:
        """Items among the first `limit`."""
        return self.connection.execute("SELECT count(*) FROM items WHERE number <= ?", (_bound(limit),)).fetchone()[0]

    def totals(self, limit: int | None) -> Totals:
        sums = "count(*), sum(kept), sum(rejected), sum(prompt_tokens), sum(completion_tokens)"
        row = self.connection.execute(f"SELECT {sums} FROM records WHERE number <= ?", (_bound(limit),)).fetchone()
        return Totals(*(value or 0 for value in row))

    def unfinished(self, limit: int | None) -> Iterator[tuple[int, dict]]:
        """Items without a record, in order; the store may be written to meanwhile."""
        query = (
            "SELECT items.number, items.payload FROM items LEFT JOIN records USING (number) "
            "WHERE records.number IS NULL AND items.number > ? AND items.number <= ? ORDER BY items.number LIMIT ?"
        )
        last = 0
        while rows := self.connection.execute(query, (last, _bound(limit), PAGE)).fetchall():
            for last, payload in rows:
                yield last, json.loads(payload)

    def finished(self, limit: int | None) -> Iterator[tuple[int, dict, dict]]:
        """Number, item and record payload of the finished items, in order."""
        query = (
            "SELECT number, items.payload, records.payload FROM items JOIN records USING (number) "
            "WHERE number <= ? ORDER BY number"
        )
        for number, item, record in self.connection.execute(query, (_bound(limit),)):
            yield number, json.loads(item), json.loads(record)

    def dropped(self, limit: int | None) -> Iterator[dict]:
        """What became no item, up to where the last of the first `limit` items was read."""
        query = "SELECT payload FROM dropped WHERE items < ? ORDER BY number"
        for (payload,) in self.connection.execute(query, (_bound(limit),)):
            yield json.loads(payload)

    def finish(self, number: int, record: Record) -> None:
        """Store an item's record, and with it its last replies, at once."""
        payload, *sums, failed = record
        row = (number, int(failed), *sums, to_json(payload))
        self.connection.execute("INSERT INTO records VALUES (?, ?, ?, ?, ?, ?, ?)", row)
        self.commit()

    def forget_failed(self) -> int:
        """Drop the records of items whose requests failed, so that they are tried again; returns their number."""
        count = self.connection.execute("DELETE FROM records WHERE failed").rowcount
        self.commit()
        return count

    def replies(self, number: int) -> dict[str, tuple[bytes, dict]]:
        """By step, the digest of the request and the reply of everything received for an item."""
        query = "SELECT step, request, reply FROM replies WHERE number = ?"
        return {
            step: (request, json.loads(reply)) for step, request, reply in self.connection.execute(query, (number,))
        }

    def has_replies(self) -> bool:
        """Whether any reply has ever been received."""
        return self.connection.execute("SELECT 1 FROM replies LIMIT 1").fetchone() is not None

    def failure(self, number: int) -> str | None:
        """Why the item's requests failed for good, `None` where they did not."""
        query = "SELECT payload FROM records WHERE number = ? AND failed"
        row = self.connection.execute(query, (number,)).fetchone()
        return None if row is None else json.loads(row[0])["failed"]

    def number_of(self, key: str) -> int | None:
        """The number of the item with this key."""
        row = self.connection.execute("SELECT number FROM items WHERE digest = ?", (digest_of(key),)).fetchone()
        return None if row is None else row[0]

    def add_reply(self, number: int, step: str, request: bytes, reply: dict) -> None:
        """Log a reply; it is on the disk within moments, or with the item's record."""
        row = (number, step, request, to_json(reply))
        self.connection.execute("INSERT OR REPLACE INTO replies VALUES (?, ?, ?, ?)", row)
        if time.monotonic() - self._committed > COMMIT_SECONDS:
            self.commit()


def _bound(limit: int | None) -> int:
    return 2**62 if limit is None else limit
