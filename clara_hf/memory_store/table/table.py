"""Changes of the Lance dataset behind a memory store: appends, columns, sketches, other forms, removals."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path

import lance
import numpy as np
import pyarrow as pa
import torch
from lance.fragment import FragmentMetadata, write_fragments

from ..encoding import FITTED, to_file
from ..keys import KEY_LENGTH, Maker
from .columns import OWN_COLUMNS, checksums, guard_of, to_arrow
from .layout import (
    FILE_BYTES,
    FORMAT,
    READ_ROWS,
    CorruptMemoryError,
    checksum,
    code_column,
    form_in,
    guarded_lists,
    is_blank,
    list_type,
)
from .rows import Rows
from .snapshot import Unreadable, data_files, reading, unpacked


class MemoryTable(Rows):
    """The rows of a memory store, and all that changes them: each write is a new Lance version.

    It is changed only inside `changing`, where the version that is read is the newest one and stays so.
    """

    @classmethod
    def create(cls, path: Path | str, maker: Maker, dtype: str, form: str) -> None:
        """Makes an empty table; memories of a fitted form are kept as they are until it is fitted."""
        metadata = {"format": FORMAT, "dtype": dtype, "form": form, "maker": asdict(maker)}
        table = cls(path, metadata)
        column = "memory" if form in ("none", *FITTED) else code_column(form)
        schema = table.schema_with(column, [], metadata)
        try:
            lance.write_dataset(schema.empty_table(), str(path), mode="create")
        except OSError:
            if is_blank(Path(path)) if table.remote is None else table.remote.is_blank:
                raise
            # Another process created it at the same moment.

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
                self.texts.note()
                self.deletions.note()
            yield got
            if got:
                self.deletions.note()

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Keeps the lock of a store in object storage through several changes; elsewhere each takes its own."""
        with self.parts.lock(exclusive=True) if self.remote is not None else nullcontext():
            yield

    def bring_up(self) -> int:
        """Takes in what an interrupted call left, drops what cannot be read; returns the version."""
        with self.changing():
            return self.version

    def write_basis(self, kind: str, tensors: dict[str, torch.Tensor]) -> str:
        """Writes a basis beside the table; returns the hash that names it."""
        digest, content = to_file(tensors)
        self.write_side_file(f"{kind}-{digest}.safetensors", content)
        return digest

    def arrays(self, columns: Mapping[str, Sequence] | None) -> dict[str, pa.Array]:
        """The user's columns in Arrow, typed as in the table if it has them and anything but None in them."""
        schema = self.snapshot().dataset.schema
        known = {name: schema.field(name).type for name in schema.names}
        return {name: to_arrow(name, values, known.get(name)) for name, values in (columns or {}).items()}

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
    ) -> list[dict]:
        """Writes rows beside the table; `commit` takes them in, also after a restart, in place of those of `replaced`.

        Args:
            made: memories as they are stored, `[n, size]`, and sketches where the table has some.

        Returns:
            The part's record; none in object storage, where it is in the table already.
        """
        rows = {"key": self.key_array(keys), "text": pa.array(texts, pa.string())}
        rows |= guarded_lists(keys, dict(zip(self.own_names[2:], made, strict=True)))
        try:
            rows |= self.guarded(keys, arrays)
            fragments = write_fragments(pa.table(rows), self.snapshot().dataset, mode="append")
            if self.remote is not None:
                self._take_in_at_once(fragments, replaced)
                return []
            files = [name for fragment in fragments for name in data_files(fragment)]
            records = [fragment.to_json() for fragment in fragments]
            return [self.parts.announce(records, files, self.own_names, replaced)]
        except OSError as error:
            raise OSError(
                f"writing to the memory store at {self.path} failed ({error}); what was written before is kept: make "
                "room on the disk and call add() again"
            ) from error

    def _take_in_at_once(self, fragments: list[FragmentMetadata], replaced: list[str]) -> None:
        """In object storage, whose lock is held for the whole addition: what is missing after a kill is seen there."""
        version = self.version
        self.refresh()
        self.remove([key for key in replaced if self.find([key])[0] >= 0])
        lance.LanceDataset.commit(str(self.path), lance.LanceOperation.Append(fragments), read_version=self.version)
        self.load(version)

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
        self.drop_untyped(arrays)
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

    def drop_untyped(self, arrays: dict[str, pa.Array]) -> None:
        """Drops columns of nothing but None that have a type in `arrays`, as if the table lacked them."""
        schema = self.snapshot().dataset.schema
        typed = [name for name, array in arrays.items() if name in schema.names and not pa.types.is_null(array.type)]
        if untyped := [name for name in typed if pa.types.is_null(schema.field(name).type)]:
            guards = [guard_of(name) for name in untyped if guard_of(name) in schema.names]
            self.snapshot().dataset.drop_columns([*untyped, *guards])
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
            keys = self.digits(batch["key"].to_pylist())
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

        has_texts = bool(self.texts.indexes())
        reader = pa.RecordBatchReader.from_batches(schema, batches())
        lance.write_dataset(reader, str(self.path), mode="overwrite", max_bytes_per_file=FILE_BYTES)
        self.refresh()
        if has_texts:  # after a kill before it, hybrid search is refused
            self.texts.make()

    def compact(self, keep: timedelta) -> None:
        """Joins small files, and removes what versions older than `keep` alone have, and what killed writers left."""
        row = self.form.size * self.form.numpy_type.itemsize + 512
        self.texts.bring_up()  # Lance joins no files of which an index has some
        dataset = lance.dataset(str(self.path))
        dataset.optimize.compact_files(target_rows_per_fragment=max(1024, FILE_BYTES // row))
        # Who writes a part holds the lock, shared, until it is announced, and those that were are in the table: what no
        # version has belongs to nobody. The lock of object storage can be taken from the living: there, Lance waits a
        # week.
        is_sure = self.remote is None
        lance.dataset(str(self.path)).cleanup_old_versions(older_than=keep, delete_unverified=is_sure)
        self.refresh()
        self.texts.note()


def pick(arrays: dict[str, pa.Array], rows: list[int]) -> dict[str, pa.Array]:
    return {name: array.take(pa.array(rows, pa.int64())) for name, array in arrays.items()}
