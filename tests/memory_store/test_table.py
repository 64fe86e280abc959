import os
import shutil

import pytest
import torch
from memory_fakes import DOCUMENTS, FakeModel, data_files, expected, replace_bytes

from clara_hf.memory_store.store import CorruptMemoryError, MemoryStore
from clara_hf.memory_store.table.snapshot import packed, unpacked


# pytest drops the filter that modeling_clara sets for it at import.
pytestmark = pytest.mark.filterwarnings("ignore:lance is not fork-safe")


def test_a_damaged_memory_is_an_error_naming_its_key_and_adding_again_makes_it_anew(store, path):
    keys = store.add(DOCUMENTS, {"index": list(range(40))}, show_progress=False)
    memory = expected([DOCUMENTS[3]]).numpy().tobytes()
    replace_bytes(path, memory, memory[:-1] + bytes([memory[-1] ^ 1]))

    reader = MemoryStore.open(path)
    assert torch.equal(reader.get(keys[4:]), expected(DOCUMENTS[4:]))
    with pytest.raises(CorruptMemoryError, match=f"{keys[3]}.*add"):
        reader.get(keys)

    store = MemoryStore.open(path, FakeModel())
    store.add(DOCUMENTS, {"index": list(range(40))}, show_progress=False, verify="all")
    assert store.model.compressed == [DOCUMENTS[3]]
    assert torch.equal(store.get(keys), expected(DOCUMENTS)) and len(store) == 40
    assert store.columns(keys, ["index"])["index"] == list(range(40))


def test_a_memory_in_another_documents_row_is_found(store, path):
    keys = store.add(DOCUMENTS, show_progress=False)
    one, other = (expected([DOCUMENTS[index]]).numpy().tobytes() for index in (3, 7))
    marker = os.urandom(len(one))
    for old, new in ((one, marker), (other, one), (marker, other)):
        replace_bytes(path, old, new)
    for index in (3, 7):
        with pytest.raises(CorruptMemoryError, match=keys[index]):
            MemoryStore.open(path).get([keys[index]])


def test_a_damaged_text_is_found(store, path):
    keys = store.add(["a text that is stored", "another"], show_progress=False)
    replace_bytes(path, b"a text that is stored", b"a text that is wronge")
    with pytest.raises(CorruptMemoryError, match=f"text of key {keys[0]}"):
        MemoryStore.open(path).columns(keys)
    store = MemoryStore.open(path, FakeModel())
    store.add(["a text that is stored", "another"], show_progress=False, verify="all")
    assert store.model.compressed == ["a text that is stored"]
    assert store.columns(keys)["text"] == ["a text that is stored", "another"]


@pytest.mark.parametrize("damage", ["gone", "cut", "zeros"])
def test_a_lost_data_file_costs_only_its_documents(store, path, damage):
    store.write_bytes = 1
    keys = store.add(DOCUMENTS, {"index": list(range(40))}, batch_size=10, show_progress=False)
    file = data_files(path)[1]
    size = file.stat().st_size
    file.unlink()
    if damage != "gone":
        file.write_bytes(bytes(size if damage == "zeros" else 10))

    reader = MemoryStore.open(path)
    assert len(reader) == 30
    left = [index for index, key in enumerate(keys) if key in reader]
    assert torch.equal(reader.get([keys[index] for index in left]), expected([DOCUMENTS[index] for index in left]))

    store = MemoryStore.open(path, FakeModel())
    assert store.add(DOCUMENTS, {"index": list(range(40))}, show_progress=False) == keys
    assert len(store.model.compressed) == 10
    for whole in (store, MemoryStore.open(path)):
        assert torch.equal(whole.get(keys), expected(DOCUMENTS)) and len(whole) == 40
        assert whole.columns(keys, ["index"])["index"] == list(range(40))


# What adding reads


def rows_read(store, monkeypatch):
    read, table = [], type(store._table)
    whole = table.read
    monkeypatch.setattr(
        table, "read", lambda self, keys, *args, **options: read.extend(keys) or whole(self, keys, *args, **options)
    )
    return read


def flip_a_bit(path, document):
    memory = expected([document]).numpy().tobytes()
    replace_bytes(path, memory, memory[:-1] + bytes([memory[-1] ^ 1]))


def test_adding_to_a_store_that_was_copied_or_touched_reads_no_stored_memory(store, path, monkeypatch):
    store.write_bytes = 1
    store.add(DOCUMENTS, {"index": list(range(40))}, batch_size=10, show_progress=False)
    read = rows_read(store, monkeypatch)
    store.add(DOCUMENTS, {"index": list(range(40))}, show_progress=False)
    store.add(["new"], {"index": [40]}, show_progress=False)
    store.add(DOCUMENTS, {"index": list(range(1, 41)), "other": list(range(40))}, show_progress=False)
    for file in data_files(path):
        os.utime(file)
    store.add(DOCUMENTS, show_progress=False)
    shutil.copytree(path, path.with_name("copied"), copy_function=shutil.copyfile)
    copied = MemoryStore.open(path.with_name("copied"), FakeModel())
    copied.add(DOCUMENTS, show_progress=False)
    assert read == [] and copied.model.compressed == []
    copied.add(DOCUMENTS, show_progress=False, verify="all")
    assert sorted(read) == sorted(copied.keys(DOCUMENTS))


def test_damage_is_found_on_reading_and_made_anew_on_demand(store, path):
    keys = store.add(DOCUMENTS, show_progress=False)
    flip_a_bit(path, DOCUMENTS[3])
    store = MemoryStore.open(path, FakeModel())
    with pytest.raises(CorruptMemoryError, match=f"{keys[3]}.*verify='all'"):
        store.get(keys)
    assert store.add(DOCUMENTS, show_progress=False) == keys and store.model.compressed == []
    with pytest.raises(CorruptMemoryError, match=keys[3]):
        store.get(keys)
    store.add(DOCUMENTS, show_progress=False, verify="all")
    assert store.model.compressed == [DOCUMENTS[3]]
    assert torch.equal(store.get(keys), expected(DOCUMENTS))


def test_an_unknown_way_to_verify_is_refused(store):
    with pytest.raises(ValueError, match="verify is 'some'"):
        store.add(DOCUMENTS, verify="some")


def test_the_damaged_key_that_comes_first_is_named(store, path):
    keys = store.add(DOCUMENTS, show_progress=False)
    for index in (3, 7):
        flip_a_bit(path, DOCUMENTS[index])
    for order in ([7, 5, 3], [3, 3, 7], [1, 7, 7]):
        first = next(index for index in order if index in (3, 7))
        with pytest.raises(CorruptMemoryError, match=keys[first]):
            MemoryStore.open(path).get([keys[index] for index in order])


def test_keys_take_the_bytes_that_they_stand_for_and_what_is_no_key_is_not_found(store):
    keys = store.add(DOCUMENTS, show_progress=False)
    snapshot = store._table.snapshot()
    assert snapshot.keys.nbytes == 16 * len(keys) and unpacked(snapshot.keys) == sorted(keys)
    for wrong in ("", "no key", keys[0][:-1], keys[0].upper(), keys[0] + "00", f" {keys[0]}"):
        assert wrong not in store
    with_zeros = "ab" * 14 + "0000"
    assert unpacked(packed([with_zeros])) == [with_zeros]
