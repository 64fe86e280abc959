"""A real server on loopback over a tiny model, in a thread of the test process; a pytest plugin with its fixtures."""

import copy
import socket
import threading
import time
from contextlib import contextmanager

import httpx
import pytest
import uvicorn
from conftest import build_clara

from clara_hf.serving.documents import read_text
from clara_hf.serving.library import FileEntry, Library
from clara_hf.serving.serve import ServeArguments, build, server_config


NOTES = {
    "mara.txt": "Mara Brandel lives in Velholm and keeps bees on the roof of her workshop.",
    "halvex.txt": "Halvex Works sells copper lanterns to sailors.",
    "velholm.txt": "Velholm lies on the river Aum. Its market is held on Thursdays.",
    "novel.txt": "The Long Winter is a novel by Oren Tasil about a lighthouse keeper.",
}


def fill(library: Library, notes: dict[str, str] = NOTES) -> None:
    for name, text in notes.items():
        rows, unusable = library.split(read_text(name, text))
        assert rows and not unusable
        library.add([FileEntry(name, rows, len(text))])


@contextmanager
def serving(model, store, **options):
    """Base URL of a service, which ends with the block."""
    app = build(ServeArguments("tiny", str(store), "tiny", **options), model)
    server = uvicorn.Server(server_config(app, seconds=20))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(128)
        thread = threading.Thread(target=lambda: server.run(sockets=[listener]))
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        try:
            while not server.started:
                assert thread.is_alive()
                time.sleep(0.01)
            yield url
        finally:
            server.should_exit = True
            thread.join(60)
            assert not thread.is_alive()


@pytest.fixture(scope="session")
def serve():
    """[`serving`], for tests that start services of their own."""
    return serving


@pytest.fixture(scope="session")
def served_model(base):
    return build_clara(base)


@pytest.fixture(scope="session")
def other_model(served_model):
    """The same model once more: one that serves belongs to its worker alone."""
    return copy.deepcopy(served_model)


@pytest.fixture(scope="module")
def store_path(served_model, tmp_path_factory):
    path = tmp_path_factory.mktemp("served") / "notes.clara"
    library = Library.open(path, served_model)
    fill(library)
    library.close()
    return path


@pytest.fixture(scope="module")
def server(served_model, store_path):
    with serving(served_model, store_path, ui=True, feedback=str(store_path.parent / "feedback.jsonl")) as url:
        yield url


@pytest.fixture
def http(server):
    with httpx.Client(base_url=server, timeout=60) as client:
        yield client
