"""What another process changes between any two steps of a call, calls that end between two versions, and kills."""

import multiprocessing
import os
import random
import shutil
import signal
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path

import lance
import pytest
import torch
from memory_fakes import SpectrumModel, raise_, replace_bytes

from clara_hf.memory_store import search as search_module
from clara_hf.memory_store.store import MemoryStore


# pytest drops the filter that modeling_clara sets for it at import.
pytestmark = pytest.mark.filterwarnings("ignore:lance is not fork-safe")

TEXTS = [f"document number {index}" for index in range(1100)]
NEW = ["a new document", *TEXTS[:3]]
KILLS = int(os.environ.get("CLARA_STORE_KILLS", 3))  # a few seconds each


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    path = tmp_path_factory.mktemp("filled") / "store"
    MemoryStore.open(path, SpectrumModel(), dtype="float32").add(TEXTS, show_progress=False)
    return path


@pytest.fixture
def copied(filled, tmp_path):
    return MemoryStore.open(shutil.copytree(filled, tmp_path / "copy"), SpectrumModel())


class Stopped(BaseException):
    """In place of a kill."""


def test_a_fit_that_ends_before_the_older_sketches_are_dropped_leaves_a_sound_store(copied, monkeypatch):
    copied.fit(show_progress=False)
    copied.add([f"other {index}" for index in range(200)], show_progress=False)

    def stop(*_):
        raise Stopped

    with monkeypatch.context() as patched, pytest.raises(Stopped):
        patched.setattr(lance.LanceDataset, "drop_columns", stop)
        copied.fit(seed=1, show_progress=False)
    store = MemoryStore.open(copied.path, SpectrumModel())
    store.add(["added after it"], show_progress=False)
    assert store.verify(show_progress=False).is_sound
    (sketches,) = [name for name in lance.dataset(str(store.path)).schema.names if name.startswith("sketch_")]
    assert lance.dataset(str(store.path)).count_rows(f"{sketches} IS NULL") == 0
    assert store.search(store.get(store.keys(TEXTS[:1])), top_k=1).texts == [[TEXTS[0]]]


CALLS = {
    "add": lambda store: store.add(NEW, {"year": [1, 2, 3, 4]}, show_progress=False),
    "verified add": lambda store: store.add(NEW, {"year": [1, 2, 3, 4]}, show_progress=False, verify="all"),
    "delete": lambda store: store.delete(store.keys(TEXTS[5:8])),
    "update": lambda store: store.update(store.keys(TEXTS[8:10]), ["other text", TEXTS[9]], {"name": ["a", "b"]}),
    "fit": lambda store: store.fit(show_progress=False),
    "recode": lambda store: store.recode("rotated8"),
    "compact": lambda store: store.compact(),
    "index texts": lambda store: store.index_texts(),
}
OTHERS = {
    "adds": lambda store: [
        store.add(["another", *TEXTS[:2]], {"year": [5, 6, 7]}, show_progress=False),
        store.add(NEW[:1], show_progress=False),
    ],
    "deletes": lambda store: store.delete(store.keys([TEXTS[0], TEXTS[20]])),
    "fits": lambda store: store.fit(seed=1, show_progress=False),
    "recodes": lambda store: store.recode("rotated8"),
    "compacts": lambda store: store.compact(),
}


@contextmanager
def before_lock(store, number, other):
    """Runs `other` once, before `store` takes a lock for the time `number`; yields the locks that it took."""
    parts, taken = store._table.parts, []
    lock = type(parts).lock

    def interrupted(*arguments, **options):
        taken.append(options)
        if len(taken) == number + 1:
            other(MemoryStore.open(store.path, SpectrumModel()))
        return lock(parts, *arguments, **options)

    parts.lock = interrupted
    try:
        yield taken
    finally:
        del parts.lock


