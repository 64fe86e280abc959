import os
import pickle

import pytest
import torch
from memory_fakes import DOCUMENTS, FakeModel, expected
from torch.utils.data import DataLoader, Dataset

from modeling_clara.memory_store import MemoryStore


# pytest drops the filter that modeling_clara sets for it at import.
pytestmark = pytest.mark.filterwarnings("ignore:lance is not fork-safe")


def test_two_open_stores_see_each_others_documents_when_they_add(store, path):
    other = MemoryStore.open(path, FakeModel())
    assert len(other) == 0
    store.add(DOCUMENTS[:20], show_progress=False)
    keys = other.add(DOCUMENTS, show_progress=False)
    assert sorted(other.model.compressed) == sorted(DOCUMENTS[20:])
    assert torch.equal(other.get(keys), expected(DOCUMENTS))


def test_a_document_that_two_processes_added_at_once_counts_once(store, path):
    keys = store.add(DOCUMENTS[:2], show_progress=False)
    memory = expected([DOCUMENTS[0]]).flatten(1).numpy()
    store._table.write_part([keys[0]], [DOCUMENTS[0]], memory, {})
    store._table.commit()
    reader = MemoryStore.open(path)
    assert len(reader) == 2
    assert torch.equal(reader.get(keys), expected(DOCUMENTS[:2]))


def test_a_pickled_store_is_small_holds_no_model_and_reads(store):
    keys = store.add(DOCUMENTS, show_progress=False)
    pickled = pickle.dumps(store)
    assert len(pickled) < 1000
    copy = pickle.loads(pickled)
    assert copy.model is None and store.model is not None
    assert torch.equal(copy.get(keys), expected(DOCUMENTS))


class Memories(Dataset):
    def __init__(self, store, keys):
        self.store = store
        self.keys = keys

    def __len__(self):
        return len(self.keys)

    def __getitem__(self, index):
        return self.store.get([self.keys[index]])[0]


@pytest.mark.parametrize("start", ["fork", "spawn"])
def test_data_loader_workers_read_the_store(store, start):
    keys = store.add(DOCUMENTS, show_progress=False)
    store.get(keys)  # Lance has its threads running before the workers start
    workers = {"fork": 2, "spawn": 1}[start]  # a spawned one imports everything anew
    loader = DataLoader(Memories(store, keys), batch_size=8, num_workers=workers, multiprocessing_context=start)
    assert torch.equal(torch.cat(list(loader)), expected(DOCUMENTS))


def test_a_forked_reader_stays_at_the_version_of_its_parent(store, path):
    keys = store.add(DOCUMENTS[:5], show_progress=False)
    reader = MemoryStore.open(path)
    reader.get(keys)
    store._table.remove(keys[:1])  # moves every later row
    child = os.fork()
    if child == 0:
        os._exit(0 if torch.equal(reader.get(keys), expected(DOCUMENTS[:5])) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
