"""The rows of the Lance dataset behind a memory store: where each key's row is, and verified reads of them."""

import json
import os
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Self

import lance
import numpy as np
import pyarrow as pa
import torch

from ..encoding import FITTED, Fitted, Form, Plain, Rotated, from_file
from ..keys import KEY_LENGTH, Maker, key_of
from .columns import checksums, guard_of, is_own
from .deletions import Deletions
from .journal import Parts, write_beside
from .layout import (
    FORMAT,
    METADATA_KEY,
    READ_ROWS,
    SIDE_FOLDER,
    TORCH_TYPES,
    CorruptMemoryError,
    Link,
    check_description,
    check_folder,
    checksum,
    form_in,
    list_type,
)
from .remote import Remote
from .snapshot import Snapshot, Unreadable, packed, reading
from .texts import Texts


class Rows:
    """Rows of key, text, memory, checksum and the user's columns at `path`, as they are in one Lance version.

    The path is a local folder, or an address in object storage; tables that are `frozen` are only read.

    It reads the version that it loaded at its first use, until `forget` or `refresh` is called. It can be pickled: the
    copy opens the dataset for itself. A forked process cannot use it, where Lance's threads are missing, not their
    locks.

    The column with the memories is `memory` where they are as the model made them, else `code_` and the form's name,
    with the hash of its file where it was fitted: what a column holds cannot be mistaken.
    """

    def __init__(self, path: Path | str, metadata: dict, frozen: bool = False):
        self.path = path
        self.remote = Remote(path) if isinstance(path, str) else None
        self.frozen = frozen
        self.parts = Parts(self.folder, self.remote)
        self.texts = Texts(self)
        self.deletions = Deletions(self)
        self.maker = Maker(**metadata["maker"])
        self.dtype = metadata["dtype"]
        self.format = metadata["format"]
        self._loaded: Snapshot | None = None
        self._forms: dict[str, Form] = {}
        self._process = os.getpid()

    @classmethod
    def open(cls, path: Path | str, frozen: bool = False) -> Self:
        try:
            with reading():
                if isinstance(path, Path):
                    check_folder(path)
                schema = lance.dataset(str(path)).schema
                metadata = json.loads(schema.metadata[METADATA_KEY])
        except (Unreadable, RecursionError) as error:
            if isinstance(path, str):
                raise OSError(
                    f"no memory store can be read at {path} ({error}): open an address where nothing is with a model "
                    "to create one, or copy one there by copy_to()"
                ) from error
            if isinstance(error.__cause__, Link):
                raise ValueError(
                    f"{error} is a link: a memory store holds no links; put what it leads to in its place"
                ) from error
            is_lance = path.is_dir() and any((path / "_versions").glob("*.manifest"))
            if is_lance and not isinstance(error.__cause__, (TypeError, KeyError)):
                raise CorruptMemoryError(
                    f"the memory store at {path} cannot be opened, one of its files is damaged or gone ({error}): copy "
                    "it again from where it came from"
                ) from error
            raise ValueError(f"{path} is not a memory store: choose another path") from error
        found = metadata.get("format") if isinstance(metadata, dict) else metadata
        if found not in (1, FORMAT):
            raise ValueError(f"the memory store at {path} has format {found!r}; this version reads 1 and {FORMAT}")
        check_description(path, metadata, schema)
        return cls(path, metadata, frozen)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_loaded": None, "_forms": {}}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state, _process=os.getpid())

    def __len__(self) -> int:
        return len(self.snapshot().keys)

    @property
    def folder(self) -> Path:
        """The local folder with the files beside the table."""
        return Path(self.path) if self.remote is None else self.remote.folder

    @property
    def is_writable(self) -> bool:
        return not self.frozen and (self.remote is not None or os.access(self.path, os.W_OK))

    # Versions

    def forget(self) -> None:
        """Makes the next use load the newest version."""
        self._loaded = None

    def load(self, version: int) -> None:
        """Makes the next use read `version`, which another process may just have written."""
        if self._loaded is None or self._loaded.version != version:
            self._loaded = self._load(version)

    def refresh(self) -> bool:
        """Loads the newest version; returns whether it is another one than before."""
        before, self._loaded = self._loaded, self._load()
        return before is None or before.version != self._loaded.version

    def _load(self, version: int | None = None) -> Snapshot:
        damaged = self.deletions.damaged()
        if damaged:
            raise CorruptMemoryError(
                f"{damaged[0]} of the memory store at {self.path}, which names deleted rows, is damaged on disk: call "
                "verify(repair=True)"
            )
        try:
            with reading():
                return Snapshot.load(self.path, self._loaded, version)
        except Unreadable as error:
            raise CorruptMemoryError(f"the memory store at {self.path} cannot be read ({error})") from error

    def newest(self) -> int:
        """Loads the newest version, and returns it."""
        self.refresh()
        return self.version

    @property
    def version(self) -> int:
        return self.snapshot().version

    def snapshot(self) -> Snapshot:
        if self._process != os.getpid():
            raise RuntimeError(
                f"the memory store at {self.path} was opened before this process was forked, and Lance can hang in "
                'forked processes: start it with "forkserver" or "spawn" (multiprocessing_context of a DataLoader)'
            )
        if self._loaded is None:
            self._loaded = self._load()
        return self._loaded

    # Layout

    @property
    def names(self) -> list[str]:
        return self.snapshot().dataset.schema.names

    @property
    def column_names(self) -> list[str]:
        """What `columns` can read: the text and the user's columns."""
        return [name for name in self.names if name == "text" or not is_own(name)]

    @property
    def own_names(self) -> list[str]:
        """What every row has, without checksums and the user's columns."""
        return ["key", "text", self.memory_column, *([self.sketch_column] if self.sketch_column else [])]

    @property
    def memory_column(self) -> str:
        return next((name for name in self.names if name.startswith("code_")), "memory")

    @property
    def sketch_columns(self) -> list[str]:
        """The oldest first; only the newest counts, older ones are of a fit that has not ended."""
        return [name for name in self.names if name.startswith("sketch_")]

    @property
    def sketch_column(self) -> str | None:
        return next(reversed(self.sketch_columns), None)

    @property
    def metadata(self) -> dict:
        return json.loads(self.snapshot().dataset.schema.metadata[METADATA_KEY])

    @property
    def wanted_form(self) -> str:
        """The form that was asked for: a fitted one is not that of the memories before they are fitted."""
        return self.metadata.get("form", "none")

    @property
    def form(self) -> Form:
        """In which the memories are stored."""
        return self.form_of(self.memory_column)

    def form_of(self, column: str) -> Form:
        if column not in self._forms:
            name, digest = form_in(column)
            form: Form
            if name == "none":
                form = Plain(self.maker.width, TORCH_TYPES[self.dtype])
            elif name in FITTED:
                form = Fitted(name, self.read_side_file(f"fitted-{digest}.safetensors", digest))
                if form.width != self.maker.width:
                    raise CorruptMemoryError(f"fitted-{digest}.safetensors in {self.path} is for another model")
            else:
                form = Rotated(name, self.maker.width)
            self._forms[column] = form
        return self._forms[column]

    def schema_with(self, column: str, others: list[pa.Field], metadata: dict | None = None) -> pa.Schema:
        """The schema of a table whose memories are in `column`, with `others` beside."""
        form = self.form_of(column)
        key = pa.binary(KEY_LENGTH // 2) if self.format > 1 else pa.string()
        return pa.schema(
            [
                pa.field("key", key, nullable=False),
                pa.field("text", pa.string(), nullable=False),
                pa.field(column, list_type(form.numpy_type, form.size), nullable=False),
                pa.field(guard_of(column), pa.uint32(), nullable=False),
                *others,
            ],
            metadata={METADATA_KEY: json.dumps(metadata)} if metadata else self.snapshot().dataset.schema.metadata,
        )

    def side_files(self, pattern: str) -> list[Path]:
        """Files beside the table."""
        if self.remote is not None:
            for name in self.remote.names(SIDE_FOLDER):
                if fnmatch(name, f"{SIDE_FOLDER}/{pattern}"):
                    self.remote.fetch(name)
        return sorted((self.folder / SIDE_FOLDER).glob(pattern))

    def keep_side_file(self, name: str, replaces: str | None = None) -> None:
        """Takes a file written beside the table into the store; those of the pattern `replaces` are removed."""
        if self.remote is not None:
            self.remote.upload(self.folder / SIDE_FOLDER / name, f"{SIDE_FOLDER}/{name}")
        for other in self.side_files(replaces) if replaces else ():
            if other.name != name:
                self.remove_side_file(other.name)

    def remove_side_file(self, name: str) -> None:
        (self.folder / SIDE_FOLDER / name).unlink(missing_ok=True)
        if self.remote is not None:
            self.remote.remove(f"{SIDE_FOLDER}/{name}")

    def write_side_file(self, name: str, content: bytes) -> None:
        """Writes a file beside the table."""
        folder = self.folder / SIDE_FOLDER
        folder.mkdir(exist_ok=True)
        write_beside(folder / name, content)
        self.keep_side_file(name)

    def read_side_file(self, name: str, digest: str) -> dict[str, torch.Tensor]:
        try:
            self.side_files(name)
            return from_file(self.folder / SIDE_FOLDER / name, digest)
        except OSError as error:
            raise CorruptMemoryError(str(error)) from error

    # Reading

    def key_of(self, text: str) -> str:
        return key_of(self.maker.fingerprint, text)

    def find(self, keys: Sequence[str]) -> np.ndarray:
        """Row offsets of `keys`, -1 for those that are not stored."""
        return self.find_packed(packed(keys))

    def find_packed(self, wanted: np.ndarray) -> np.ndarray:
        snapshot = self.snapshot()
        if len(wanted) == 0 or len(snapshot.keys) == 0:
            return np.full(len(wanted), -1)
        places = np.searchsorted(snapshot.keys, wanted).clip(max=len(snapshot.keys) - 1)
        return np.where(snapshot.keys[places] == wanted, snapshot.offsets[places], -1)

    def digits(self, keys: list) -> list[str]:
        """Keys as digits, of what Lance gives for them."""
        return keys if self.format == 1 else [key.hex() for key in keys]

    def take(self, offsets: np.ndarray, columns: list[str]) -> pa.Table:
        """Rows at `offsets`, not verified; raises `Unreadable`."""
        with reading():
            return self.snapshot().dataset.take(offsets.tolist(), columns=columns)

    def read(self, keys: Sequence[str], offsets: np.ndarray, column: str, out: np.ndarray) -> np.ndarray:
        """Reads a column of ours into `out` `[n, size]`; returns whether each is what was written, `[n]` bool."""
        try:
            table = self.take(offsets, [column, guard_of(column)])
            with reading():
                out[:] = _matrix(table[column], out.shape)
                written = table[guard_of(column)].to_pylist()
        except Unreadable:
            if len(keys) == 1:
                return np.zeros(1, dtype=bool)
            # One bad row makes Lance refuse them all: halve until it is known which.
            half = len(keys) // 2
            halves = (slice(half), slice(half, None))
            return np.concatenate([self.read(keys[part], offsets[part], column, out[part]) for part in halves])
        return np.array([checksum(*row) == check for *row, check in zip(keys, out, written, strict=True)], dtype=bool)

    def verified(
        self, keys: Sequence[str], offsets: np.ndarray, column: str, order: Sequence[int] | None = None
    ) -> np.ndarray:
        """Rows of a column of ours, `[n, size]` as they are stored.

        Raises:
            CorruptMemoryError: one is not what was written; that first in `order` is named.
        """
        dtype, size = self.list_type_of(column)
        rows = np.empty((len(keys), size), dtype)
        damaged: list[int] = []
        for start in range(0, len(keys), READ_ROWS):
            part = slice(start, start + READ_ROWS)
            intact = self.read(keys[part], offsets[part], column, rows[part])
            damaged += (start + np.flatnonzero(~intact)).tolist()
        if damaged:
            first = min(damaged, key=lambda row: row if order is None else order[row])
            kind = "sketch" if column.startswith("sketch_") else "memory"
            raise CorruptMemoryError(
                f"the {kind} of key {keys[first]} in {self.path} is damaged on disk: call verify(repair=True), or add()"
                " with its document again and verify='all', which makes it anew"
            )
        return rows

    def columns(self, keys: Sequence[str], offsets: np.ndarray, names: list[str]) -> dict[str, list]:
        """Verified values of columns; raises `CorruptMemoryError` with the first column and key that is damaged."""
        values = {}
        table = self._take_together(offsets, names)
        for name in names:
            try:
                found, wrong = self._column(keys, offsets, name, table)
            except Unreadable as error:
                raise CorruptMemoryError(
                    f"column {name!r} of these {len(keys)} keys cannot be read from {self.path}: verify(repair=True) "
                    f"mends what it can ({error})"
                ) from error
            if wrong:
                raise CorruptMemoryError(
                    f"the {name} of key {wrong[0]} in {self.path} is damaged on disk: call add() with its document "
                    "again and verify='all'"
                )
            values[name] = found
        return values

    def _take_together(self, offsets: np.ndarray, names: list[str]) -> pa.Table | None:
        """Columns and their checksums in one read; None where it fails, and only a read of each tells of which."""
        guards = [guard_of(name) for name in names if guard_of(name) in self.names]
        try:
            return self.take(offsets, [*dict.fromkeys([*names, *guards])]) if len(names) > 1 and len(offsets) else None
        except Unreadable:
            return None

    def _column(
        self, keys: Sequence[str], offsets: np.ndarray, name: str, table: pa.Table | None = None
    ) -> tuple[list, list[str]]:
        """Values of a column, and the keys of those that are not what was written; `table` has it if it is read."""
        if len(keys) == 0:
            return [], []
        guard = guard_of(name) if guard_of(name) in self.names else None
        if table is None:
            table = self.take(offsets, [name, *([guard] if guard else [])])
        with reading():
            values = table[name].to_pylist()
            if name == "text":
                wrong = [
                    key for key, text in zip(keys, values, strict=True) if text is None or self.key_of(text) != key
                ]
            elif guard:
                found = zip(keys, checksums(keys, table[name]), table[guard].to_pylist(), strict=True)
                wrong = [key for key, is_now, was in found if is_now != was]
            else:
                wrong = []
        return values, wrong

    def damage(self, keys: Sequence[str], offsets: np.ndarray) -> dict[str, list[str]]:
        """Which columns of which of these rows are not what was written."""
        found: dict[str, list[str]] = {}
        for name in self.own_names[2:]:
            dtype, size = self.list_type_of(name)
            intact = self.read(keys, offsets, name, np.empty((len(keys), size), dtype))
            for key, is_good in zip(keys, intact, strict=True):
                if not is_good:
                    found.setdefault(key, []).append(name)
        for name in self.column_names:
            for key in self._wrong_in(keys, offsets, name):
                found.setdefault(key, []).append(name)
        return found

    def list_type_of(self, name: str) -> tuple[np.dtype, int]:
        """NumPy's type, and how many values of it a row has, of a column of ours that holds lists."""
        kind = self.snapshot().dataset.schema.field(name).type
        return np.dtype(kind.value_type.to_pandas_dtype()), kind.list_size

    def _wrong_in(self, keys: Sequence[str], offsets: np.ndarray, name: str) -> list[str]:
        try:
            return self._column(keys, offsets, name)[1]
        except Unreadable:
            if len(keys) == 1:
                return list(keys)
            half = len(keys) // 2
            halves = (slice(half), slice(half, None))
            return [key for part in halves for key in self._wrong_in(keys[part], offsets[part], name)]

    def blocks(self, offsets: np.ndarray | None = None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Packed keys and offsets of all rows, or those at `offsets`, in blocks in the order on disk."""
        snapshot = self.snapshot()
        chosen = np.arange(len(snapshot.keys))
        if offsets is not None:
            chosen = chosen[np.isin(snapshot.offsets, offsets)]
        order = chosen[np.argsort(snapshot.offsets[chosen])]
        for start in range(0, len(order), READ_ROWS):
            rows = order[start : start + READ_ROWS]
            yield snapshot.keys[rows], snapshot.offsets[rows]

    def matching(self, condition: str) -> np.ndarray:
        """Offsets of the rows for which an SQL condition over the text and the user's columns holds."""
        if not isinstance(condition, str):
            raise ValueError(f"filter is {condition!r}; it must be a condition such as \"title LIKE 'A%'\"")
        snapshot = self.snapshot()
        try:
            with reading():
                found = snapshot.dataset.to_table(columns=["key"], filter=condition)["key"].to_pylist()
        except Unreadable as error:
            raise ValueError(
                f"filter {condition!r} is no condition over the columns {self.column_names}: "
                f"{str(error).partition('. Valid fields')[0]}"
            ) from error
        if self.format > 1:
            wanted = np.array(found, dtype=snapshot.keys.dtype)
        else:
            wanted = packed(found)
        return self.find_packed(wanted)


def _matrix(column: pa.ChunkedArray, shape: tuple[int, ...]) -> np.ndarray:
    return column.combine_chunks().flatten().to_numpy(zero_copy_only=True).reshape(shape)
