"""One version of the Lance dataset behind a memory store, as one process has it open."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import lance
import numpy as np
import pyarrow as pa
from lance.fragment import FragmentMetadata
from transformers.utils import logging

from clara_hf.program.paths import is_plain_name

from ..keys import KEY_LENGTH


logger = logging.get_logger(__name__)

# Lance prints this at every fork. Only a forked process that reads is in danger, and `MemoryTable` stops that.
warnings.filterwarnings("ignore", message="lance is not fork-safe")


# Of a key: bytes, padded with zeros, as NumPy compares them.
PACKED = f"S{KEY_LENGTH // 2}"


class Unreadable(Exception):
    """Lance cannot read what was asked for."""


def packed(keys: Sequence[str]) -> np.ndarray:
    """Keys as the bytes that their digits stand for; what is no key is like no key."""
    return np.array([_bytes_of(str(key)) for key in keys], dtype=PACKED)


def _bytes_of(key: str) -> bytes:
    try:
        value = bytes.fromhex(key)
    except ValueError:
        return b""
    return value if value.hex() == key and len(key) == KEY_LENGTH else b""


def unpacked(keys: np.ndarray) -> list[str]:
    digits = keys.tobytes().hex()
    return [digits[start : start + KEY_LENGTH] for start in range(0, len(digits), KEY_LENGTH)]


def numbers_of(keys: np.ndarray) -> np.ndarray:
    """The first 63 bits of packed keys, int64, in the keys' order: two of 33 million share them once in 10^4 stores."""
    return (np.ascontiguousarray(keys).view(">u8")[::2] >> np.uint64(1)).astype(np.int64)


