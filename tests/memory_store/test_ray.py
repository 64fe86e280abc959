"""Builds on a real Ray cluster of this machine: its rows are those of the local build, through kills.

A worker's start takes seconds of imports: all tests share two actors, and one is started twice more, after kills.
"""

import json
import os
import shutil
import signal
import sys
from functools import partial

import pytest
import torch
from memory_fakes import DOCUMENTS, OrderedModel
from processes import in_process, killed_at
from test_other_places import bucket  # noqa: F401, a fixture

from clara_hf.memory_store.program import main
from clara_hf.memory_store.store import MemoryStore
from clara_hf.program.errors import UsageError


# pytest drops the filter that modeling_clara sets for it at import.
pytestmark = pytest.mark.filterwarnings("ignore:lance is not fork-safe")

ray = pytest.importorskip("ray", reason="builds on Ray need the extra `ray`")
from clara_hf.memory_store import actors as actors_module  # noqa: E402
from clara_hf.memory_store.actors import RayActors  # noqa: E402


MANY = [f"document number {index}" for index in range(1100)]


@pytest.fixture(scope="module")
def address(bucket):  # noqa: F811
    with pytest.MonkeyPatch.context() as patched:
        patched.setenv("RAY_USAGE_STATS_ENABLED", "0")
        # The process that is killed may come from a server that was started without the token of this cluster.
        patched.setenv("RAY_AUTH_MODE", "disabled")
        patched.setenv("RAY_worker_niceness", "0")  # of 15, on a busy machine workers start for minutes
        patched.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
        size = 80 * 2**20
        context = ray.init(num_cpus=3, object_store_memory=size, include_dashboard=False, log_to_driver=False)
        yield context.address_info["address"]
        ray.shutdown()


@pytest.fixture(scope="module")
def orders(tmp_path_factory):
    return tmp_path_factory.mktemp("orders") / "order"


@pytest.fixture(scope="module")
def actors(address, orders):
    return RayActors(partial(OrderedModel, orders), count=2)


def open_(path, form="auto"):
    store = MemoryStore.open(path, OrderedModel(), dtype="float32", form=form)
    store.write_bytes = 1
    return store


def add(path, documents=DOCUMENTS, actors=None, form="auto"):
    store = open_(path, form)
    numbers = {"number": [len(text) for text in documents]}
    store.add(documents, numbers, batch_size=4, show_progress=False, actors=actors)
    assert bool(store.model.compressed) == (actors is None)
    return store


def rows(store):
    """All that is stored, by key."""
    table = store._table
    names = [*table.own_names[2:], *table.column_names]
    return sorted(
        store._table.snapshot().dataset.to_table(columns=["key", *names]).to_pylist(), key=lambda row: row["key"]
    )


@pytest.mark.parametrize("form", ["none", "rotated4"])
def test_rows_are_those_of_the_local_build(form, actors, tmp_path):
    built = add(tmp_path / "ray", actors=actors, form=form)
    assert len(built) == 40 and rows(built) == rows(add(tmp_path / "local", form=form))
    assert len(data_versions(built)) == len(data_versions(open_(tmp_path / "local")))  # committed once
    files = set(tmp_path.rglob("ray/**/*.lance"))
    assert len(add(tmp_path / "ray", [*DOCUMENTS, "one more"], actors)) == 41  # and compresses that one alone:
    assert len(set(tmp_path.rglob("ray/**/*.lance")) - files) == 1
    assert not list((tmp_path / "ray" / "_parts").glob("*.*"))


def data_versions(store):
    return store._table.snapshot().dataset.versions()


def test_actors_write_to_object_storage(actors, bucket, tmp_path):  # noqa: F811
    built = add(f"{bucket}/ray", actors=actors)
    assert len(built) == 40 and rows(built) == rows(add(tmp_path / "local"))


def test_a_fitted_store_gets_codes_and_sketches_and_before_its_fit_memories_as_they_are(actors, tmp_path):
    store = MemoryStore.open(tmp_path / "local", OrderedModel(), dtype="float32", form="fitted1")
    store.add(MANY, {"number": list(range(1100))}, batch_size=100, show_progress=False)
    shutil.copytree(store.path, tmp_path / "before")
    store.fit(show_progress=False)
    shutil.copytree(store.path, tmp_path / "ray")
    for local, built, form in (("before", "before_ray", "none"), ("local", "ray", "fitted1")):
        if form == "none":
            shutil.copytree(tmp_path / "before", tmp_path / built)
        here, there = add(tmp_path / local), add(tmp_path / built, actors=actors)
        assert (there.form, len(there)) == (form, 1140)
        assert rows(there) == rows(here)
    question = torch.stack([OrderedModel().memory(DOCUMENTS[7])])
    assert there.search(question).keys == here.search(question).keys


