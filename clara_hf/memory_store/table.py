"""The Lance dataset behind `MemoryStore`: its schema, where each key's row is, verified reads, appends and repairs."""

import json
import os
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch


try:
    import lance
    import pyarrow as pa
    from lance.fragment import FragmentMetadata, write_fragments
except ImportError as error:
    raise ImportError('the memory store needs Lance: pip install "clara-hf[index]"') from error

from .columns import OWN_COLUMNS, checksums, guard_of, is_own, to_arrow
from .encoding import FITTED, FORMS, Fitted, Form, Plain, Rotated, from_file, to_file
from .journal import FOLDER, Parts, write_beside
from .keys import KEY_LENGTH, Maker, key_of
from .snapshot import Piece, Snapshot, Unreadable, data_files, packed, reading, unpacked


FORMAT = 2  # 1 has keys as text, and no checksums of the user's columns
METADATA_KEY = b"clara.memory_store"
SIDE_FOLDER = "_search"  # bases of fitted forms and of sketches, and the search index
# Of a store: ours, and Lance's.
FOLDERS = (FOLDER, SIDE_FOLDER, "data", "_deletions", "_indices", "_transactions", "_versions")
READ_ROWS = 512
FILE_BYTES = 256 * 2**20  # that compaction makes of smaller ones
TORCH_TYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}


class CorruptMemoryError(OSError):
    """A stored row or file cannot be read, or is not what was written."""


