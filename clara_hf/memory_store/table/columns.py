"""The user's columns: typed so that what comes back equals what went in, and a checksum for every value."""

import datetime
import json
import math
import zlib
from collections.abc import Mapping, Sequence

import numpy as np
import pyarrow as pa


# Of every store; and what begins so is ours too.
OWN_COLUMNS = ("key", "text", "memory", "checksum")
OWN_PREFIXES = ("_", "code_", "sketch_")


def is_own(name: str) -> bool:
    return name in OWN_COLUMNS or name.startswith(OWN_PREFIXES)


def guard_of(name: str) -> str:
    """The column with the checksums of column `name`."""
    return "checksum" if name == "memory" else f"_crc_{name}"


def check_columns(columns: Mapping[str, Sequence] | None, count: int) -> None:
    """Raises `ValueError` for names that a store cannot have, and for columns that are not one value per document."""
    for name, values in (columns or {}).items():
        if not isinstance(name, str) or not name or "." in name or is_own(name):
            raise ValueError(
                f"column {name!r}: choose a name without '.', none of {OWN_COLUMNS}, that begins with none of "
                f"{OWN_PREFIXES}"
            )
        if isinstance(values, (str, bytes, Mapping)):
            raise ValueError(f"column {name!r} is {values!r:.60}; it must be a list with one value per document")
        if len(values) != count:
            raise ValueError(f"column {name!r} has {len(values)} values for {count} documents")


def to_arrow(name: str, values: Sequence, known: pa.DataType | None) -> pa.Array:
    """A column in Arrow, of the type that the table `known` it by if it does; of nothing but None, of the null type.

    Raises:
        ValueError: a value would not come back as it is.
    """
    values = list(values)
    known = None if known is not None and pa.types.is_null(known) else known
    try:
        array = pa.array(values, type=known)
        if known is None and not pa.types.is_null(array.type):
            array = pa.array(values, type=_settled(array.type))
        found = array.to_pylist()
    except (pa.ArrowException, OverflowError, TypeError, ValueError) as error:
        wanted = "values of one type" if known is None else f"values of type {known}, as stored"
        raise ValueError(f"column {name!r} must hold {wanted}: {error}") from error
    for position, (given, kept) in enumerate(zip(values, found, strict=True)):
        if not _same(given, kept):
            stored = f"the store keeps this column as {array.type}" if known else f"the column's type is {array.type}"
            raise ValueError(
                f"column {name!r}: value {position}, {given!r:.80}, would come back as {kept!r:.80} ({stored}): give "
                "values of that type, or another column name"
            )
    return array


def _settled(kind: pa.DataType) -> pa.DataType:
    """`kind` with strings where nothing but None and empty lists says what is in it: later values need a type.

    Raises:
        ValueError: a dictionary is always empty, which cannot be stored.
    """
    if pa.types.is_null(kind):
        return pa.string()
    if pa.types.is_list(kind):
        return pa.list_(_settled(kind.value_type))
    if pa.types.is_struct(kind):
        if not kind.num_fields:
            raise ValueError("a dictionary without keys cannot be stored: give None, or leave it out")
        return pa.struct([field.with_type(_settled(field.type)) for field in kind])
    return kind


def _same(given, kept) -> bool:
    """Whether a value read from Arrow is the one that was given; tuples and arrays come back as lists."""
    if isinstance(given, (np.generic, np.ndarray)) and not isinstance(given, (np.datetime64, np.timedelta64)):
        given = given.tolist()
    if given is None or kept is None:
        return given is kept
    if isinstance(given, Mapping):
        same_keys = isinstance(kept, dict) and given.keys() == kept.keys()
        return same_keys and all(_same(value, kept[name]) for name, value in given.items())
    if isinstance(given, (list, tuple)):
        same_length = isinstance(kept, (list, tuple)) and len(given) == len(kept)
        return same_length and all(map(_same, given, kept))
    if isinstance(given, (str, bytes, bool)) or isinstance(kept, (str, bytes, bool)):
        return type(kept) in type(given).__mro__ and given == kept
    if isinstance(given, float) and math.isnan(given):
        return isinstance(kept, float) and math.isnan(kept)
    if isinstance(given, (datetime.datetime, datetime.time)):
        return given == kept and str(given.tzinfo) == str(kept.tzinfo) and given.utcoffset() == kept.utcoffset()
    return bool(given == kept)


def checksums(keys: Sequence[str], array: pa.Array | pa.ChunkedArray) -> list[int | None]:
    """The checksum of each value, with its row's key in it; None for None."""
    return [
        None if value is None else zlib.crc32(value, zlib.crc32(key.encode()))
        for key, value in zip(keys, _bytes_of(array), strict=True)
    ]


def _bytes_of(array: pa.Array | pa.ChunkedArray) -> list[bytes | None]:
    if isinstance(array, pa.ChunkedArray):
        array = pa.concat_arrays(array.chunks) if array.num_chunks else pa.array([], array.type)
    if pa.types.is_temporal(array.type) and not pa.types.is_interval(array.type):
        # As numbers: how a time is written out depends on the time zones that a machine knows.
        array = array.view(pa.int64() if array.type.bit_width == 64 else pa.int32())
    return [
        None if value is None else json.dumps(value, default=_text, sort_keys=True).encode()
        for value in array.to_pylist()
    ]


def _text(value) -> str:
    return value.hex() if isinstance(value, bytes) else str(value)