@dataclass(frozen=True)
class Piece:
    """A Lance fragment: its files, relative to the table's folder, and its rows, from offset `start` to `stop`."""

    fragment_id: int
    files: tuple[str, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Snapshot:
    """One version of the dataset as one process has it open, and where each key's row is in it."""

    dataset: "lance.LanceDataset"
    version: int
    keys: np.ndarray  # sorted, as `packed` has them
    offsets: np.ndarray
    doubled: np.ndarray  # offsets of rows whose key an earlier row has: two processes added one document
    pieces: tuple[Piece, ...]
    unreadable: tuple[Piece, ...]  # those whose keys cannot be read

    @cached_property
    def numbers(self) -> np.ndarray:
        return numbers_of(self.keys)

    @classmethod
    def load(cls, path: Path | str, before: "Snapshot | None" = None, version: int | None = None) -> "Snapshot":
        """Loads a version of the table at `path`: of what was only appended to `before`, only the new keys are read."""
        dataset = lance.dataset(str(path), version=version)
        if before is not None and before.version == dataset.version:
            return before
        pieces = _pieces(dataset)
        known = before
        if before is None or before.unreadable or before.pieces != pieces[: len(before.pieces)]:
            known = None
        start = 0 if known is None else len(known.pieces)
        keys, offsets, unreadable = _read_keys(dataset, path, pieces[start:])
        keys, first = np.unique(keys, return_index=True)
        offsets, doubled = offsets[first], np.delete(offsets, first)
        if known is not None and len(known.keys):
            places = np.searchsorted(known.keys, keys)
            is_new = known.keys[places.clip(max=len(known.keys) - 1)] != keys
            doubled = np.concatenate([known.doubled, doubled, offsets[~is_new]])
            keys = np.insert(known.keys, places[is_new], keys[is_new])
            offsets = np.insert(known.offsets, places[is_new], offsets[is_new])
        if unreadable:
            lost = sum(piece.stop - piece.start for piece in unreadable)
            logger.warning(
                f"{lost} of {pieces[-1].stop} documents in {path} cannot be read: call add() with them again, which "
                "makes their memories anew"
            )
        return cls(dataset, dataset.version, keys, offsets, doubled, pieces, unreadable)


@contextmanager
def reading() -> Iterator[None]:
    """Turns what Lance and Arrow raise for files that are gone, cut or changed into `Unreadable`."""
    try:
        yield
    except (OSError, ValueError, TypeError, RuntimeError, KeyError, IndexError, AttributeError) as error:
        raise Unreadable(" ".join(str(error).split())[:300]) from error
    except BaseException as error:
        if type(error).__name__ == "PanicException":  # of Lance's Rust code: no Exception, nor a class to import
            raise Unreadable(" ".join(str(error).split())[:300]) from error
        raise


def data_files(metadata: FragmentMetadata) -> list[str]:
    """The data files of a fragment, relative to the table's folder.

    Raises:
        Unreadable: one of them would lie elsewhere.
    """
    for file in metadata.files:
        if not is_plain_name(file.path) or file.base_id is not None:
            raise Unreadable(f"a data file is named {file.path!r}")
    return [f"data/{file.path}" for file in metadata.files]


def _pieces(dataset: "lance.LanceDataset") -> tuple[Piece, ...]:
    pieces, start = [], 0
    for fragment in dataset.get_fragments():
        stop = start + fragment.count_rows()
        try:
            deletions = fragment.deletion_file()
            files = (*data_files(fragment.metadata), *([] if deletions is None else [deletions]))
        except Unreadable:
            files = ("",)  # no file's name: what it holds is not read
        pieces.append(Piece(fragment.fragment_id, files, start, stop))
        start = stop
    return tuple(pieces)


def _read_keys(
    dataset: "lance.LanceDataset", path: Path | str, pieces: tuple[Piece, ...]
) -> tuple[np.ndarray, np.ndarray, tuple[Piece, ...]]:
    """Keys and offsets of all rows of `pieces`, in their order, and the pieces that cannot be read."""
    lost: set[int] = set()
    if isinstance(path, Path):  # in object storage, reading shows it
        lost = {piece.fragment_id for piece in pieces if not all((path / name).is_file() for name in piece.files)}
    whole = [piece for piece in pieces if piece.fragment_id not in lost]
    try:
        found = [(_key_array(dataset, whole), whole)]
        if len(found[0][0]) != sum(piece.stop - piece.start for piece in whole):
            raise Unreadable("there are more or fewer keys than rows")
    except Unreadable:
        found = []
        for piece in whole:
            try:
                keys = _key_array(dataset, [piece])
                if len(keys) != piece.stop - piece.start:
                    raise Unreadable("there are more or fewer keys than rows")
                found.append((keys, [piece]))
            except Unreadable:
                lost.add(piece.fragment_id)
    keys = np.concatenate([np.empty(0, PACKED), *(keys for keys, _ in found)])
    ranges = [np.arange(piece.start, piece.stop) for _, read in found for piece in read]
    offsets = np.concatenate([np.empty(0, np.int64), *ranges])
    return keys, offsets, tuple(piece for piece in pieces if piece.fragment_id in lost)


def _key_array(dataset: "lance.LanceDataset", pieces: Sequence[Piece]) -> np.ndarray:
    if not pieces:
        return np.empty(0, PACKED)
    with reading():
        fragments: list = [dataset.get_fragment(piece.fragment_id) for piece in pieces]
        keys = dataset.scanner(columns=["key"], fragments=fragments).to_table()["key"].combine_chunks()
        if keys.null_count:
            raise ValueError("keys are missing")
        if keys.type == pa.binary(KEY_LENGTH // 2):
            return np.frombuffer(keys.buffers()[1], PACKED, count=len(keys), offset=keys.offset * KEY_LENGTH // 2)
        # Of format 1, as digits. Millions of them, in every process that reads: at no time a Python object for each.
        keys = keys.cast(pa.binary()).cast(pa.binary(KEY_LENGTH))
        digits = keys.buffers()[1][keys.offset * KEY_LENGTH :].to_pybytes()[: len(keys) * KEY_LENGTH]
        return np.frombuffer(bytes.fromhex(digits.decode("ascii")), dtype=PACKED)
