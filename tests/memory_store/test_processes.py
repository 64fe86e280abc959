import os
import pickle
import shutil
import signal
from types import SimpleNamespace

import lance
import pytest
import torch
from conftest import build_clara
from datasets import Dataset
from memory_fakes import (
    DOCUMENTS,
    BatchModel,
    FailingModel,
    FakeModel,
    add_together,
    alone,
    expected,
    killed_at,
    raise_,
    replace_bytes,
)
from processes import in_processes
from test_trainers import make_trainer
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from clara_hf.memory_store.store import MemoryStore


# pytest drops the filter that modeling_clara sets for it at import.
pytestmark = [
    pytest.mark.filterwarnings("ignore:lance is not fork-safe"),
    pytest.mark.usefixtures("forkserver"),
]


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
    store._table.write_part([keys[0]], [DOCUMENTS[0]], [memory], {}, [])
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


class Memories(TorchDataset):
    def __init__(self, store, keys):
        self.store = store
        self.keys = keys

    def __len__(self):
        return len(self.keys)

    def __getitem__(self, index):
        return self.store.get([self.keys[index]])[0]


def test_data_loader_workers_read_the_store(store):
    keys = store.add(DOCUMENTS, show_progress=False)
    store.get(keys)  # Lance has its threads running before the workers start
    loader = DataLoader(Memories(store, keys), batch_size=8, num_workers=2, multiprocessing_context="forkserver")
    assert torch.equal(torch.cat(list(loader)), expected(DOCUMENTS))


def test_a_forked_process_is_refused(store):
    keys = store.add(DOCUMENTS[:5], show_progress=False)
    loader = DataLoader(Memories(store, keys), num_workers=1, multiprocessing_context="fork")
    with pytest.raises(RuntimeError, match='can hang in forked processes: start it with "forkserver" or "spawn"'):
        list(loader)


@pytest.mark.parametrize(("online", "context"), [(False, "forkserver"), (True, None)])
def test_workers_of_a_training_that_reads_a_store_are_not_forked(online, context, base, tmp_path):
    trainer = make_trainer("joint", base, tmp_path, online=online, dataloader_num_workers=1, max_steps=2)
    started = trainer.get_train_dataloader().base_dataloader.multiprocessing_context
    assert (started and started.get_start_method()) == context
    trainer.train()
    assert trainer.state.global_step == 2


# Filling together


@pytest.mark.parametrize("count", [2, 3])
def test_processes_compress_a_share_each_and_commit_once(path, tmp_path, count):
    before = alone(tmp_path / "alone")
    MemoryStore.open(path, BatchModel(), dtype="float32")
    shares = in_processes(count, add_together, tmp_path, path)
    assert sorted(sum(shares, [])) == sorted(DOCUMENTS)
    assert max(map(len, shares)) - min(map(len, shares)) <= 4
    store = MemoryStore.open(path)
    keys = store.keys(DOCUMENTS)
    assert torch.equal(store.get(keys), before) and len(store) == 40
    assert store.columns(keys, ["index"])["index"] == list(range(40))
    # One version for the new column, one for everything that was compressed.
    assert lance.dataset(str(path)).version == lance.dataset(str(tmp_path / "alone")).version + 1


def add_until_killed(rank, path, batches):
    return add_together(rank, path, killed_at(batches[rank], BatchModel()))


@pytest.mark.parametrize(("batches", "restarted"), [((2, 1), 1), ((2, 1), 2), ((0, 3), 3), ((4, 4), 2)])
def test_killed_processes_are_resumed_by_any_number_with_equal_memories(path, tmp_path, batches, restarted):
    MemoryStore.open(path, BatchModel(), dtype="float32")
    assert -signal.SIGKILL in in_processes(2, add_until_killed, tmp_path, path, batches)
    assert len(MemoryStore.open(path)) == 0
    parts = len(list((path / "_parts").glob("*.part.json")))
    assert parts >= min(batches)
    compressed = sum(in_processes(restarted, add_together, tmp_path, path), [])
    assert len(compressed) == len(set(compressed)) == 40 - 4 * parts
    store = MemoryStore.open(path)
    assert torch.equal(store.get(store.keys(DOCUMENTS)), alone(tmp_path / "alone")) and len(store) == 40


def add_other_documents(rank, path):
    return add_together(rank, path, documents=DOCUMENTS[rank:])


def add_elsewhere(rank, folder):
    return add_together(rank, folder / f"machine{rank}")


