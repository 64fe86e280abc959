"""One version of the Lance dataset behind a memory store, as one process has it open."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import lance
import numpy as np
import pyarrow as pa
from lance.fragment import FragmentMetadata
from transformers.utils import logging

from .keys import KEY_LENGTH


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


@dataclass(frozen=True)
class Snapshot:
    """One version of the dataset as one process has it open, and where each key's row is in it."""

    dataset: "lance.LanceDataset"
    version: int
    keys: np.ndarray  # sorted, as `packed` has them
    offsets: np.ndarray
    unreadable: tuple[int, ...]  # fragments whose keys cannot be read

    @classmethod
    def load(cls, path: Path, version: int | None = None) -> "Snapshot":
        dataset = lance.dataset(str(path), version=version)
        unreadable = []
        try:
            keys = _key_array(dataset)
            offsets = np.arange(len(keys))
        except Unreadable:
            parts, count = [(np.empty(0, PACKED), np.empty(0, np.int64))], 0
            for fragment in dataset.get_fragments():
                try:
                    found = _key_array(fragment)
                    parts.append((found, np.arange(count, count + len(found))))
                except Unreadable:
                    unreadable.append(fragment.fragment_id)
                count += fragment.count_rows()
            keys, offsets = (np.concatenate(part) for part in zip(*parts, strict=True))
            logger.warning(
                f"{count - len(keys)} of {count} documents in {path} cannot be read: call add() with them again, "
                "which makes their memories anew"
            )
        # Two processes that added one document at the same time left two rows of it: the later one counts.
        keys, newest = np.unique(keys[::-1], return_index=True)
        return cls(dataset, dataset.version, keys, offsets[::-1][newest], tuple(unreadable))


@contextmanager
def reading() -> Iterator[None]:
    """Turns what Lance and Arrow raise for files that are gone, cut or changed into `Unreadable`."""
    try:
        yield
    except (OSError, ValueError, TypeError, RuntimeError) as error:
        raise Unreadable(str(error)) from error
    except BaseException as error:
        if type(error).__name__ == "PanicException":  # of Lance's Rust code: no Exception, nor a class to import
            raise Unreadable(str(error)) from error
        raise


def files_in(dataset: "lance.LanceDataset") -> list[str]:
    return [name for fragment in dataset.get_fragments() for name in files_of(fragment)]


def files_of(fragment: "lance.LanceFragment") -> list[str]:
    """All files of a fragment, relative to the table's folder."""
    deletions = fragment.deletion_file()
    return data_files(fragment.metadata) + ([] if deletions is None else [deletions])


def data_files(metadata: FragmentMetadata) -> list[str]:
    return [f"data/{file.path}" for file in metadata.files]


def _key_array(source) -> np.ndarray:
    with reading():
        # Millions of them, in every process that reads: at no time a Python object for each.
        keys = source.to_table(columns=["key"])["key"].cast(pa.binary()).cast(pa.binary(KEY_LENGTH)).combine_chunks()
        digits = keys.buffers()[1][keys.offset * KEY_LENGTH :].to_pybytes()[: len(keys) * KEY_LENGTH]
        return np.frombuffer(bytes.fromhex(digits.decode("ascii")), dtype=PACKED)
