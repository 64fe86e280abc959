import datetime
import decimal
import json
import zlib
from zoneinfo import ZoneInfo

import lance
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from datasets import Dataset
from memory_fakes import DOCUMENTS, FakeModel, expected, replace_bytes

from clara_hf.memory_store.store import CorruptMemoryError, MemoryStore


# pytest drops the filter that modeling_clara sets for it at import.
pytestmark = pytest.mark.filterwarnings("ignore:lance is not fork-safe")

UTC, BERLIN = datetime.timezone.utc, ZoneInfo("Europe/Berlin")
NOON = datetime.datetime(2024, 7, 1, 12)


@pytest.mark.parametrize(
    "values",
    [
        [1, -2],
        [2.5, float("nan")],
        ["abc", ""],
        [b"\0\xff", b""],
        [True, None],
        [["a", "b"], []],
        [{"a": 1, "b": [1.5]}, {"a": None, "b": []}],
        [NOON, datetime.datetime(1, 1, 1)],
        [NOON.replace(tzinfo=UTC), None],
        [datetime.date(2024, 2, 29), None],
        [datetime.timedelta(days=1, microseconds=1), None],
        [decimal.Decimal("1.50"), decimal.Decimal("-3.25")],
    ],
    ids=str,
)
def test_what_comes_back_equals_what_went_in_also_in_a_second_call(store, values):
    keys = store.add(["one", "two"], {"value": values}, show_progress=False)
    keys += store.add(["three", "four"], {"value": values}, show_progress=False)
    found = MemoryStore.open(store.path).columns(keys, ["value"])["value"]
    assert repr(found) == repr([*values, *values]) or found == [*values, *values]
    assert [type(value) for value in found] == [type(value) for value in [*values, *values]]


@pytest.mark.parametrize(
    ("before", "value"),
    [
        (2, 2.5),
        (2, True),
        (2.5, 2**60 + 1),
        ("abc", 1),
        (["a", "b", "c"], "abc"),
        ({"a": 1}, {"a": 1, "b": 2}),
        ({"a": 1, "b": 2}, {"a": 1}),
        (NOON, NOON.replace(tzinfo=UTC)),
        (NOON.replace(tzinfo=UTC), NOON),
        (NOON.replace(tzinfo=UTC), NOON.replace(tzinfo=BERLIN)),
        (datetime.date(2024, 1, 1), NOON),
        (b"abc", "abc"),
    ],
    ids=str,
)
def test_a_value_that_would_come_back_changed_is_refused_before_anything_is_written(store, before, value):
    (key,) = store.add(["one"], {"value": [before]}, show_progress=False)
    version = lance.dataset(str(store.path)).version
    with pytest.raises(ValueError, match="column 'value'"):
        store.add(["two", "three"], {"value": [before, value]}, show_progress=False)
    assert lance.dataset(str(store.path)).version == version and store.model.compressed == ["one"]
    assert store.columns([key], ["value"])["value"] == [before]


@pytest.mark.parametrize(
    ("first", "later"),
    [([], ["a"]), ([[]], [["a"]]), ({"a": None}, {"a": "b"}), ({"a": []}, {"a": ["b"]}), ([None], ["a"])],
)
def test_empty_lists_and_missing_values_do_not_bar_what_comes_later(store, first, later):
    keys = store.add(["one"], {"value": [first]}, show_progress=False)
    keys += store.add(["two"], {"value": [later]}, show_progress=False)
    assert store.columns(keys, ["value"])["value"] == [first, later]


@pytest.mark.parametrize("later", [5, 2.5, "abc", ["a"], {"a": 1}, NOON.replace(tzinfo=BERLIN)], ids=str)
def test_a_column_of_nothing_but_none_comes_back_and_takes_its_type_from_the_first_value(store, later):
    keys = store.add(["one", "two"], {"value": [None, None]}, show_progress=False)
    assert MemoryStore.open(store.path).columns(keys) == {"text": ["one", "two"], "value": [None, None]}
    keys += store.add(["three"], {"value": [None]}, show_progress=False)
    store.compact()
    assert store.verify(show_progress=False).is_sound
    keys += store.add(["two", "four"], {"value": [later, later]}, show_progress=False)[1:]
    expected = [None, later, None, later]
    assert MemoryStore.open(store.path).columns(keys, ["value"])["value"] == expected
    assert store.verify(show_progress=False).is_sound


