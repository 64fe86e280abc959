import importlib.util
import sys

import lance
import pyarrow as pa
import pytest
import torch
from memory_fakes import DOCUMENTS, FakeModel, expected

from clara_hf.memory_store import keys as store_keys
from clara_hf.memory_store import reader as reader_module
from clara_hf.memory_store import store as store_module
from clara_hf.memory_store import table as table_package
from clara_hf.memory_store.store import MemoryStore
from clara_hf.memory_store.table import table as table_module


# pytest drops the filter that modeling_clara sets for it at import.
pytestmark = pytest.mark.filterwarnings("ignore:lance is not fork-safe")


# Adding and getting


def test_get_returns_the_memories_of_keys_in_their_order_with_repetitions(store):
    keys = store.add(DOCUMENTS, show_progress=False)
    order = [7, 3, 3, 39, 0, 7]
    memories = store.get([keys[index] for index in order])
    assert memories.dtype == torch.float32
    assert torch.equal(memories, expected([DOCUMENTS[index] for index in order]))


def test_get_reads_more_rows_than_one_read_takes(store, monkeypatch):
    monkeypatch.setattr(reader_module, "READ_ROWS", 7)
    keys = store.add(DOCUMENTS, show_progress=False)
    assert torch.equal(store.get(keys), expected(DOCUMENTS))


def test_memories_that_were_got_can_be_written_to_without_changing_the_store(store):
    keys = store.add(DOCUMENTS[:3], show_progress=False)
    store.get(keys).zero_()
    assert torch.equal(store.get(keys), expected(DOCUMENTS[:3]))


def test_get_of_no_keys_is_an_empty_tensor(store):
    assert store.get([]).shape == (0, 2, 8)
    assert store.add([]) == []


def test_keys_depend_on_text_and_compressor_and_are_returned_in_input_order(store):
    keys = store.add(DOCUMENTS[:3], show_progress=False)
    assert keys == store.keys(DOCUMENTS[:3]) == [MemoryStore.key_of("a" * 64, text) for text in DOCUMENTS[:3]]
    assert MemoryStore.key_of("b" * 64, DOCUMENTS[0]) != keys[0]
    assert len(set(keys)) == 3


def test_length_and_membership_count_distinct_documents(store):
    assert len(store) == 0
    keys = store.add([DOCUMENTS[0], DOCUMENTS[1], DOCUMENTS[0]], show_progress=False)
    assert len(store) == 2
    assert keys[0] in store and store.keys([DOCUMENTS[2]])[0] not in store
    assert list(store) == sorted(set(keys))


def test_each_text_is_compressed_once_within_and_across_calls(store):
    store.add(DOCUMENTS[:10] + DOCUMENTS[:10], show_progress=False)
    store.add(DOCUMENTS[5:15], show_progress=False)
    assert sorted(store.model.compressed) == sorted(DOCUMENTS[:15])


def test_documents_are_compressed_longest_first_in_batches_of_batch_size(store):
    store.add(DOCUMENTS, batch_size=16, show_progress=False)
    assert [len(batch) for batch in store.model.batches] == [16, 16, 8]
    lengths = [len(document) for document in store.model.compressed]
    assert lengths == sorted(lengths, reverse=True)


def test_progress_is_shown_only_when_asked_and_something_is_compressed(store, capsys):
    store.add(DOCUMENTS[:3], show_progress=False)
    assert capsys.readouterr().err == ""
    store.add(DOCUMENTS[:3])
    assert "Compressing" not in capsys.readouterr().err
    store.add(DOCUMENTS[:5])
    assert "MiB): 100%" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("model_dtype", "dtype", "stored"),
    [
        (torch.float32, "auto", torch.float16),
        (torch.float16, "auto", torch.float16),
        (torch.bfloat16, "auto", torch.bfloat16),
        (torch.float32, "bfloat16", torch.bfloat16),
        (torch.bfloat16, "float32", torch.float32),
    ],
)
def test_memories_are_stored_in_the_chosen_dtype_bit_for_bit(path, model_dtype, dtype, stored):
    model = FakeModel(dtype=model_dtype)
    store = MemoryStore.open(path, model, dtype=dtype)
    keys = store.add(DOCUMENTS, show_progress=False)
    memories = MemoryStore.open(path).get(keys)
    assert memories.dtype == store.dtype == stored
    assert torch.equal(memories, torch.stack([model.memory(document) for document in DOCUMENTS]).to(stored))


