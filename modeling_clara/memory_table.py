"""The Lance dataset behind `MemoryStore`: its schema, where each key's row is, verified reads, appends and repairs."""

import hashlib
import json
import os
import warnings
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from transformers.utils import logging


try:
    import lance
    import pyarrow as pa
except ImportError as error:
    raise ImportError('the memory store needs Lance: pip install "clara-hf[index]"') from error

logger = logging.get_logger(__name__)

# Lance prints this at each fork of a data loader. A forked worker opens the dataset for itself before it reads
# (`MemoryTable._snapshot`), so there is nothing for the user to change.
warnings.filterwarnings("ignore", message="lance is not fork-safe")

FORMAT = 1
METADATA_KEY = b"clara.memory_store"
OWN_COLUMNS = ("key", "text", "memory", "checksum")
KEY_LENGTH = 32
# Arrow and NumPy have no bfloat16: its bits are kept as uint16.
NUMPY_TYPES = {"float16": np.float16, "bfloat16": np.uint16, "float32": np.float32}


class _Unreadable(Exception):
    """Lance cannot read what was asked for."""


class CorruptMemoryError(RuntimeError):
    """A stored row cannot be read, or is not what was written."""


@dataclass(frozen=True)
class Maker:
    """Which compressor made the memories of a store."""

    fingerprint: str
    num_memory_tokens: int
    hidden_size: int
    doc_max_length: int
    base: str | None

    @classmethod
    def of(cls, model) -> "Maker":
        config = model.config
        return cls(
            fingerprint=model.compressor_fingerprint(),
            num_memory_tokens=config.num_memory_tokens,
            hidden_size=config.hidden_size,
            doc_max_length=config.doc_max_length,
            base=config.base_model_name_or_path,
        )

    def __str__(self) -> str:
        return (
            f"compressor {self.fingerprint[:16]} on base {self.base} ({self.num_memory_tokens} memory tokens of width "
            f"{self.hidden_size}, documents of at most {self.doc_max_length} tokens)"
        )

    @property
    def width(self) -> int:
        """Values in one memory."""
        return self.num_memory_tokens * self.hidden_size

    def makes_the_same_as(self, other: "Maker") -> bool:
        """Whether both give equal memories; the base's name may differ, since the fingerprint covers the base."""
        return replace(self, base=None) == replace(other, base=None)


class MemoryTable:
    """Rows of key, text, memory, checksum and the user's columns at `path`; each write is a new Lance version.

    A table reads the version that it loaded at its first use, until `forget` is called. It can be pickled and forked:
    every process opens the dataset for itself.
    """

    def __init__(self, path: Path, maker: Maker, dtype: str):
        self.path = path
        self.maker = maker
        self.dtype = dtype
        self._loaded: _Snapshot | None = None

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
            with _reading():
                if not path.is_dir():
                    raise NotADirectoryError(path)  # Lance would retry for seconds
                metadata = json.loads(lance.dataset(str(path)).schema.metadata[METADATA_KEY])
        except (_Unreadable, TypeError, KeyError) as error:
            raise ValueError(f"{path} is not a memory store: choose another path") from error
        if metadata["format"] != FORMAT:
            raise ValueError(f"the memory store at {path} has format {metadata['format']}; this version reads {FORMAT}")
        return cls(path, Maker(**metadata["maker"]), metadata["dtype"])

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_loaded": None}

    def __len__(self) -> int:
        return len(self._snapshot().keys)

    def forget(self) -> None:
        """Makes the next use load the newest version."""
        self._loaded = None

    def _snapshot(self) -> "_Snapshot":
        if self._loaded is None:
            self._loaded = _Snapshot.load(self.path)
        elif self._loaded.process != os.getpid():
            self._loaded = self._loaded.reopened()
        return self._loaded

    def key_of(self, text: str) -> str:
        return key_of(self.maker.fingerprint, text)

    @property
    def column_names(self) -> list[str]:
        """What `columns` can read: the text and the user's columns."""
        return [name for name in self._snapshot().dataset.schema.names if name == "text" or name not in OWN_COLUMNS]

    def find(self, keys: Sequence[str]) -> np.ndarray:
        """Row offsets of `keys`, -1 for those that are not stored."""
        snapshot = self._snapshot()
        if len(keys) == 0 or len(snapshot.keys) == 0:
            return np.full(len(keys), -1)
        wanted = np.array([str(key).encode() for key in keys])
        places = np.searchsorted(snapshot.keys, wanted).clip(max=len(snapshot.keys) - 1)
        return np.where(snapshot.keys[places] == wanted, snapshot.offsets[places], -1)

    def read(self, keys: Sequence[str], offsets: np.ndarray, out: np.ndarray, whole: bool = False) -> np.ndarray:
        """Reads memories into `out` `[n, width]`; returns whether each is what was written for its key, `[n]` bool.

        With `whole`, a row also counts only if its text belongs to its key and its other columns can be read.
        """
        columns = ["memory", "checksum", *(self.column_names if whole else [])]
        try:
            with _reading():
                table = self._snapshot().dataset.take(offsets.tolist(), columns=columns)
                values = table["memory"].combine_chunks().flatten().to_numpy(zero_copy_only=True)
                out[:] = values.reshape(out.shape)
                written = table["checksum"].to_pylist()
                texts = table["text"].to_pylist() if whole else None
        except _Unreadable:
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
            with _reading():
                table = self._snapshot().dataset.take(offsets.tolist(), columns=names).to_pydict() if names else {}
        except _Unreadable as error:
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

    def append(self, keys: list[str], texts: list[str], memories: np.ndarray, arrays: dict[str, pa.Array]) -> None:
        """Writes rows with `memories` `[n, width]`, in one new version."""
        values = pa.array(memories.reshape(-1))
        rows = {
            "key": pa.array(keys),
            "text": pa.array(texts),
            "memory": pa.FixedSizeListArray.from_arrays(values, type=_memory_type(self.dtype, self.maker.width)),
            "checksum": pa.array([_checksum(*row) for row in zip(keys, memories, strict=True)], pa.uint32()),
        }
        try:
            self._snapshot().dataset.insert(pa.table({**rows, **arrays}))
        except OSError as error:
            raise OSError(
                f"writing to the memory store at {self.path} failed ({error}); what was appended before is kept: make "
                "room on the disk and call add() again"
            ) from error

    def remove(self, keys: list[str]) -> None:
        for start in range(0, len(keys), 1000):
            listed = ", ".join(f"'{key}'" for key in keys[start : start + 1000])
            self._snapshot().dataset.delete(f"key IN ({listed})")
        self.forget()

    def remove_unreadable(self) -> None:
        """Drops the parts whose keys cannot be read, without which nothing else could be changed."""
        snapshot = self._snapshot()
        if snapshot.unreadable:
            operation = lance.LanceOperation.Delete([], list(snapshot.unreadable), predicate="unreadable")
            lance.LanceDataset.commit(str(self.path), operation, read_version=snapshot.version)
            self.forget()

    def set_columns(self, keys: list[str], arrays: dict[str, pa.Array]) -> None:
        """Adds the columns that the table lacks, and gives the rows of `keys` the values in `arrays`."""
        dataset = self._snapshot().dataset
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
        if arrays:
            self.forget()