@pytest.mark.parametrize("value", [{}, {"a": {}}, [{}]])
def test_an_empty_dictionary_is_refused_before_anything_is_written(store, value):
    with pytest.raises(ValueError, match="column 'value'.*dictionary without keys"):
        store.add(["one"], {"value": [value]}, show_progress=False)
    assert len(store) == 0


def test_mixed_time_zones_are_refused_in_a_first_call_too(store):
    with pytest.raises(ValueError, match="column 'when'"):
        store.add(["one", "two"], {"when": [NOON.replace(tzinfo=UTC), NOON.replace(tzinfo=BERLIN)]})
    assert len(store) == 0


@pytest.mark.parametrize(
    "kind", [np.array, pd.Series, pd.Index, tuple, lambda texts: Dataset.from_dict({"t": texts})["t"]]
)
def test_documents_and_columns_are_taken_as_columns_of_any_library(store, kind):
    keys = store.add(kind(["one", "two"]), {"title": kind(["a", "b"]), "year": np.array([1, 2])}, show_progress=False)
    assert store.columns(keys) == {"text": ["one", "two"], "title": ["a", "b"], "year": [1, 2]}


@pytest.mark.parametrize("documents", [{"text": ["one"]}, pd.DataFrame({"text": ["one"]}), np.array([["one"]])])
def test_a_whole_table_in_place_of_a_column_is_refused(store, documents):
    with pytest.raises(ValueError, match="documents must be a list of strings or one column"):
        store.add(documents)


def test_a_changed_value_of_a_users_column_is_found_named_and_mended_by_adding_again(store, path):
    titles = ["the first of titles", "the second of titles"]
    keys = store.add(["one", "two"], {"title": titles, "year": [1, 2]}, show_progress=False)
    replace_bytes(path, b"the second of titles", b"the tampered titles!")
    reader = MemoryStore.open(path)
    assert reader.columns(keys, ["year"])["year"] == [1, 2] and reader.columns(keys[:1])["title"] == titles[:1]
    with pytest.raises(CorruptMemoryError, match=f"title of key {keys[1]}"):
        reader.columns(keys)
    store = MemoryStore.open(path, FakeModel())
    store.add(["one", "two"], {"title": titles, "year": [1, 2]}, show_progress=False)
    assert store.columns(keys)["title"] == titles and store.model.compressed == []


def make_store_of_format_1(path):
    """As versions before wrote it: keys as text, no checksums of the user's columns."""
    model = FakeModel()
    keys = [MemoryStore.key_of(model.fingerprint, text) for text in DOCUMENTS[:3]]
    memories = expected(DOCUMENTS[:3]).flatten(1).numpy()
    maker = {
        "fingerprint": "a" * 64,
        "num_memory_tokens": 2,
        "hidden_size": 8,
        "doc_max_length": 64,
        "base": "some/base",
    }
    metadata = {"clara.memory_store": json.dumps({"format": 1, "dtype": "float32", "maker": maker})}
    memory = pa.list_(pa.field("item", pa.float32(), nullable=False), 16)
    schema = pa.schema(
        [
            pa.field("key", pa.string(), nullable=False),
            pa.field("text", pa.string(), nullable=False),
            pa.field("memory", memory, nullable=False),
            pa.field("checksum", pa.uint32(), nullable=False),
            pa.field("year", pa.int64()),
        ],
        metadata,
    )
    rows = {
        "key": keys,
        "text": DOCUMENTS[:3],
        "memory": pa.FixedSizeListArray.from_arrays(pa.array(memories.reshape(-1)), type=memory),
        "checksum": [zlib.crc32(row, zlib.crc32(key.encode())) for key, row in zip(keys, memories, strict=True)],
        "year": [1, 2, 3],
    }
    lance.write_dataset(pa.table(rows, schema=schema), str(path))
    return keys


def test_a_store_of_the_first_format_is_read_added_to_and_changed(path):
    old = make_store_of_format_1(path)
    store = MemoryStore.open(path, FakeModel())
    keys = store.add(DOCUMENTS[:5], {"year": [1, 2, 30, 4, 5], "title": list("abcde")}, show_progress=False)
    assert keys[:3] == old and sorted(store.model.compressed) == sorted(DOCUMENTS[3:5])
    assert torch.equal(store.get(keys), expected(DOCUMENTS[:5]))
    assert store.columns(keys, ["year", "title"]) == {"year": [1, 2, 30, 4, 5], "title": list("abcde")}
    store.delete(keys[:1])
    assert len(store) == 4 and keys[0] not in store
    assert store.search(expected([DOCUMENTS[2]]), top_k=1).keys == [[keys[2]]]