def test_auto_dtype_of_an_existing_store_is_its_own_and_another_is_refused(store, path):
    assert MemoryStore.open(path, FakeModel(dtype=torch.bfloat16)).dtype == torch.float32
    with pytest.raises(ValueError, match="holds float32, not float16"):
        MemoryStore.open(path, FakeModel(), dtype="float16")
    with pytest.raises(ValueError, match="dtype is 'int8'"):
        MemoryStore.open(path, FakeModel(), dtype="int8")


def test_a_missing_key_is_named(store):
    keys = store.add(DOCUMENTS[:2], show_progress=False)
    missing = store.keys(DOCUMENTS[2:4])
    with pytest.raises(KeyError, match=missing[0]):
        store.get([keys[0], missing[0], missing[1]])
    with pytest.raises(KeyError, match=missing[0]):
        store.columns(missing)
    with pytest.raises(ValueError, match="single string"):
        store.get(keys[0])


# The user's columns


def test_columns_are_kept_beside_documents_and_read_in_the_order_of_keys(store):
    keys = store.add(["one", "two", "one"], {"title": ["a", "b", "ignored"], "year": [1, 2, 3]}, show_progress=False)
    assert store.columns(keys) == {"text": ["one", "two", "one"], "title": ["a", "b", "a"], "year": [1, 2, 1]}
    assert store.columns([keys[1]], ["title"]) == {"title": ["b"]}


def test_a_new_column_is_none_for_documents_stored_before_and_given_values_replace_old_ones(store, path):
    first = store.add(["one", "two"], {"year": [1, 2]}, show_progress=False)
    second = store.add(["two", "three"], {"title": ["b", "c"], "year": [22, 3]}, show_progress=False)
    store.add(["four"], show_progress=False)
    keys = [first[0], *second, *store.keys(["four"])]
    assert MemoryStore.open(path).columns(keys, ["title", "year"]) == {
        "title": [None, "b", "c", None],
        "year": [1, 22, 3, None],
    }
    assert torch.equal(store.get(keys), expected(["one", "two", "three", "four"]))
    assert sorted(store.model.compressed) == ["four", "one", "three", "two"]


def test_the_same_columns_again_write_nothing(store):
    for _ in range(2):
        store.add(DOCUMENTS, {"index": list(range(40))}, show_progress=False)
        version = lance.dataset(str(store.path)).version
    store.add(DOCUMENTS, {"index": list(range(40))}, show_progress=False)
    assert lance.dataset(str(store.path)).version == version


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"title": ["a"]}, "'title' has 1 values for 2 documents"),
        ({"memory": [1, 2]}, "column 'memory'"),
        ({"a.b": [1, 2]}, "column 'a.b'"),
        ({"_rowid": [1, 2]}, "column '_rowid'"),
        ({"mixed": [1, "two"]}, "column 'mixed' must hold values of one type"),
        ({"year": ["x", "y"]}, "column 'year' must hold values of type int64"),
    ],
)
def test_bad_columns_are_refused_by_name_before_anything_is_compressed(store, columns, message):
    store.add(["zero"], {"year": [1]}, show_progress=False)
    with pytest.raises(ValueError, match=message):
        store.add(["one", "two"], columns, show_progress=False)
    assert store.model.compressed == ["zero"]


def test_an_unknown_column_is_named(store):
    keys = store.add(["one"], show_progress=False)
    with pytest.raises(KeyError, match="no column 'memory'"):
        store.columns(keys, ["memory"])


# Bad input


@pytest.mark.parametrize(
    ("documents", "message"),
    [
        (["fine", ""], r"documents\[1\] is empty"),
        (["fine", " \n"], r"documents\[1\] is empty"),
        (["fine", None], r"documents\[1\] is None"),
        ([b"bytes"], r"documents\[0\] is b'bytes'"),
        (["fine", "\ud800"], r"documents\[1\] is not valid Unicode"),
        ("one string", "single string 'one string'"),
    ],
)
def test_bad_documents_are_refused_by_position(store, documents, message):
    with pytest.raises(ValueError, match=message):
        store.add(documents)
    assert store.model.batches == [] and len(store) == 0


def test_a_batch_size_below_one_is_refused(store):
    with pytest.raises(ValueError, match="batch_size is -1"):
        store.add(["one"], batch_size=-1)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_memory_that_is_not_finite_is_refused_and_its_document_named(path, value):
    model = FakeModel()
    model.memory = lambda document: torch.full((2, 8), value if document == "bad" else 1.0)
    store = MemoryStore.open(path, model)
    with pytest.raises(ValueError, match=r"documents\[1\] \('bad'\) is not finite"):
        store.add(["good one", "bad"], batch_size=1, show_progress=False)
    assert store.keys(["bad"])[0] not in store


