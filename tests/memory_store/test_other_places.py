"""Stores that were copied: to folders, to object storage served by a real S3 server, and to a Hub."""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hub_server import TOKEN, environment_of, hub_server
from memory_fakes import DOCUMENTS, FailingModel, FakeModel, SpectrumModel, expected, raise_

from clara_hf.memory_store import search as search_module
from clara_hf.memory_store.program import main
from clara_hf.memory_store.store import CorruptMemoryError, MemoryStore
from clara_hf.memory_store.table.remote import Remote


# pytest drops the filter that modeling_clara sets for it at import.
pytestmark = pytest.mark.filterwarnings("ignore:lance is not fork-safe")

TEXTS = [f"document number {index}" for index in range(1100)]


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    """A store with deleted rows, columns, codes of a fitted form, sketches and an index."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(search_module, "MOST_LOOSE", 1000)
        store = MemoryStore.open(tmp_path_factory.mktemp("filled") / "store", SpectrumModel(), dtype="float32")
        store.add(TEXTS, {"number": list(range(1100))}, show_progress=False)
        store.fit("fitted2", show_progress=False)
        store.index_texts()
        store.delete(store.keys(TEXTS[:10]))
        store.add(["one more"], {"number": [-1]}, show_progress=False)
    return store


@pytest.fixture(scope="module")
def bucket():
    boto3 = pytest.importorskip("boto3")
    server = pytest.importorskip("moto.server").ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    url = "http://{}:{}".format(*server.get_host_and_port())
    settings = {
        "AWS_ACCESS_KEY_ID": "me",
        "AWS_SECRET_ACCESS_KEY": "mine",
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": url,
        "AWS_ALLOW_HTTP": "true",
    }
    with pytest.MonkeyPatch.context() as patched:
        for name, value in settings.items():
            patched.setenv(name, value)
        boto3.client("s3", endpoint_url=url).create_bucket(Bucket="memories")
        yield "s3://memories"
    server.stop()


def files_in(folder):
    return {str(path.relative_to(folder)) for path in Path(folder).rglob("*") if path.is_file()}


def check_equal(copied, filled):
    """That all reads of a copy give what the store gives."""
    keys = list(filled)
    assert list(copied) == keys and len(copied) == 1091
    assert (copied.form, copied.sketch_dims, copied.maker) == (filled.form, filled.sketch_dims, filled.maker)
    assert torch.equal(copied.get(keys), filled.get(keys)) and copied.columns(keys) == filled.columns(keys)
    questions = torch.stack([SpectrumModel().memory(text) for text in ("one more", TEXTS[5], TEXTS[20])])
    for options in ({}, {"exact": True}, {"filter": "number > 500"}):
        assert copied.search(questions, **options).keys == filled.search(questions, **options).keys
    words = ["one more", "number 17"]
    assert copied.search(words, hybrid=True).keys == filled.search(words, hybrid=True).keys
    assert copied.stats()["indexed"] == filled.stats()["indexed"] >= 1000
    assert copied.stats()["fit"] == filled.stats()["fit"] is not None
    assert copied.verify(show_progress=False).is_sound


def check_read_only(store, where):
    """That every change is refused where the store is, and changes nothing."""
    keys, before = store.keys(TEXTS[20:21]), len(store)
    for change in (
        lambda: store.add(["another"], show_progress=False),
        lambda: store.delete(keys),
        lambda: store.update(keys, columns={"number": [7]}, show_progress=False),
        lambda: store.compact(),
        lambda: store.fit(show_progress=False),
    ):
        with pytest.raises(OSError, match="read-only") as caught:
            change()
        assert where in str(caught.value) and "copy_to" in str(caught.value)
    assert store.add(TEXTS[20:21], show_progress=False) == keys and len(store) == before


def test_a_copy_in_a_folder_has_everything_of_the_newest_version_and_nothing_else(filled, tmp_path):
    filled.copy_to(tmp_path / "copy")
    copied = MemoryStore.open(tmp_path / "copy", SpectrumModel())
    check_equal(copied, filled)
    assert files_in(copied.path) < files_in(filled.path)
    assert {name.split("/")[0] for name in files_in(copied.path)} == {
        "data",
        "_deletions",
        "_indices",
        "_search",
        "_versions",
    }
    assert len(list((copied.path / "_versions").iterdir())) == 1
    copied.add(["another"], {"number": [3]}, show_progress=False)
    assert len(copied) == 1092 and copied.verify(show_progress=False).is_sound
    with pytest.raises(FileExistsError, match="copy"):
        filled.copy_to(tmp_path / "copy")
    assert [entry.name for entry in tmp_path.iterdir()] == ["copy"]


def test_a_store_in_object_storage_is_read_in_place_and_copied_back(filled, bucket, tmp_path, monkeypatch):
    address = f"{bucket}/folder/store"
    filled.copy_to(address)
    assert set(Remote(address).names()) < files_in(filled.path)
    store = MemoryStore.open(address, SpectrumModel())
    assert store.path == address and address in repr(store)
    check_equal(store, filled)
    assert list(pickle.loads(pickle.dumps(store))) == list(filled)
    with pytest.raises(FileExistsError, match=address):
        filled.copy_to(address)
    store.copy_to(tmp_path / "back")
    back = MemoryStore.open(tmp_path / "back", SpectrumModel())
    check_equal(back, filled)
    back.add(["another"], {"number": [3]}, show_progress=False)
    assert len(back) == 1092


def changed(store):
    """A store that goes through all changes."""
    store.write_bytes = 200 * 128
    keys = store.add(TEXTS, {"number": list(range(1100))}, batch_size=64, show_progress=False)
    store.fit("fitted2", show_progress=False)
    store.index_texts()
    store.delete(keys[:9])
    store.update(keys[9:11], ["one more", TEXTS[10]], {"number": [-1, -2]}, show_progress=False)
    store.compact()
    return store


def test_a_store_is_built_and_changed_in_object_storage_as_in_a_folder(bucket, tmp_path, monkeypatch):
    monkeypatch.setattr(search_module, "MOST_LOOSE", 1000)
    local = changed(MemoryStore.open(tmp_path / "store", SpectrumModel(), dtype="float32"))
    there = changed(MemoryStore.open(f"{bucket}/built", SpectrumModel(), dtype="float32"))
    for store in (there, MemoryStore.open(f"{bucket}/built", SpectrumModel())):
        check_equal(store, local)
    assert there.stats()["files"] == 1 and not Remote(there.path).names("_lock")
    assert len([name for name in Remote(there.path).names("_search") if "/index-" in name]) == 1


def test_an_addition_to_object_storage_that_was_cut_off_is_resumed_by_what_is_missing(bucket):
    model = FailingModel(DOCUMENTS[17], lambda: raise_(KeyboardInterrupt()))
    store = MemoryStore.open(f"{bucket}/resumed", model, dtype="float32")
    store.write_bytes = 1
    with pytest.raises(KeyboardInterrupt):
        store.add(DOCUMENTS, batch_size=4, show_progress=False)
    kept = len(MemoryStore.open(f"{bucket}/resumed"))
    again = MemoryStore.open(f"{bucket}/resumed", FakeModel())
    keys = again.add(DOCUMENTS, batch_size=4, show_progress=False)
    assert 0 < kept == 40 - len(again.model.compressed)
    assert torch.equal(again.get(keys), expected(DOCUMENTS)) and len(again) == 40


def test_in_object_storage_one_process_writes_and_another_is_refused_and_named(bucket):
    address, refused = f"{bucket}/one", []

    def write_meanwhile():
        other = MemoryStore.open(address, FakeModel())
        for change in (other.compact, lambda: other.add(DOCUMENTS[:3], show_progress=False)):
            with pytest.raises(OSError, match=f"process {os.getpid()} on .*{address}.*unlock"):
                change()
        refused.append(len(other))

    store = MemoryStore.open(address, FailingModel(DOCUMENTS[5], write_meanwhile), dtype="float32")
    keys = store.add(DOCUMENTS, batch_size=4, show_progress=False)
    assert len(refused) == 1 and torch.equal(store.get(keys), expected(DOCUMENTS))
    lock = Remote(address).lock()
    assert lock.__enter__()  # of a process that is killed now
    with pytest.raises(OSError, match="unlock"):
        store.delete(keys[:1])
    assert len(MemoryStore.open(address)) == 40
    assert main(["unlock", address]) == 0
    store.delete(keys[:1])
    assert len(MemoryStore.open(address)) == 39


def test_a_copy_to_object_storage_that_was_cut_off_is_no_store_and_is_resumed(filled, bucket, monkeypatch):
    address, sent, upload = f"{bucket}/cut", [], Remote.upload

    def failing(self, file, name):
        if name.startswith("_versions/") and not sent.count("cut"):
            sent.append("cut")
            raise OSError("the connection is gone")
        sent.append(name)
        upload(self, file, name)

    monkeypatch.setattr(Remote, "upload", failing)
    with pytest.raises(OSError, match="gone"):
        filled.copy_to(address)
    with pytest.raises(OSError, match=f"{address}.*copy_to"):
        MemoryStore.open(address, SpectrumModel())
    first = len(sent)
    filled.copy_to(address)
    assert len(sent) - first == 2  # the measurements of fit, and the version
    check_equal(MemoryStore.open(address, SpectrumModel()), filled)


def test_damage_in_object_storage_is_an_error_that_names_it(filled, bucket, tmp_path):
    address = f"{bucket}/damaged"
    filled.copy_to(address)
    remote = Remote(address)
    (name,) = [name for name in remote.names("_search") if "fitted-" in name]
    remote.upload(filled.path / "_search" / "fit.json", name)
    with pytest.raises(CorruptMemoryError, match=Path(name).name):
        MemoryStore.open(address).get(filled.keys(TEXTS[20:21]))


@pytest.mark.parametrize("path", ["gs://bucket/store", Path("s3://bucket/store"), Path("hf://datasets/me/x")])
def test_addresses_of_another_kind_are_refused_and_nothing_is_made(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"path is '{path}'"):
        MemoryStore.open(path, SpectrumModel())
    with pytest.raises(ValueError, match="revision is 'main'"):
        MemoryStore.open("store", SpectrumModel(), revision="main")
    assert not any(tmp_path.iterdir())


def test_the_command_line_searches_in_object_storage(filled, bucket, capsys):
    filled.copy_to(f"{bucket}/program")
    assert main(["stats", f"{bucket}/program"]) == 0
    assert '"documents": 1091' in capsys.readouterr().out


HUB_CLIENT = """
import sys
from pathlib import Path
from memory_fakes import DOCUMENTS, FailingModel, FakeModel, SpectrumModel, expected, raise_
from clara_hf.memory_store.store import MemoryStore
from test_other_places import check_equal, check_read_only
command, path = sys.argv[1:3]
filled = MemoryStore.open(path, SpectrumModel())
name = "hf://datasets/me/corpus"
if command == "push":
    print(filled.push_to_hub("me/corpus", private=True, license="cc-by-4.0"))
    filled.push_to_hub("me/corpus", revision="next")
