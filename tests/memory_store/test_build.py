import json
import logging
import resource
import shutil
import signal
from types import SimpleNamespace

import lance
import pytest
import torch
from conftest import TEXTS, build_clara
from memory_fakes import (
    DOCUMENTS,
    BatchModel,
    FailingModel,
    FakeModel,
    add_together,
    alone,
    data_files,
    expected,
    killed_at,
    raise_,
)
from processes import in_processes

from clara_hf.memory_store import build as memory_filling
from clara_hf.memory_store.program import main
from clara_hf.memory_store.store import MemoryStore
from clara_hf.program.errors import UsageError


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


def add_until_killed(rank, path):
    return add_together(rank, path, killed_at(6, BatchModel()))


def test_a_killed_process_loses_only_what_it_had_not_written_and_all_memories_are_equal(path, tmp_path):
    MemoryStore.open(path, BatchModel(), dtype="float32")
    assert in_processes(1, add_until_killed, tmp_path, path) == [-signal.SIGKILL]
    store = MemoryStore.open(path, BatchModel())
    keys = store.add(DOCUMENTS, batch_size=4, show_progress=False)
    assert len(store.model.compressed) == 16 and len(store) == 40
    assert torch.equal(store.get(keys), alone(tmp_path / "alone"))
    assert not list((path / "_parts").glob("*.part.json"))


def test_a_part_whose_data_are_lost_or_whose_record_is_damaged_is_made_again(path, tmp_path):
    MemoryStore.open(path, BatchModel(), dtype="float32")
    in_processes(1, add_until_killed, tmp_path, path)
    records = sorted((path / "_parts").glob("*.part.json"))
    records[0].write_text('{"name": ')
    data = [name for record in records[1:4] for name in json.loads(record.read_text())["files"]]
    (path / data[0]).unlink()
    (path / data[1]).write_bytes(bytes((path / data[1]).stat().st_size))
    (path / data[2]).write_bytes((path / data[2]).read_bytes()[:100])
    store = MemoryStore.open(path, BatchModel())
    keys = store.add(DOCUMENTS, batch_size=4, show_progress=False)
    assert len(store.model.compressed) == 16 + 4 * 4 and len(store) == 40
    assert torch.equal(store.get(keys), alone(tmp_path / "alone"))


def test_a_kill_between_commit_and_clearing_up_leaves_no_row_twice(store, path, monkeypatch):
    monkeypatch.setattr(store._table.parts, "discard", lambda names: None)
    store.add(DOCUMENTS, show_progress=False)
    again = MemoryStore.open(path, FakeModel())
    keys = again.add(DOCUMENTS, show_progress=False)
    assert again.model.compressed == [] and torch.equal(again.get(keys), expected(DOCUMENTS))
    assert lance.dataset(str(path)).count_rows() == 40
    assert not list((path / "_parts").glob("*.part.json"))


def test_an_interrupted_call_with_a_real_model_gives_the_memories_of_a_whole_one(clara, path):
    documents = [f"{TEXTS[index % 5]} {'It is said. ' * (index % 7)}" for index in range(20)]
    store = MemoryStore.open(path / "whole", clara, dtype="float32")
    whole = store.get(store.add(documents, batch_size=4, show_progress=False))

    part = MemoryStore.open(path / "part", clara, dtype="float32")
    compress, done = clara.compress_encoded, []

    def compress_until_interrupted(rows, **options):
        done.append(rows)
        return compress(rows, **options) if len(done) != 3 else raise_(KeyboardInterrupt())

    clara.compress_encoded = compress_until_interrupted
    with pytest.raises(KeyboardInterrupt):
        part.add(documents, batch_size=4, show_progress=False)
    assert len(part) == 8
    assert torch.equal(part.get(part.add(documents, batch_size=4, show_progress=False)), whole)