def test_a_memory_beyond_float16_is_refused_with_the_way_out(path, tmp_path):
    model = FakeModel(dtype=torch.bfloat16)
    model.memory = lambda document: torch.full((2, 8), 70000.0, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="too large for float16.*dtype='bfloat16'"):
        MemoryStore.open(path, model, dtype="float16").add(["one"], show_progress=False)
    store = MemoryStore.open(tmp_path / "other", model)
    assert torch.equal(store.get(store.add(["one"], show_progress=False)), model.memory("one")[None])


def test_memories_of_another_shape_than_the_configuration_says_are_refused(store):
    store.model.memory = lambda document: torch.zeros(3, 8)
    with pytest.raises(ValueError, match=r"shape \(1, 3, 8\).*needs \(1, 2, 8\)"):
        store.add(["one"], show_progress=False)


# Opening


@pytest.mark.parametrize(
    "other",
    [
        {"fingerprint": "b" * 64},
        {"num_memory_tokens": 4},
        {"hidden_size": 16},
        {"doc_max_length": 128},
    ],
)
def test_a_store_of_another_compressor_rate_width_or_length_is_refused_naming_both(store, path, other):
    model = FakeModel(**other)
    with pytest.raises(ValueError) as caught:
        MemoryStore.open(path, model)
    assert f"were made by {store.maker}" in str(caught.value)
    assert f"the model given is {store_keys.Maker.of(model)}" in str(caught.value)


def test_the_base_may_have_another_name_when_the_compressor_is_the_same(store, path):
    assert len(MemoryStore.open(path, FakeModel(base_model_name_or_path="elsewhere/base"))) == 0


def test_adding_is_refused_once_the_models_compressor_has_changed(store):
    store.model.fingerprint = "c" * 64
    with pytest.raises(ValueError, match="compressor has changed"):
        store.add(["one"])


def test_a_store_opened_without_a_model_reads_and_refuses_to_add(store, path):
    keys = store.add(DOCUMENTS[:3], show_progress=False)
    reader = MemoryStore.open(str(path))
    assert torch.equal(reader.get(keys), expected(DOCUMENTS[:3]))
    assert reader.keys(DOCUMENTS[:3]) == keys
    with pytest.raises(ValueError, match="open to read"):
        reader.add(["one"])


def test_opening_nothing_without_a_model_says_so_and_creates_nothing(path):
    with pytest.raises(FileNotFoundError, match="no memory store at"):
        MemoryStore.open(path)
    assert not path.exists()


def test_opening_something_else_is_refused_and_leaves_it_alone(tmp_path):
    folder, file, dataset = tmp_path / "folder", tmp_path / "file", tmp_path / "dataset"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    file.write_text("mine")
    lance.write_dataset(pa.table({"key": ["mine"]}), str(dataset))
    for path in (folder, file, dataset):
        for model in (None, FakeModel()):
            with pytest.raises(ValueError, match="is not a memory store"):
                MemoryStore.open(path, model)
    assert [entry.name for entry in folder.iterdir()] == ["notes.txt"]
    assert lance.dataset(str(dataset)).to_table().to_pydict() == {"key": ["mine"]}


def test_an_empty_folder_and_a_creation_that_was_cut_off_are_taken(path):
    path.mkdir()
    MemoryStore.open(path, FakeModel())
    for manifest in (path / "_versions").iterdir():
        manifest.unlink()
    store = MemoryStore.open(path, FakeModel())
    assert torch.equal(store.get(store.add(["one"], show_progress=False)), expected(["one"], torch.float16))


def test_a_store_of_another_format_is_refused(path, monkeypatch):
    monkeypatch.setattr(table_module, "FORMAT", 3)
    with pytest.raises(ValueError, match="has format 3; this version reads 1"):
        MemoryStore.open(path, FakeModel())


def test_creating_where_another_process_just_created_opens_its_store(path, monkeypatch):
    MemoryStore.open(path, FakeModel()).add(["one"], show_progress=False)
    monkeypatch.setattr(store_module, "is_blank", lambda path: True)
    assert len(MemoryStore.open(path, FakeModel())) == 1


def test_without_lance_the_import_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "lance", None)
    spec = importlib.util.spec_from_file_location("clara_hf.memory_store.alone", table_package.__file__)
    with pytest.raises(ImportError, match=r'pip install "clara-hf\[index\]"'):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
