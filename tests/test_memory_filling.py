import os
import resource
import shutil
from types import SimpleNamespace

import pytest
import torch
from memory_fakes import DOCUMENTS, FailingModel, FakeModel, data_files, expected, raise_

from modeling_clara.memory_store import MemoryStore


# pytest drops the filter that modeling_clara sets for it at import.
pytestmark = pytest.mark.filterwarnings("ignore:lance is not fork-safe")


@pytest.mark.parametrize("error", [RuntimeError("out of memory"), KeyboardInterrupt()])
@pytest.mark.parametrize("write_bytes", [1, 2**20])
def test_after_an_interruption_only_the_missing_are_compressed_and_all_are_equal(path, error, write_bytes):
    order = sorted(DOCUMENTS, key=lambda document: -len(document))
    model = FailingModel(order[25], lambda: raise_(error))
    store = MemoryStore.open(path, model, dtype="float32")
    store.write_bytes = write_bytes
    with pytest.raises(type(error)):
        store.add(DOCUMENTS, {"index": list(range(40))}, batch_size=8, show_progress=False)
    assert len(store) == 24

    store = MemoryStore.open(path, FakeModel())
    keys = store.add(DOCUMENTS, {"index": list(range(40))}, batch_size=8, show_progress=False)
    assert sorted(store.model.compressed) == sorted(order[24:])
    assert torch.equal(store.get(keys), expected(DOCUMENTS))
    assert store.columns(keys, ["index"])["index"] == list(range(40))


def test_a_killed_process_loses_only_what_it_had_not_appended(path):
    order = sorted(DOCUMENTS, key=lambda document: -len(document))
    MemoryStore.open(path, FakeModel(), dtype="float32")
    child = os.fork()
    if child == 0:  # leaves without running any handler, as after kill -9
        store = MemoryStore.open(path, FailingModel(order[25], lambda: os._exit(9)))
        store.write_bytes = 1
        store.add(DOCUMENTS, batch_size=8, show_progress=False)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9

    store = MemoryStore.open(path, FakeModel())
    keys = store.add(DOCUMENTS, batch_size=8, show_progress=False)
    assert torch.equal(store.get(keys), expected(DOCUMENTS)) and len(store) == 40
    assert len(store.model.compressed) == 16


def test_rows_are_appended_after_the_time_that_a_kill_may_cost(store):
    store.write_seconds = 0.0
    store.add(DOCUMENTS, batch_size=10, show_progress=False)
    assert len(data_files(store.path)) == 4


def test_a_disk_too_small_is_refused_before_anything_is_compressed(store, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1000))
    with pytest.raises(OSError, match="40 documents need .* MiB .* make room"):
        store.add(DOCUMENTS, show_progress=False)
    assert store.model.batches == []


def test_a_write_that_fails_keeps_what_was_appended_and_can_be_finished(path):
    model = FakeModel(hidden_size=512)
    store = MemoryStore.open(path, model, dtype="float32")
    keys = store.add(DOCUMENTS[:2], show_progress=False)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (64 * 1024, limits[1]))  # files cannot grow beyond: as a full disk
    try:
        with pytest.raises(OSError, match="writing to the memory store .* failed .* call add"):
            store.add(DOCUMENTS, show_progress=False)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(store) == 2
    keys = store.add(DOCUMENTS, show_progress=False)
    assert torch.equal(store.get(keys), torch.stack([model.memory(document) for document in DOCUMENTS]))