def content(path):
    """Of a store that is sound and has no row twice: its form, and columns by text."""
    store = MemoryStore.open(path, SpectrumModel())
    assert store.verify(show_progress=False).is_sound
    assert lance.dataset(str(path)).count_rows() == len(store)
    columns = store.columns(list(store))
    rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    return store.form, {row.pop("text"): row for row in rows}


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("call", CALLS)
def test_a_change_by_another_process_at_any_moment_of_a_call_is_as_one_before_or_after_it(
    filled, tmp_path, call, other
):
    one_after_the_other = []
    for both in ((CALLS[call], OTHERS[other]), (OTHERS[other], CALLS[call])):
        path = shutil.copytree(filled, tmp_path / f"order {len(one_after_the_other)}")
        for change in both:
            change(MemoryStore.open(path, SpectrumModel()))
        one_after_the_other.append(content(path))
    number, taken = 0, [None]
    while number < len(taken):
        store = MemoryStore.open(shutil.copytree(filled, tmp_path / str(number)), SpectrumModel())
        with before_lock(store, number, OTHERS[other]) as taken:
            CALLS[call](store)
        assert content(store.path) in one_after_the_other, f"lock {number} of {len(taken)}"
        number += 1
    assert number > 0


def test_a_repair_that_is_stopped_loses_nothing_and_is_done_by_the_next_call(copied, monkeypatch):
    memory = SpectrumModel().memory(TEXTS[3]).numpy().tobytes()
    replace_bytes(copied.path, memory, bytes(len(memory)))
    damaged = copied.keys(TEXTS[3:4])
    assert list(copied.verify(show_progress=False).damaged) == damaged

    def stop(*_, **__):
        raise Stopped

    with monkeypatch.context() as patched, pytest.raises(Stopped):
        patched.setattr(lance.LanceDataset, "commit", stop)
        copied.verify(repair=True, show_progress=False)
    store = MemoryStore.open(copied.path, SpectrumModel())
    store.delete(store.keys(TEXTS[:1]))
    assert store.verify(show_progress=False).is_sound and len(store) == 1099
    assert (store.get(damaged)[0] == SpectrumModel().memory(TEXTS[3])).all() and not store.model.compressed


def test_of_two_processes_that_compress_one_document_at_once_one_row_and_both_columns_stay(copied, monkeypatch):
    """The other process ends while this one compresses: neither knew of the other's row."""
    copied.add(TEXTS[:1], {"ours": ["0"], "theirs": ["0"]}, show_progress=False)
    other = MemoryStore.open(copied.path, SpectrumModel())
    compress = copied.model.compress

    def meanwhile(*arguments, **options):
        with monkeypatch.context() as patched:
            # In its own process, it would hold the shared lock with this one and wait for it to commit.
            patched.setattr(type(other._table.parts), "lock", lambda *_, **__: nullcontext(True))
            other.add(["both"], {"theirs": ["b"]}, show_progress=False)
        return compress(*arguments, **options)

    copied.model.compress = meanwhile
    copied.add(["both"], {"ours": ["a"]}, show_progress=False)
    found = MemoryStore.open(copied.path, SpectrumModel())
    columns = found.columns(found.keys(["both"]))
    assert columns["ours"] == ["a"] and columns["theirs"] == ["b"]
    assert lance.dataset(str(copied.path)).count_rows() == len(found) == 1101
    assert found.verify(show_progress=False).is_sound


# At moments of chance


def work(path, log, seed):
    """Changes the store for ever, and notes what it begins and what it has done."""
    draw = random.Random(seed)
    search_module.MOST_LOOSE = 1000
    store = MemoryStore.open(path, SpectrumModel())
    store.write_bytes = 2000

    def note(what):
        with open(log, "a") as file:
            file.write(what + "\n")

    note("open")
    for step in range(1000):
        numbers = [draw.randrange(10_000, 30_000) for _ in range(30)]
        action = draw.choice(["add", "add", "delete", "fit", "compact", "recode", "update", "index"])
        if action == "add":
            note(f"add {','.join(map(str, numbers))}")
            store.add([f"document number {number}" for number in numbers], batch_size=8, show_progress=False)
            note(f"added {','.join(map(str, numbers))}")
        elif action == "delete":
            gone = [number for number in range(draw.randrange(10, 1000), 1100, 97)]
            keys = store.keys([f"document number {number}" for number in gone])
            note(f"delete {','.join(map(str, gone))}")
            store.delete([key for key in keys if key in store])
            note(f"deleted {','.join(map(str, gone))}")
        elif action == "fit" and len(store) >= 1000:
            store.fit(show_progress=False)
        elif action == "compact":
            store.compact()
        elif action == "index":
            store.index_texts()
        elif action == "recode" and store.form == "none":
            store.recode("rotated8")
        elif action == "update":
            text = f"document number {step % 10}"
            store.add([text], {"step": [step]}, show_progress=False)


