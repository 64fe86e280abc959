import json
import os
import pickle
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import lance
import pytest
import torch
from conftest import build_clara
from joint_worker import rows
from memory_fakes import (
    DOCUMENTS,
    BatchModel,
    FailingModel,
    FakeModel,
    add_together,
    alone,
    expected,
    in_processes,
    killed_at,
    raise_,
    replace_bytes,
)
from test_trainers import make_trainer
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
    return add_together(rank, path, FakeModel())


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


def torchrun(*arguments):
    """Runs `joint_worker.py` in two processes; returns the exit code and what it said."""
    tests = Path(__file__).parent
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tests.parent), str(tests)])}
    arguments = [str(tests / "joint_worker.py"), *map(str, arguments)]
    done = subprocess.run([*command, *arguments], env=environment, capture_output=True, text=True, timeout=600)
    return done.returncode, done.stdout + done.stderr


@pytest.mark.slow
def test_joint_training_in_two_processes_compresses_shares_and_resumes_after_a_kill(base, tmp_path):
    documents = sorted({text for docs in rows()["docs"] for text in docs})
    code, told = torchrun(base, tmp_path / "two", 1)
    assert code != 0 and "exitcode: -9" in told, told
    code, told = torchrun(base, tmp_path / "two", -1)
    assert code == 0, told
    found = [json.loads((tmp_path / "two" / f"rank{rank}.json").read_text()) for rank in range(2)]
    compressed = [text for process in found for text in process["compressed"]]
    # What the killed process had finished is not compressed again, and what it had not is: its last three batches.
    assert 3 * 2 <= len(compressed) == len(set(compressed)) <= len(documents) - 2
    assert [process["steps"] for process in found] == [2, 2]

    settings = {"per_device_train_batch_size": 4, "memory_batch_size": 2, "max_steps": 2}
    model = build_clara(base, lora_dropout=0.0)
    trainer = make_trainer("joint", base, tmp_path / "one", model, rows=rows(), **settings)
    trainer.train()
    store = MemoryStore.open(tmp_path / "two" / "memories")
    keys = store.keys(documents)
    assert torch.equal(store.get(keys), trainer.store.get(keys)) and len(store) == len(documents)
    assert found[0]["loss"] == pytest.approx(trainer.state.log_history[0]["loss"], abs=1e-5)