def test_an_actor_that_is_killed_is_started_again_and_nothing_is_doubled(actors, orders, tmp_path):
    orders.write_text("die")
    built = add(tmp_path / "ray", actors=actors)
    assert not orders.exists()
    assert rows(built) == rows(add(tmp_path / "local"))
    assert not list((tmp_path / "ray" / "_parts").glob("*.*"))


def test_what_an_actor_raises_is_raised_here_and_the_rest_is_kept(actors, orders, tmp_path):
    last = sorted(DOCUMENTS, key=lambda text: -len(text))[36]
    orders.write_text(last)
    with pytest.raises(ValueError, match=f"^no memory for {last}"):
        add(tmp_path / "ray", actors=actors)
    assert len(open_(tmp_path / "ray")) >= 16
    assert rows(add(tmp_path / "ray", actors=actors)) == rows(add(tmp_path / "local"))


def test_a_folder_that_actors_do_not_see_is_refused(actors, tmp_path, monkeypatch):
    store = open_(tmp_path / "store")
    monkeypatch.setattr("clara_hf.memory_store.table.journal.Path.touch", lambda path: None)
    with pytest.raises(ValueError, match=f"{tmp_path / 'store'}.*share"):
        store.add(DOCUMENTS, show_progress=False, actors=actors)
    with pytest.raises(ValueError, match="distributed=True and actors"):
        store.add(DOCUMENTS, actors=actors, distributed=True)
    with pytest.raises(ValueError, match="count is 0"):
        RayActors(OrderedModel, count=0)


def add_until_killed(address, path):
    os.environ["RAY_AUTH_MODE"] = "disabled"
    ray.init(address=address, log_to_driver=False)
    own = RayActors(OrderedModel, count=1)
    # After its third portion.
    killed_at("clara_hf.memory_store.actors:tqdm", "update", 3, lambda documents: add(path, documents, own), DOCUMENTS)


def test_a_driver_that_is_killed_is_resumed_by_the_next_call(address, actors, tmp_path):
    path = tmp_path / "ray"
    assert in_process(add_until_killed, tmp_path, address, path) == -signal.SIGKILL
    waiting = list((path / "_parts").glob("*.part.json"))
    assert len(waiting) >= 3 and len(MemoryStore.open(path)) == 0
    files = set(path.rglob("*.lance"))
    resumed = add(path, actors=actors)
    assert rows(resumed) == rows(add(tmp_path / "local"))
    assert len(set(path.rglob("*.lance")) - files) < 10  # compresses the rest alone
    assert resumed.verify(show_progress=False).is_sound and not list((path / "_parts").glob("*.*"))


class Here:
    """In the place of actors: what one does, in this process, with a loader that was sent to it."""

    def __init__(self, load, count):
        self.actor = actors_module._Compressor(ray.cloudpickle.loads(ray.cloudpickle.dumps(load)))
        self.count = count

    def write(self, store, portion, description):
        with store._table.parts.token() as token:
            task = (store.path, store._rate, store._table.version, token, store.write_bytes, store.write_seconds)
            return self.actor.write(*task, portion)[:2]


def test_the_command_line_gives_actors_the_checkpoint(clara, monkeypatch, tmp_path):
    monkeypatch.setattr(actors_module, "RayActors", Here)
    clara.save_pretrained(tmp_path / "model")
    data = tmp_path / "documents.jsonl"
    data.write_text("".join(json.dumps({"text": text, "title": text[-3:]}) + "\n" for text in DOCUMENTS))
    settings = ["--model", str(tmp_path / "model"), "--documents", str(data), "--columns", "title"]
    settings += ["--batch_size", "4", "--chunk_size", "16"]
    assert main(["build", str(tmp_path / "ray"), *settings, "--engine", "ray", "--actors", "1"]) == 0
    assert main(["build", str(tmp_path / "local"), *settings]) == 0
    built, local = (MemoryStore.open(tmp_path / name) for name in ("ray", "local"))
    assert len(built) == 40 and rows(built) == rows(local)
    for wrong in (["--actors", "2"], ["--engine", "ray", "--actors", "0"], ["--chunk_size", "0"]):
        with pytest.raises(UsageError, match=f"{wrong[-2]} {wrong[-1]}"):
            main(["build", str(tmp_path / "local"), *settings, *wrong])