class MemoryTable:
    """Rows of key, text, memory, checksum and the user's columns at `path`; each write is a new Lance version.

    A table reads the version that it loaded at its first use, until `forget` or `refresh` is called. It is changed only
    inside `changing`, where the version that is read is the newest one and stays so. It can be pickled:
    the copy opens the dataset for itself. A forked process cannot use it, where Lance's threads are missing, not their
    locks.

    The column with the memories is `memory` where they are as the model made them, else `code_` and the form's name,
    with the hash of its file where it was fitted: what a column holds cannot be mistaken.
    """

    def __init__(self, path: Path, metadata: dict):
        self.path = path
        self.maker = Maker(**metadata["maker"])
        self.dtype = metadata["dtype"]
        self.format = metadata["format"]
        self.parts = Parts(path)
        self._loaded: Snapshot | None = None
        self._forms: dict[str, Form] = {}
        self._process = os.getpid()

    @classmethod
    def create(cls, path: Path, maker: Maker, dtype: str, form: str) -> None:
        """Makes an empty table; memories of a fitted form are kept as they are until it is fitted."""
        metadata = {"format": FORMAT, "dtype": dtype, "form": form, "maker": asdict(maker)}
        table = cls(path, metadata)
        column = "memory" if form in ("none", *FITTED) else code_column(form)
        schema = table.schema_with(column, [], metadata)
        try:
            lance.write_dataset(schema.empty_table(), str(path), mode="create")
        except OSError:
            if is_blank(path):
                raise
            # Another process created it at the same moment.

    @classmethod
    def open(cls, path: Path) -> "MemoryTable":
        try:
            with reading():
                if not path.is_dir():
                    raise NotADirectoryError(path)  # Lance would retry for seconds
                for name in FOLDERS:
                    # What is made, renamed and removed in them must be inside the store.
                    if (path / name).is_symlink():
                        raise _Link(path / name)
                schema = lance.dataset(str(path)).schema
                metadata = json.loads(schema.metadata[METADATA_KEY])
        except (Unreadable, RecursionError) as error:
            if isinstance(error.__cause__, _Link):
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
        _check_description(path, metadata, schema)
        return cls(path, metadata)

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_loaded": None, "_forms": {}}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state, _process=os.getpid())

    def __len__(self) -> int:
        return len(self.snapshot().keys)

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
        try:
            with reading():
                return Snapshot.load(self.path, self._loaded, version)
        except Unreadable as error:
            raise CorruptMemoryError(f"the memory store at {self.path} cannot be read ({error})") from error

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

    def write_side_file(self, kind: str, tensors: dict[str, torch.Tensor]) -> str:
        """Writes a basis beside the table; returns the hash that names it."""
        digest, content = to_file(tensors)
        folder = self.path / SIDE_FOLDER
        folder.mkdir(exist_ok=True)
        write_beside(folder / f"{kind}-{digest}.safetensors", content)
        return digest

    def read_side_file(self, name: str, digest: str) -> dict[str, torch.Tensor]:
        try:
            return from_file(self.path / SIDE_FOLDER / name, digest)
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
        dtype, size = self.take_type(column)
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
        for name in names:
            try:
                found, wrong = self._column(keys, offsets, name)
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

    def _column(self, keys: Sequence[str], offsets: np.ndarray, name: str) -> tuple[list, list[str]]:
        """Values of a column, and the keys of those that are not what was written."""
        if len(keys) == 0:
            return [], []
        guard = guard_of(name) if guard_of(name) in self.names else None
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
            first = self.take_type(name)
            out = np.empty((len(keys), first[1]), first[0])
            for key, good in zip(keys, self.read(keys, offsets, name, out), strict=True):
                if not good:
                    found.setdefault(key, []).append(name)
        for name in self.column_names:
            for key in self._wrong_in(keys, offsets, name):
                found.setdefault(key, []).append(name)
        return found

    def take_type(self, name: str) -> tuple[np.dtype, int]:
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
                f"filter {condition!r} is no condition over the columns {self.column_names}: {error}"
            ) from error
        if self.format > 1:
            wanted = np.array(found, dtype=snapshot.keys.dtype)
        else:
            wanted = packed(found)
        return self.find_packed(wanted)

    # Writing

    @contextmanager
    def changing(self, wait: bool = True) -> Iterator[bool]:
        """Holds the exclusive lock, and reads the newest version, with all set right that interrupted calls left.

        Without it, what another process changed since would be overlooked. Yields whether the lock was got, which is
        not sure only without `wait`.
        """
        with self.parts.lock(exclusive=True, wait=wait) as got:
            if got:
                self.refresh()
                self.commit()
                self.remove_unreadable()
                self.drop_sketches(self.sketch_columns[:-1])
            yield got

    def arrays(self, columns: Mapping[str, Sequence] | None) -> dict[str, pa.Array]:
        """The user's columns in Arrow, typed as in the table if it has them."""
        schema = self.snapshot().dataset.schema
        known = {name: schema.field(name).type for name in schema.names}
        arrays = {name: to_arrow(name, values, known.get(name)) for name, values in (columns or {}).items()}
        return {name: array for name, array in arrays.items() if array is not None}

    def guarded(self, keys: Sequence[str], arrays: dict[str, pa.Array]) -> dict[str, pa.Array]:
        """`arrays` with their checksums; a column of a store of format 1 may have none."""
        guards = {guard_of(name): name for name in arrays if guard_of(name) in self.names or name not in self.names}
        made = {guard: pa.array(checksums(keys, arrays[name]), pa.uint32()) for guard, name in guards.items()}
        return {**arrays, **made}

    def key_array(self, keys: Sequence[str]) -> pa.Array:
        if self.format == 1:
            return pa.array(keys, pa.string())
        return pa.array([bytes.fromhex(key) for key in keys], pa.binary(KEY_LENGTH // 2))

    def write_part(
        self,
        keys: list[str],
        texts: list[str],
        made: list[np.ndarray],
        arrays: dict[str, pa.Array],
        replaced: list[str],
    ) -> dict:
        """Writes rows beside the table; `commit` takes them in, also after a restart, in place of those of `replaced`.

        Args:
            made: memories as they are stored, `[n, size]`, and sketches where the table has some.

        Returns:
            The part's record.
        """
        rows = {"key": self.key_array(keys), "text": pa.array(texts, pa.string())}
        rows |= guarded_lists(keys, dict(zip(self.own_names[2:], made, strict=True)))
        try:
            rows |= self.guarded(keys, arrays)
            fragments = write_fragments(pa.table(rows), self.snapshot().dataset, mode="append")
            files = [name for fragment in fragments for name in data_files(fragment)]
            records = [fragment.to_json() for fragment in fragments]
            return self.parts.announce(records, files, self.own_names, replaced)
        except OSError as error:
            raise OSError(
                f"writing to the memory store at {self.path} failed ({error}); what was written before is kept: make "
                "room on the disk and call add() again"
            ) from error

    def commit(self, written: Sequence[dict] = ()) -> None:
        """Takes all parts that wait into the table, those of `written` among them, in one new version.

        Of documents that are in the table already, since two processes compressed them, the newer rows are removed.
        """
        # A network file system may list the parts of other processes late: theirs come as records too.
        parts = {part["name"]: part for part in [*self.parts.waiting(), *written] if self.parts.is_announced(part)}
        # After a kill between commit and discard, some are in already.
        present = {name for piece in self.snapshot().pieces for name in piece.files}
        new, replaced = [], []
        for part in parts.values():
            try:
                with reading():
                    fragments = [FragmentMetadata.from_json(json.dumps(each)) for each in part["fragments"]]
            except Unreadable:
                fragments = []
            fits = sorted(part.get("columns", OWN_COLUMNS[:3])) == sorted(self.own_names)
            if fits and present.isdisjoint(name for each in fragments for name in data_files(each)):
                new += fragments
                replaced += part.get("replaced", [])
        # A kill from here on loses nothing: the parts are announced until they are in.
        self.remove([key for key in replaced if self.find([key])[0] >= 0])
        if new:
            operation = lance.LanceOperation.Append(new)
            lance.LanceDataset.commit(str(self.path), operation, read_version=self.version)
        self.parts.discard(parts)
        self.refresh()
        if len(self.snapshot().doubled):
            with reading():
                rows = self.take(self.snapshot().doubled, ["_rowid"])["_rowid"].to_pylist()
            self.snapshot().dataset.delete(f"_rowid IN ({', '.join(map(str, rows))})")
            self.refresh()

    def remove(self, keys: Sequence[str]) -> None:
        dataset = self.snapshot().dataset
        for start in range(0, len(keys), 1000):
            some = keys[start : start + 1000]
            listed = ", ".join(f"'{key}'" if self.format == 1 else f"X'{key}'" for key in some)
            dataset.delete(f"key IN ({listed})")
        self.refresh()

    def remove_unreadable(self) -> None:
        """Drops the parts whose keys cannot be read, without which nothing else could be changed."""
        snapshot = self.snapshot()
        if snapshot.unreadable:
            numbers = [piece.fragment_id for piece in snapshot.unreadable]
            operation = lance.LanceOperation.Delete([], numbers, predicate="unreadable")
            lance.LanceDataset.commit(str(self.path), operation, read_version=snapshot.version)
            self.refresh()

    def set_columns(self, keys: list[str], arrays: dict[str, pa.Array]) -> None:
        """Adds the columns that the table lacks, and gives the rows of `keys` the values in `arrays`."""
        new = {name: array for name, array in arrays.items() if name not in self.names}
        known = {name: array for name, array in arrays.items() if name in self.names}
        rows = self.changed_rows(keys, known)
        dataset = self.snapshot().dataset
        if rows:
            some = [keys[row] for row in rows]
            changed = pa.table({"key": self.key_array(some), **self.guarded(some, pick(known, rows))})
            dataset.merge_insert("key").when_matched_update_all().execute(changed)
            self.refresh()
            dataset = self.snapshot().dataset
        if new:
            guarded = self.guarded(keys, new)
            if keys:
                dataset.merge(pa.table({"key": self.key_array(keys), **guarded}), "key")
            else:
                dataset.add_columns([pa.field(name, array.type) for name, array in guarded.items()])
            self.refresh()

    def changed_rows(self, keys: list[str], arrays: dict[str, pa.Array]) -> list[int]:
        """Positions in `keys` of the stored rows that have other values than `arrays`, or damaged ones."""
        offsets = self.find(keys)
        changed: set[int] = set()
        for name, array in arrays.items():
            try:
                before, wrong = self._column(keys, offsets, name)
            except Unreadable:
                return list(range(len(keys)))
            after, damaged = array.to_pylist(), set(wrong)
            changed |= {row for row, key in enumerate(keys) if before[row] != after[row] or key in damaged}
        return sorted(changed)

    def add_sketches(self, digest: str, width: int, make: Callable[[np.ndarray], np.ndarray]) -> None:
        """Gives every row a sketch: float16 `[n, width]` that `make` gives for what is stored, in one new version."""
        column = f"sketch_{digest}"
        schema = pa.schema(
            [pa.field(column, list_type(np.dtype(np.float16), width)), pa.field(guard_of(column), pa.uint32())]
        )
        dataset = lance.dataset(str(self.path))  # not the one that is read from meanwhile

        source, form = self.memory_column, self.form

        def sketches(batch: pa.RecordBatch) -> pa.RecordBatch:
            raw = batch["key"].to_pylist()
            keys = raw if self.format == 1 else [key.hex() for key in raw]
            stored = batch[source].flatten().to_numpy(zero_copy_only=True).reshape(len(keys), form.size)
            for key, row, written in zip(keys, stored, batch[guard_of(source)].to_pylist(), strict=True):
                if checksum(key, row) != written:
                    raise ValueError(f"the memory of key {key} is damaged on disk: call verify(repair=True)")
            return pa.record_batch(guarded_lists(keys, {column: make(stored)}), schema=schema)

        udf = lance.batch_udf(output_schema=schema)(sketches)
        try:
            with reading():
                dataset.add_columns(udf, read_columns=["key", source, guard_of(source)], batch_size=READ_ROWS)
        except Unreadable as error:
            raise CorruptMemoryError(f"sketches of the memory store at {self.path} cannot be made: {error}") from error
        self.refresh()
        self.drop_sketches(self.sketch_columns[:-1])

    def drop_sketches(self, names: list[str]) -> None:
        if names:
            lance.dataset(str(self.path)).drop_columns([*names, *map(guard_of, names)])
            self.refresh()

    def recode(self, column: str, encode: Callable[[list[str], np.ndarray], np.ndarray]) -> None:
        """Replaces the memories by `column`, of what `encode` gives for keys and offsets, in one new version."""
        dropped = {"key", "text", self.memory_column, guard_of(self.memory_column)}
        others = [field for field in self.snapshot().dataset.schema if field.name not in dropped]
        metadata = {**self.metadata, "form": form_in(column)[0]}
        schema = self.schema_with(column, others, metadata)

        def batches() -> Iterator[pa.RecordBatch]:
            for some, offsets in self.blocks():
                keys = unpacked(some)
                rows = self.take(offsets, ["key", "text", *(field.name for field in others)]).combine_chunks()
                made = guarded_lists(keys, {column: encode(keys, offsets)})
                arrays = [made[name] if name in made else rows[name].combine_chunks() for name in schema.names]
                yield pa.record_batch(arrays, schema=schema)

        reader = pa.RecordBatchReader.from_batches(schema, batches())
        lance.write_dataset(reader, str(self.path), mode="overwrite", max_bytes_per_file=FILE_BYTES)
        self.refresh()

    def compact(self, keep: timedelta) -> None:
        """Joins small files, and removes what versions older than `keep` alone have."""
        row = self.form.size * self.form.numpy_type.itemsize + 512
        dataset = lance.dataset(str(self.path))
        dataset.optimize.compact_files(target_rows_per_fragment=max(1024, FILE_BYTES // row))
        lance.dataset(str(self.path)).cleanup_old_versions(older_than=keep)
        self.refresh()


class _Link(OSError):
    """A link where a folder of the store should be."""


def _check_description(path: Path, metadata: dict, schema: pa.Schema) -> None:
    """Raises `CorruptMemoryError` unless a store says all of what it is, and has the columns for it."""
    maker = metadata.get("maker")
    kinds = {"fingerprint": str, "num_memory_tokens": int, "hidden_size": int, "doc_max_length": int}
    good = (
        isinstance(maker, dict)
        and set(maker) == {field.name for field in fields(Maker)}
        and all(isinstance(maker[name], kind) for name, kind in kinds.items())
        and metadata.get("dtype") in TORCH_TYPES
        and metadata.get("form", "none") in FORMS
    )
    if not good:
        raise CorruptMemoryError(
            f"the memory store at {path} is damaged: its description is {json.dumps(metadata):.200}"
        )
    column = next((name for name in schema.names if name.startswith("code_")), "memory")
    lacking = [name for name in ("key", "text", column, guard_of(column)) if name not in schema.names]
    if lacking or not pa.types.is_fixed_size_list(schema.field(column).type):
        raise CorruptMemoryError(f"the memory store at {path} is damaged: it has no column {lacking or [column]}")


def code_column(form: str, digest: str = "") -> str:
    """The name of the column of a form's codes; a '.' would name a part of a column."""
    return f"code_{form.replace('.', 'p')}" + (f"_{digest}" if digest else "")


def form_in(column: str) -> tuple[str, str]:
    """The form, and the hash of its file, of a column of memories."""
    if column == "memory":
        return "none", ""
    name, _, digest = column.removeprefix("code_").partition("_")
    return name.replace("p", "."), digest


def is_blank(path: Path) -> bool:
    """Whether a table can be created at `path`: nothing is there, or what is left of a creation that was cut off."""
    if not path.exists():
        return True
    return path.is_dir() and all(file.is_dir() or file.parent.name == "_transactions" for file in path.rglob("*"))


def pick(arrays: dict[str, pa.Array], rows: list[int]) -> dict[str, pa.Array]:
    return {name: array.take(pa.array(rows, pa.int64())) for name, array in arrays.items()}


def checksum(key: str, row: np.ndarray) -> int:
    # With the key in it, a memory in another document's row is found too.
    return zlib.crc32(row, zlib.crc32(key.encode()))


def guarded_lists(keys: Sequence[str], matrices: dict[str, np.ndarray]) -> dict[str, pa.Array]:
    """Columns of ours, a list for each row, with their checksums."""
    arrays = {}
    for name, rows in matrices.items():
        rows = np.ascontiguousarray(rows)
        kind = list_type(rows.dtype, rows.shape[1])
        arrays[name] = pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), type=kind)
        arrays[guard_of(name)] = pa.array([checksum(*row) for row in zip(keys, rows, strict=True)], pa.uint32())
    return arrays


def list_type(dtype: np.dtype, width: int) -> pa.DataType:
    # Lance reads lists of items that cannot be null about twice as fast.
    return pa.list_(pa.field("item", pa.from_numpy_dtype(dtype), nullable=False), width)


def _matrix(column: pa.ChunkedArray, shape: tuple[int, ...]) -> np.ndarray:
    return column.combine_chunks().flatten().to_numpy(zero_copy_only=True).reshape(shape)


__all__ = ["CorruptMemoryError", "MemoryTable", "Piece", "is_blank"]