elif command == "open":
    store = MemoryStore.open(name, SpectrumModel())
    check_equal(store, filled)
    check_read_only(store, str(store.path))
    check_equal(MemoryStore.open(name, SpectrumModel(), revision="next"), filled)
    store.copy_to(sys.argv[3])
    copied = MemoryStore.open(sys.argv[3], SpectrumModel())
    check_equal(copied, filled)
    copied.add(["another"], {"number": [3]}, show_progress=False)
    copied.compact()
    copied.push_to_hub("me/corpus")
    assert "another" in MemoryStore.open(name).columns(list(copied), ["text"])["text"]
    for refused in ("me/nothing", "me/gated"):
        try:
            MemoryStore.open(f"hf://datasets/{refused}", SpectrumModel())
        except OSError as error:
            assert refused in str(error) and len(str(error).splitlines()) == 1, error
        else:
            raise AssertionError(refused)
elif command == "offline":
    assert len(MemoryStore.open(name)) == 1092
"""


def test_a_store_is_pushed_to_a_hub_with_a_card_and_read_from_it_also_offline(filled, tmp_path):
    def run(environment, *arguments):
        command = [sys.executable, "-c", HUB_CLIENT, arguments[0], str(filled.path), *map(str, arguments[1:])]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-3000:]
        assert TOKEN not in done.stdout + done.stderr

    with hub_server() as server:
        folders = [str(Path(__file__).parent), str(Path(__file__).parents[1]), str(Path(__file__).parents[2])]
        environment = environment_of(server, tmp_path / "home") | {"PYTHONPATH": os.pathsep.join(folders)}
        server.add("datasets/me/gated", gated=True)
        run(environment, "push")
        repository = server.repositories["datasets/me/corpus"]
        files = repository.files("main")
        assert repository.private and set(files) - {".gitattributes", "README.md"} < files_in(filled.path)
        assert {name.split("/")[0] for name in files} == {
            ".gitattributes", "README.md", "data", "_deletions", "_indices", "_search", "_versions"
        }  # fmt: skip
        card = files["README.md"].decode()
        for fact in ("license: cc-by-4.0", "1,091", filled.maker.fingerprint, "`fitted2`", "hf://datasets/me/corpus"):
            assert fact in card
        # What the user writes into the card stays.
        repository.commit("main", {**files, "README.md": card.replace("# corpus", "# My corpus").encode()})
        run(environment, "open", tmp_path / "copy")
        files = repository.files("main")
        card = files["README.md"].decode()
        assert "# My corpus" in card and "1,092" in card and "1,091" not in card
        assert len([name for name in files if name.startswith("_versions/")]) == 1
        assert not [name for name in files if name.startswith("_deletions/")]
        log = len(server.log)
        offline = environment | {"HF_HUB_OFFLINE": "1"}
        run(offline, "offline")
        assert len(server.log) == log