def test_batches_of_so_many_tokens_are_those_of_a_whole_call_after_an_interruption(clara, tmp_path):
    documents = [f"{text[: 9 * (number % 7 + 1)]} {number}" for number, text in enumerate(TEXTS * 4)]
    rows = clara.processor.encode_documents(documents)
    most, sizes, compress = 3 * max(clara.processor.encoded_lengths(rows)), [], clara.compress_encoded
    options = {"max_tokens_per_batch": most, "show_progress": False}

    def counted(rows, **own):
        sizes.append(len(rows))
        assert len(rows) * max(clara.processor.encoded_lengths(rows)) <= most
        return compress(rows, **own) if len(sizes) != 3 else raise_(KeyboardInterrupt())

    whole = MemoryStore.open(tmp_path / "whole", clara)
    expected = whole.get(whole.add(documents, **options))
    clara.compress_encoded = counted
    part = MemoryStore.open(tmp_path / "part", clara)
    with pytest.raises(KeyboardInterrupt):
        part.add(documents, **options)
    assert len(part) == sum(sizes[:2])
    assert torch.equal(part.get(part.add(documents, **options)), expected) and len(set(sizes)) > 1


def test_what_cannot_be_batches_of_so_many_tokens_is_refused(clara, store, tmp_path):
    own = MemoryStore.open(tmp_path / "own", clara)
    with pytest.raises(ValueError, match="batch_size=2 and max_tokens_per_batch=64 both"):
        own.add(TEXTS, batch_size=2, max_tokens_per_batch=64)
    with pytest.raises(ValueError, match="max_tokens_per_batch is 0; it must be at least 1"):
        own.add(TEXTS, max_tokens_per_batch=0)
    with pytest.raises(ValueError, match=r"max_tokens_per_batch is 12, but a text has \d+ tokens"):
        own.add(TEXTS, max_tokens_per_batch=12)
    with pytest.raises(ValueError, match="max_tokens_per_batch needs a model with a processor"):
        store.add(["one"], max_tokens_per_batch=64)


TOO_LONG = [f"{number} {'Mara ' * 60}" for number in range(6)]


def test_documents_that_will_be_cut_are_counted_once_over_those_that_are_compressed(clara, path, caplog):
    store = MemoryStore.open(path, clara)
    with caplog.at_level("WARNING"):
        store.add([*TEXTS[:1], *TOO_LONG[:2]], batch_size=2, show_progress=False)
        store.add([*TEXTS[:4], *TOO_LONG, *TOO_LONG], batch_size=2, show_progress=False)
        store.add([*TEXTS, *TOO_LONG], batch_size=2, show_progress=False)
    told = "compressed documents are longer than doc_max_length=32 tokens and were cut; "
    way = "model.processor.find_cut_documents(documents) lists them."
    assert [record.message for record in caplog.records] == [f"2 of 3 {told}{way}", f"4 of 7 {told}{way}"]


class Reports(logging.Handler):
    """Keeps what is logged about documents that are too long."""

    def __init__(self):
        super().__init__()
        self.messages = []

    def emit(self, record):
        if "longer" in record.getMessage():
            self.messages.append(record.getMessage())


def reports_of_adding_together(rank, base, path):
    reports = Reports()
    logging.getLogger("clara_hf").addHandler(reports)
    store = MemoryStore.open(path, build_clara(base))
    store.add([*TEXTS, *TOO_LONG], batch_size=2, show_progress=False, distributed=True)
    return reports.messages


def test_processes_that_add_together_report_cut_documents_once(base, path, tmp_path):
    MemoryStore.open(path, build_clara(base))
    first, second = in_processes(2, reports_of_adding_together, tmp_path, base, path)
    assert len(first) == 1 and first[0].startswith("6 of 11 ") and second == []


