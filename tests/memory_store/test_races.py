"""What another process changes between any two steps of a call, and calls that end between two versions."""

import shutil
from contextlib import contextmanager, nullcontext

import lance
import pytest
from memory_fakes import SpectrumModel, replace_bytes

from clara_hf.memory_store.store import MemoryStore


# pytest drops the filter that modeling_clara sets for it at import.
pytestmark = pytest.mark.filterwarnings("ignore:lance is not fork-safe")

TEXTS = [f"document number {index}" for index in range(1100)]
NEW = ["a new document", *TEXTS[:3]]


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
