"""The Lance dataset behind `MemoryStore`: its schema, where each key's row is, verified reads, appends and repairs."""

import json
import os
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np


try:
    import lance
    import pyarrow as pa
    from lance.fragment import FragmentMetadata, write_fragments
except ImportError as error:
    raise ImportError('the memory store needs Lance: pip install "clara-hf[index]"') from error

from .journal import FOLDER, Parts, Signature
from .keys import Maker, key_of
from .snapshot import Snapshot, Unreadable, data_files, files_in, files_of, packed, reading, unpacked


FORMAT = 1
METADATA_KEY = b"clara.memory_store"
# Of a store: ours, and Lance's.
FOLDERS = (FOLDER, "data", "_deletions", "_indices", "_transactions", "_versions")
OWN_COLUMNS = ("key", "text", "memory", "checksum")
READ_ROWS = 512
# Arrow and NumPy have no bfloat16: its bits are kept as uint16.
NUMPY_TYPES = {"float16": np.float16, "bfloat16": np.uint16, "float32": np.float32}


class CorruptMemoryError(OSError):
    """A stored row cannot be read, or is not what was written."""


class MemoryTable:
    """Rows of key, text, memory, checksum and the user's columns at `path`; each write is a new Lance version.

    A table reads the version that it loaded at its first use, until `forget` is called. It can be pickled: the copy
    opens the dataset for itself. A forked process cannot use it, where Lance's threads are missing, not their locks.
    """

    def __init__(self, path: Path, maker: Maker, dtype: str):
        self.path = path
        self.maker = maker
        self.dtype = dtype
        self.parts = Parts(path)
        self._loaded: Snapshot | None = None
        self._process = os.getpid()

    @classmethod
    def create(cls, path: Path, maker: Maker, dtype: str) -> None:
        schema = pa.schema(
            [
                pa.field("key", pa.string(), nullable=False),
                pa.field("text", pa.string(), nullable=False),
                pa.field("memory", _memory_type(dtype, maker.width), nullable=False),
                pa.field("checksum", pa.uint32(), nullable=False),
            ],
            metadata={METADATA_KEY: json.dumps({"format": FORMAT, "dtype": dtype, "maker": asdict(maker)})},
        )
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
                metadata = json.loads(lance.dataset(str(path)).schema.metadata[METADATA_KEY])
        except (Unreadable, TypeError, KeyError) as error:
            raise ValueError(f"{path} is not a memory store: choose another path") from error
        if not isinstance(metadata, dict) or metadata.get("format") != FORMAT:
            found = metadata.get("format") if isinstance(metadata, dict) else metadata
            raise ValueError(f"the memory store at {path} has format {found!r}; this version reads {FORMAT}")
        for name in FOLDERS:
            # What is made, renamed and removed in them must be inside the store.
            if (path / name).is_symlink():
                raise ValueError(f"{path / name} is a link: a memory store holds no links; put what it leads to there")
        return cls(path, Maker(**metadata["maker"]), metadata["dtype"])

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_loaded": None}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state, _process=os.getpid())

    def __len__(self) -> int:
        return len(self._snapshot().keys)

    def forget(self) -> None:
        """Makes the next use load the newest version."""
        self._loaded = None

    def load(self, version: int) -> None:
        """Makes the next use read `version`, which another process may just have written."""
        if self._loaded is None or self._loaded.version != version:
            self._loaded = Snapshot.load(self.path, version)

    @property
    def version(self) -> int:
        return self._snapshot().version

    def _snapshot(self) -> "Snapshot":
        if self._process != os.getpid():
            raise RuntimeError(
                f"the memory store at {self.path} was opened before this process was forked, and Lance can hang in "
                'forked processes: start it with "forkserver" or "spawn" (multiprocessing_context of a DataLoader)'
            )
        if self._loaded is None:
            self._loaded = Snapshot.load(self.path)
        return self._loaded

    def key_of(self, text: str) -> str:
        return key_of(self.maker.fingerprint, text)

    @property
    def column_names(self) -> list[str]:
        """What `columns` can read: the text and the user's columns."""
        return [name for name in self._snapshot().dataset.schema.names if name == "text" or name not in OWN_COLUMNS]

    def all_keys(self) -> list[str]:
        return unpacked(self._snapshot().keys)

    def find(self, keys: Sequence[str]) -> np.ndarray:
        """Row offsets of `keys`, -1 for those that are not stored."""
        snapshot = self._snapshot()
        if len(keys) == 0 or len(snapshot.keys) == 0:
            return np.full(len(keys), -1)
        wanted = packed(keys)
        places = np.searchsorted(snapshot.keys, wanted).clip(max=len(snapshot.keys) - 1)
        return np.where(snapshot.keys[places] == wanted, snapshot.offsets[places], -1)

    def read(self, keys: Sequence[str], offsets: np.ndarray, out: np.ndarray, whole: bool = False) -> np.ndarray:
        """Reads memories into `out` `[n, width]`; returns whether each is what was written for its key, `[n]` bool.

        With `whole`, a row also counts only if its text belongs to its key and its other columns can be read.
        """
        columns = ["memory", "checksum", *(self.column_names if whole else [])]
        try:
            with reading():
                table = self._snapshot().dataset.take(offsets.tolist(), columns=columns)
                values = table["memory"].combine_chunks().flatten().to_numpy(zero_copy_only=True)
                out[:] = values.reshape(out.shape)
                written = table["checksum"].to_pylist()
                texts = table["text"].to_pylist() if whole else None
        except Unreadable:
            if len(keys) == 1:
                return np.zeros(1, dtype=bool)
            # One bad row makes Lance refuse them all: halve until it is known which.
            half = len(keys) // 2
            halves = (slice(half), slice(half, None))
            return np.concatenate([self.read(keys[part], offsets[part], out[part], whole) for part in halves])
        intact = [_checksum(*row) == check for *row, check in zip(keys, out, written, strict=True)]
        if whole:
            intact = [good and self.key_of(text) == key for good, key, text in zip(intact, keys, texts, strict=True)]
        return np.array(intact, dtype=bool)

    def columns(self, keys: Sequence[str], offsets: np.ndarray, names: list[str]) -> dict[str, list]:
        try:
            with reading():
                table = self._snapshot().dataset.take(offsets.tolist(), columns=names).to_pydict() if names else {}
        except Unreadable as error:
            raise CorruptMemoryError(
                f"columns {names} of these {len(keys)} keys cannot be read from {self.path}: call add() with the "
                f"documents again ({error})"
            ) from error
        for key, text in zip(keys, table.get("text", ()), strict=False):
            if self.key_of(text) != key:
                raise CorruptMemoryError(
                    f"the text of key {key} in {self.path} is damaged on disk: call add() with its document again"
                )
        return table

    def arrays(self, columns: dict[str, Sequence], count: int) -> dict[str, pa.Array]:
        """The user's columns of `count` documents in Arrow, typed as in the table if it has them."""
        schema = self._snapshot().dataset.schema
        arrays = {}
        for name, values in columns.items():
            if name in OWN_COLUMNS or not name or name.startswith("_") or "." in name:
                raise ValueError(f"column {name!r}: choose a name without '.' or leading '_', none of {OWN_COLUMNS}")
            if len(values) != count:
                raise ValueError(f"column {name!r} has {len(values)} values for {count} documents")
            known = schema.field(name).type if name in schema.names else None
            try:
                array = pa.array(list(values), type=known)
            except (pa.ArrowException, OverflowError, TypeError) as error:
                wanted = "values of one type" if known is None else f"values of type {known}, as stored"
                raise ValueError(f"column {name!r} must hold {wanted}: {error}") from error
            if not pa.types.is_null(array.type):  # nothing but None gives no type to make a column of
                arrays[name] = array
        return arrays

    def write_part(self, keys: list[str], texts: list[str], memories: np.ndarray, arrays: dict[str, pa.Array]) -> dict:
        """Writes rows with `memories` `[n, width]` beside the table; `commit` takes them in, also after a restart.

        Returns:
            The part's record.
        """
        values = pa.array(memories.reshape(-1))
        rows = {
            "key": pa.array(keys),
            "text": pa.array(texts),
            "memory": pa.FixedSizeListArray.from_arrays(values, type=_memory_type(self.dtype, self.maker.width)),
            "checksum": pa.array([_checksum(*row) for row in zip(keys, memories, strict=True)], pa.uint32()),
        }
        try:
            fragments = write_fragments(pa.table({**rows, **arrays}), self._snapshot().dataset, mode="append")
            files = [name for fragment in fragments for name in data_files(fragment)]
            return self.parts.announce([fragment.to_json() for fragment in fragments], files)
        except OSError as error:
            raise OSError(
                f"writing to the memory store at {self.path} failed ({error}); what was written before is kept: make "
                "room on the disk and call add() again"
            ) from error

    def commit(self, written: Sequence[dict] = ()) -> None:
        """Takes all parts that wait into the table, those of `written` among them, in one new version."""
        # A network file system may list the parts of other processes late: theirs come as records too.
        parts = {part["name"]: part for part in [*self.parts.waiting(), *written]}
        if not parts:
            return
        dataset = lance.dataset(str(self.path))
        # After a kill between commit and discard, or if two processes commit at a time, some are in already.
        present = set(files_in(dataset))
        fragments = [
            FragmentMetadata.from_json(json.dumps(each)) for part in parts.values() for each in part["fragments"]
        ]
        new = [fragment for fragment in fragments if present.isdisjoint(data_files(fragment))]
        if new:
            operation = lance.LanceOperation.Append(new)
            lance.LanceDataset.commit(str(self.path), operation, read_version=dataset.version)
        self.trust({name: signature for part in parts.values() for name, signature in part["files"].items()})
        self.parts.discard(parts)
        self.forget()

    def trust(self, signatures: dict[str, Signature]) -> None:
        """Remembers files as sound that were read whole, or just written, with these signatures."""
        if signatures:
            self.parts.trust(signatures, files_in(lance.dataset(str(self.path))))

    @contextmanager
    def _changing(self) -> Iterator["lance.LanceDataset"]:
        """The dataset, to be changed in the block: files that appear there count as sound, and are loaded next."""
        dataset = self._snapshot().dataset
        before = set(files_in(dataset))
        yield dataset
        self.trust(self.parts.signatures(set(files_in(lance.dataset(str(self.path)))) - before))
        self.forget()

    def remove(self, keys: list[str]) -> None:
        with self._changing() as dataset:
            for start in range(0, len(keys), 1000):
                listed = ", ".join(f"'{key}'" for key in keys[start : start + 1000])
                dataset.delete(f"key IN ({listed})")

    def remove_unreadable(self) -> None:
        """Drops the parts whose keys cannot be read, without which nothing else could be changed."""
        snapshot = self._snapshot()
        if snapshot.unreadable:
            operation = lance.LanceOperation.Delete([], list(snapshot.unreadable), predicate="unreadable")
            lance.LanceDataset.commit(str(self.path), operation, read_version=snapshot.version)
            self.forget()

    def doubtful(self, keys: Sequence[str], everything: bool) -> list["Piece"]:
        """Pieces of the table that hold one of `keys` and that changed, or were copied, since they were found sound;
        or all that hold one of `keys`, if `everything`."""
        snapshot = self._snapshot()
        sound = {} if everything else self.parts.sound()
        offsets = np.sort(self.find(keys))
        pieces, start = [], 0
        for fragment in snapshot.dataset.get_fragments():
            stop = start + fragment.count_rows()
            files = self.parts.signatures(files_of(fragment))
            wanted = np.searchsorted(offsets, stop) > np.searchsorted(offsets, start)
            if wanted and any(signature is None or sound.get(name) != signature for name, signature in files.items()):
                pieces.append(Piece(files, start, stop))
            start = stop
        return pieces

    def damaged(self, piece: "Piece") -> Iterator[tuple[int, list[str]]]:
        """Reads a piece whole: yields how many rows were read, and the keys of the damaged ones among them."""
        snapshot = self._snapshot()
        inside = (snapshot.offsets >= piece.start) & (snapshot.offsets < piece.stop)
        keys, offsets = snapshot.keys[inside], snapshot.offsets[inside]
        order = np.argsort(offsets)
        scratch = np.empty((min(READ_ROWS, len(order)), self.maker.width), NUMPY_TYPES[self.dtype])
        for start in range(0, len(order), READ_ROWS):
            rows = order[start : start + READ_ROWS]
            some = unpacked(keys[rows])
            intact = self.read(some, offsets[rows], scratch[: len(rows)], whole=True)
            yield len(rows), [key for key, good in zip(some, intact, strict=True) if not good]

    def set_columns(self, keys: list[str], arrays: dict[str, pa.Array]) -> None:
        """Adds the columns that the table lacks, and gives the rows of `keys` the values in `arrays`."""
        if not arrays:
            return
        with self._changing() as dataset:
            new = {name: array for name, array in arrays.items() if name not in dataset.schema.names}
            known = {name: array for name, array in arrays.items() if name not in new}
            if known and keys:
                before = self.columns(keys, self.find(keys), list(known))
                after = {name: array.to_pylist() for name, array in known.items()}
                rows = [row for row in range(len(keys)) if any(before[name][row] != after[name][row] for name in known)]
                if rows:
                    changed = pa.table({"key": [keys[row] for row in rows], **pick(known, rows)})
                    dataset.merge_insert("key").when_matched_update_all().execute(changed)
            if new and keys:
                dataset.merge(pa.table({"key": keys, **new}), "key")
            elif new:
                dataset.add_columns([pa.field(name, array.type) for name, array in new.items()])


@dataclass(frozen=True)
class Piece:
    """A Lance fragment: the rows from offset `start` to `stop`, and the signatures of its files."""

    files: dict[str, Signature]
    start: int
    stop: int


def is_blank(path: Path) -> bool:
    """Whether a table can be created at `path`: nothing is there, or what is left of a creation that was cut off."""
    if not path.exists():
        return True
    return path.is_dir() and all(file.is_dir() or file.parent.name == "_transactions" for file in path.rglob("*"))


def pick(arrays: dict[str, pa.Array], rows: list[int]) -> dict[str, pa.Array]:
    return {name: array.take(pa.array(rows, pa.int64())) for name, array in arrays.items()}


def _checksum(key: str, memory: np.ndarray) -> int:
    # With the key in it, a memory in another document's row is found too.
    return zlib.crc32(memory, zlib.crc32(key.encode()))


def _memory_type(dtype: str, width: int) -> pa.DataType:
    # Lance reads lists of items that cannot be null about twice as fast.
    return pa.list_(pa.field("item", pa.from_numpy_dtype(NUMPY_TYPES[dtype]), nullable=False), width)