def test_a_reserved_token_is_named_by_position_before_anything_is_compressed_or_written(clara, path):
    store = MemoryStore.open(path, clara)
    (key,) = store.add(TEXTS[:1], {"year": [1]}, show_progress=False)
    clara.compress_encoded = lambda rows, **options: raise_(AssertionError("compressed"))
    documents = [*TEXTS, *TEXTS, f"a {clara.processor.reserved_texts[0]} b"]
    with pytest.raises(ValueError, match=r"^documents\[10\] contains '<MEM0>', a token that the model reserves"):
        store.add(documents, {"year": list(range(11))}, batch_size=1, show_progress=False)
    assert len(store) == 1 and store.columns([key], ["year"]) == {"year": [1]}


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


def test_what_will_be_written_is_told_first_and_loudly_when_it_is_large(store, monkeypatch, caplog):
    monkeypatch.setattr(memory_filling.logger, "propagate", True)
    monkeypatch.setattr(memory_filling, "TOLD_BYTES", 100)
    monkeypatch.setattr(store.model, "compress", lambda documents, batch_size: raise_(RuntimeError("stop")))
    with caplog.at_level("WARNING"), pytest.raises(RuntimeError, match="stop"):
        store.add(DOCUMENTS, show_progress=False)
    assert "40 documents to compress: 0.0 MiB in" in caplog.text and "free" in caplog.text


# The command line


@pytest.fixture
def checkpoint(clara, tmp_path):
    clara.save_pretrained(tmp_path / "model")
    return str(tmp_path / "model")


def test_a_store_is_built_resumed_searched_compacted_and_verified(checkpoint, tmp_path, capsys):
    data, store = tmp_path / "documents.jsonl", str(tmp_path / "store")
    data.write_text("".join(json.dumps({"text": text, "title": f"t{i}"}) + "\n" for i, text in enumerate(DOCUMENTS)))
    arguments = [store, "--model", checkpoint, "--documents", str(data), "--columns", "title", "--form", "rotated8"]
    assert main(["build", *arguments, "--limit", "10", "--max_tokens_per_batch", "512"]) == 0
    assert len(MemoryStore.open(store)) == 10
    assert main(["build", *arguments]) == 0 and len(MemoryStore.open(store)) == 40
    capsys.readouterr()
    assert main(["search", store, DOCUMENTS[3], "another", "--model", checkpoint, "--top_k", "2"]) == 0
    first, second = map(json.loads, capsys.readouterr().out.splitlines())
    assert first["question"] == DOCUMENTS[3] and len(second["documents"]) == 2
    assert set(first["documents"][0]) == {"key", "score", "text", "title"}
    assert main(["fit", store, "--texts"]) == 0
    assert main(["search", store, DOCUMENTS[3], "--model", checkpoint, "--top_k", "1", "--hybrid"]) == 0
    (found,) = json.loads(capsys.readouterr().out)["documents"]
    assert 1 / 61 <= found["score"] <= 2 / 61
    assert main(["compact", store]) == 0
    stats = json.loads(capsys.readouterr().out)
    assert stats["documents"] == 40 and stats["form"] == "rotated8" and stats["files"] == 1
    assert main(["verify", store]) == 0
    assert json.loads(capsys.readouterr().out)["rows"] == 40
    with pytest.raises(ValueError, match="at least 1000 documents"):
        main(["fit", store])
    with pytest.raises(UsageError, match="--questions .*--model"):
        main(["fit", store, "--questions", str(data)])
    with pytest.raises(UsageError, match="field `question`"):
        main(["fit", store, "--questions", str(data), "--model", checkpoint])


def test_what_is_wrong_is_named(checkpoint, tmp_path):
    data = tmp_path / "documents.jsonl"
    data.write_text('{"text": "one"}\n{"body": "two"}\n')
    with pytest.raises(UsageError, match=r"row 2 of .*documents.jsonl has no such field, it has \['body'\]"):
        main(["build", str(tmp_path / "store"), "--model", checkpoint, "--documents", str(data)])
    with pytest.raises(UsageError, match="no memory store at"):
        main(["stats", str(tmp_path / "nothing")])