def numbers_in(log, action):
    lines = Path(log).read_text().splitlines()
    return {int(number) for line in lines if line.startswith(f"{action} ") for number in line.split()[1].split(",")}


def near(memories, numbers):
    model = SpectrumModel()
    right = torch.stack([model.memory(f"document number {number}") for number in numbers])
    return (memories - right).norm() <= 0.01 * right.norm()


@pytest.mark.slow
def test_kills_at_random_moments_lose_and_double_nothing_and_search_goes_on(tmp_path):
    path, log = tmp_path / "store", tmp_path / "log"
    MemoryStore.open(path, SpectrumModel(), dtype="float32").add(TEXTS, show_progress=False)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["memory_fakes", "test_races"])
    draw = random.Random(0)
    log.touch()
    for kill in range(KILLS):
        opened = log.read_text().count("open")
        process = context.Process(target=work, args=(path, log, kill))
        process.start()
        while log.read_text().count("open") == opened:
            time.sleep(0.05) if process.is_alive() else raise_(AssertionError(f"ended with {process.exitcode}"))
        time.sleep(draw.uniform(0, 1.5))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        store = MemoryStore.open(path, SpectrumModel())
        asked = torch.stack([store.model.memory(TEXTS[1])])
        assert store.search(asked, top_k=3).scores.shape == (1, 3)
        deleted, begun = numbers_in(log, "deleted"), numbers_in(log, "delete")
        there = sorted((set(range(1100)) - begun) | numbers_in(log, "added"))
        keys = store.keys([f"document number {number}" for number in there])
        assert near(store.get(keys), there)
        assert not any(key in store for key in store.keys([f"document number {number}" for number in deleted]))
        assert store.search(asked, top_k=3, exact=True).scores.shape == (1, 3)
    store.add(["document number 99999"], show_progress=False)
    assert lance.dataset(str(path)).count_rows() == len(store)
    assert store.verify(show_progress=False).is_sound
    possible = {f"document number {number}" for number in range(30_000)} | {"document number 99999"}
    assert set(store.columns(list(store), ["text"])["text"]) <= possible


def add_overlapping(rank, path, count):
    store = MemoryStore.open(path, SpectrumModel())
    store.write_bytes = 2000
    for start in range(rank * 20, count, 40):
        store.add(
            TEXTS[start : start + 60],
            {"number": list(range(start, start + len(TEXTS[start : start + 60])))},
            batch_size=8,
            show_progress=False,
        )


@pytest.mark.slow
def test_two_processes_add_overlapping_documents_while_a_third_reads(tmp_path):
    path = tmp_path / "store"
    MemoryStore.open(path, SpectrumModel(), dtype="float32").add(TEXTS[:10], show_progress=False)
    context = multiprocessing.get_context("forkserver")
    processes = [context.Process(target=add_overlapping, args=(rank, path, 400)) for rank in range(2)]
    for process in processes:
        process.start()
    reads = 0
    while any(process.is_alive() for process in processes):
        reader = MemoryStore.open(path)
        found = reader.search(torch.stack([SpectrumModel().memory(TEXTS[1])]), top_k=1)
        assert found.texts == [[TEXTS[1]]] and near(reader.get(reader.keys(TEXTS[:10])), range(10))
        reads += 1
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0] and reads > 0
    store = MemoryStore.open(path, SpectrumModel())
    assert len(store) == 440 and near(store.get(store.keys(TEXTS[:440])), range(440))
    store.compact()
    assert store.columns(store.keys(TEXTS[:440]), ["number"])["number"] == list(range(440))