def add_with_a_full_disk(rank, path):
    shutil.disk_usage = lambda path: SimpleNamespace(free=1000)
    return add_together(rank, path)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (add_other_documents, "processes 0 and 1 were given different documents"),
        (add_elsewhere, "process 1 does not see what process 0 writes"),
        (add_with_a_full_disk, "40 documents need"),
    ],
)
def test_what_ends_one_process_is_told_in_all(path, tmp_path, function, message):
    assert all(message in told for told in in_processes(2, function, tmp_path, path))


def add_failing(rank, path):
    longest = sorted(DOCUMENTS, key=lambda document: -len(document))
    return add_together(rank, path, FailingModel(longest[4 * 5], lambda: raise_(RuntimeError("no memory"))))


def test_an_error_in_one_process_ends_the_others_and_keeps_what_was_written(path, tmp_path):
    first, second = in_processes(2, add_failing, tmp_path, path)
    assert second == "RuntimeError: no memory" and first.startswith("RuntimeError")
    store = MemoryStore.open(path, FakeModel())
    assert len(store) == 40 - 4 * 3  # all but the second's third, fourth and fifth batch
    assert torch.equal(store.get(store.add(DOCUMENTS, show_progress=False)), expected(DOCUMENTS))


def add_fakes(rank, path):
    return add_together(rank, path, FakeModel(), verify="all")


def test_damage_is_looked_for_by_all_processes_and_made_anew_once(path, tmp_path):
    in_processes(2, add_fakes, tmp_path, path)
    damaged = [DOCUMENTS[index] for index in (3, 17, 31)]
    for document in damaged:
        memory = expected([document]).numpy().tobytes()
        replace_bytes(path, memory, memory[:-1] + bytes([memory[-1] ^ 1]))
    assert sorted(sum(in_processes(2, add_fakes, tmp_path, path), [])) == sorted(damaged)
    store = MemoryStore.open(path)
    assert torch.equal(store.get(store.keys(DOCUMENTS)), expected(DOCUMENTS)) and len(store) == 40


def test_adding_together_without_a_job_is_adding_alone(store):
    keys = store.add(DOCUMENTS, show_progress=False, distributed=True)
    assert torch.equal(store.get(keys), expected(DOCUMENTS))


def questions() -> Dataset:
    """Twelve with three candidates each, of sixteen distinct documents of several lengths."""
    rows = [{"question": "Who?", "answers": ["Mara"], "pos_index": [row % 3]} for row in range(12)]
    return Dataset.from_list(
        [{**row, "docs": [DOCUMENTS[(3 * number + i) % 16] for i in range(3)]} for number, row in enumerate(rows)]
    )


def train_jointly(rank, base, folder, killed_rank):
    """Returns what this process compressed, its steps and its loss; one dies at its second batch of documents."""
    model = build_clara(base, lora_dropout=0.0)
    compress, compressed = model.compress_encoded, []

    def counting(rows, **options):
        if rank == killed_rank and compressed:
            os.kill(os.getpid(), signal.SIGKILL)
        compressed.extend(map(tuple, rows))
        return compress(rows, **options)

    model.compress_encoded = counting
    MemoryStore.write_bytes = 1
    batches = {"per_device_train_batch_size": 2, "memory_batch_size": 2, "dataloader_num_workers": 1}
    trainer = make_trainer("joint", base, folder, model, rows=questions(), max_steps=2, **batches)
    trainer.train()
    return compressed, trainer.state.global_step, trainer.state.log_history[0]["loss"]


@pytest.mark.slow
def test_joint_training_in_two_processes_compresses_shares_and_resumes_after_a_kill(base, tmp_path):
    documents = sorted({text for docs in questions()["docs"] for text in docs})
    ended = in_processes(2, train_jointly, tmp_path, base, tmp_path / "two", 1)
    assert ended[1] == -signal.SIGKILL and isinstance(ended[0], str)
    found = in_processes(2, train_jointly, tmp_path, base, tmp_path / "two", -1)
    compressed = [text for process in found for text in process[0]]
    # What the killed process had finished is not compressed again, and what it had not is: its last three batches.
    assert 3 * 2 <= len(compressed) == len(set(compressed)) <= len(documents) - 2
    assert [steps for _, steps, _ in found] == [2, 2]

    settings = {"per_device_train_batch_size": 4, "memory_batch_size": 2, "max_steps": 2}
    model = build_clara(base, lora_dropout=0.0)
    trainer = make_trainer("joint", base, tmp_path / "one", model, rows=questions(), **settings)
    trainer.train()
    store = MemoryStore.open(tmp_path / "two" / "memories")
    keys = store.keys(documents)
    assert torch.equal(store.get(keys), trainer.store.get(keys)) and len(store) == len(documents)
    assert found[0][2] == pytest.approx(trainer.state.log_history[0]["loss"], abs=1e-5)
