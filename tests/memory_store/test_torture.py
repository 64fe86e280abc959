"""Kills at random moments of everything that changes a store, and several processes at once."""

import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import lance
import pytest
import torch
from memory_fakes import SpectrumModel, raise_

from clara_hf.memory_store import search as search_module
from clara_hf.memory_store.store import MemoryStore


# pytest drops the filter that modeling_clara sets for it at import.
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:lance is not fork-safe"),
]

KILLS = int(os.environ.get("CLARA_STORE_KILLS", 3))  # a few seconds each
TEXTS = [f"document number {index}" for index in range(1100)]


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
        action = draw.choice(["add", "add", "delete", "fit", "compact", "recode", "update"])
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


def test_kills_at_random_moments_lose_and_double_nothing_and_search_goes_on(tmp_path):
    path, log = tmp_path / "store", tmp_path / "log"
    MemoryStore.open(path, SpectrumModel(), dtype="float32").add(TEXTS, show_progress=False)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["memory_fakes", "test_torture"])
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
