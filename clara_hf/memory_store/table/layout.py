"""What a memory store consists of on disk: its description, its folders, its columns, and a checksum for every row."""

import json
import zlib
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path

import numpy as np
import pyarrow as pa
import torch

from ..encoding import FORMS
from ..keys import Maker
from .columns import guard_of
from .journal import FOLDER


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


class Link(OSError):
    """A link where a folder of the store should be."""


def check_folder(path: Path) -> None:
    """Raises `OSError` unless a local table can be at `path`."""
    if not path.is_dir():
        raise NotADirectoryError(path)  # Lance would retry for seconds
    for name in FOLDERS:
        # What is made, renamed and removed in them must be inside the store.
        if (path / name).is_symlink():
            raise Link(path / name)


def check_description(path: Path | str, metadata: dict, schema: pa.Schema) -> None:
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


def checksum(key: str, row: np.ndarray) -> int:
    # With the key in it, a memory in another document's row is found too.
    return zlib.crc32(row.data, zlib.crc32(key.encode()))


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