@dataclass(frozen=True)
class _Snapshot:
    """One version of the dataset as one process has it open, and where each key's row is in it."""

    dataset: "lance.LanceDataset"
    process: int
    version: int
    keys: np.ndarray  # sorted; arrays, because forked workers share their pages, while a dict's would be copied
    offsets: np.ndarray
    unreadable: tuple[int, ...]  # fragments whose keys cannot be read

    @classmethod
    def load(cls, path: Path) -> "_Snapshot":
        dataset = lance.dataset(str(path))
        unreadable = []
        try:
            keys = _key_array(dataset)
            offsets = np.arange(len(keys))
        except _Unreadable:
            parts, count = [(np.empty(0, f"S{KEY_LENGTH}"), np.empty(0, np.int64))], 0
            for fragment in dataset.get_fragments():
                try:
                    found = _key_array(fragment)
                    parts.append((found, np.arange(count, count + len(found))))
                except _Unreadable:
                    unreadable.append(fragment.fragment_id)
                count += fragment.count_rows()
            keys, offsets = (np.concatenate(part) for part in zip(*parts, strict=True))
            logger.warning(
                f"{count - len(keys)} of {count} documents in {path} cannot be read: call add() with them again, "
                "which makes their memories anew"
            )
        # Two processes that added one document at the same time left two rows of it: the later one counts.
        keys, newest = np.unique(keys[::-1], return_index=True)
        return cls(dataset, os.getpid(), dataset.version, keys, offsets[::-1][newest], tuple(unreadable))

    def reopened(self) -> "_Snapshot":
        """The same version for another process: a Lance handle is not meant to survive a fork."""
        return replace(self, dataset=lance.dataset(self.dataset.uri, version=self.version), process=os.getpid())


@contextmanager
def _reading() -> Iterator[None]:
    """Turns what Lance and Arrow raise for files that are gone, cut or changed into `_Unreadable`."""
    try:
        yield
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        raise _Unreadable(str(error)) from error
    except BaseException as error:
        if type(error).__name__ == "PanicException":  # of Lance's Rust code: no Exception, nor a class to import
            raise _Unreadable(str(error)) from error
        raise


def key_of(fingerprint: str, text: str) -> str:
    return hashlib.sha256(f"{fingerprint}\0{text}".encode()).hexdigest()[:KEY_LENGTH]


def is_blank(path: Path) -> bool:
    """Whether a table can be created at `path`: nothing is there, or what is left of a creation that was cut off."""
    if not path.exists():
        return True
    return path.is_dir() and all(file.is_dir() or file.parent.name == "_transactions" for file in path.rglob("*"))


def pick(arrays: dict[str, pa.Array], rows: list[int]) -> dict[str, pa.Array]:
    return {name: array.take(pa.array(rows, pa.int64())) for name, array in arrays.items()}


def _key_array(source) -> np.ndarray:
    with _reading():
        keys = source.to_table(columns=["key"])["key"].to_pylist()
        if any(len(key) != KEY_LENGTH for key in keys):
            raise ValueError("the keys are damaged")
        return np.array(keys, dtype=f"S{KEY_LENGTH}")


def _checksum(key: str, memory: np.ndarray) -> int:
    # With the key in it, a memory in another document's row is found too.
    return zlib.crc32(memory, zlib.crc32(key.encode()))


def _memory_type(dtype: str, width: int) -> pa.DataType:
    # Lance reads lists of items that cannot be null about twice as fast.
    return pa.list_(pa.field("item", pa.from_numpy_dtype(NUMPY_TYPES[dtype]), nullable=False), width)
