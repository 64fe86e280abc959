"""Runs that are stopped, killed, limited, replayed or refused: what is made is made once."""

import json
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import pytest
from datasets import Dataset
from scripted_endpoint import Endpoint, Say, Status
from synthesis_runs import faulty, files, rows, run, write_corpus

from benchmarks.synthesis.scripted_teacher import REPAIR, FactTeacher, fact_document, part_of, passage_of
from clara_hf.program import UsageError
from clara_hf.program.folders import release_lock, take_lock
from clara_hf.synthesis import synthesize
from clara_hf.synthesis.backends import client as client_module
from clara_hf.synthesis.outputs import OUTPUTS
from clara_hf.synthesis.store import STORE_FILE, RunStore


ROOT = Path(__file__).resolve().parents[2]
KEY = "sk-very-secret-7d1f"


@pytest.fixture(autouse=True)
def short_delays(monkeypatch):
    monkeypatch.setattr(client_module, "FIRST_DELAY", 0.01)


@pytest.fixture
def corpus(tmp_path) -> str:
    return write_corpus(tmp_path / "docs.jsonl")


class Stop(Exception):
    """What a test stops a run by."""


def test_a_stopped_run_goes_on_and_asks_for_nothing_of_a_finished_passage(corpus, tmp_path, monkeypatch):
    with Endpoint() as endpoint:
        run(corpus, tmp_path / "whole", endpoint.url)
        whole = len(endpoint.requests)
    finish, count = RunStore.finish, []

    def stopping(self, number, record):
        finish(self, number, record)
        count.append(number)
        if len(count) in (2, 4):
            raise Stop

    monkeypatch.setattr(RunStore, "finish", stopping)
    with Endpoint() as endpoint:
        asked, done = 0, set()
        for _ in range(2):
            with pytest.raises(Stop):
                run(corpus, tmp_path / "parts", endpoint.url, "--concurrency", "2")
            assert not done & {passage_of(body["messages"]) for body in endpoint.requests[asked:]}
            done, asked = {fact_document(number - 1, 4) for number in count}, len(endpoint.requests)
            assert len(done) == len(count)
            # What is finished can be read, and says that it is a part.
            stats = json.loads((tmp_path / "parts" / "stats.json").read_text(encoding="utf-8"))
            assert stats["partial"] and stats["passages"] == len(count)
            assert len({row["passage_id"] for row in rows(tmp_path / "parts" / "scp.jsonl")}) == len(count)
        before = len(endpoint.requests)
        run(corpus, tmp_path / "parts", endpoint.url)
        assert not done & {passage_of(body["messages"]) for body in endpoint.requests[before:]}
        # Replies in the log are not asked for again either: only those under way when it stopped are.
        assert whole <= len(endpoint.requests) <= whole + 12
        run(corpus, tmp_path / "parts", endpoint.url)
    assert files(tmp_path / "parts") == files(tmp_path / "whole")


def test_documents_are_read_once_also_where_cutting_them_was_stopped(corpus, tmp_path, monkeypatch):
    lines = Path(corpus).read_text(encoding="utf-8") + "{broken\n"
    Path(corpus).write_text(lines + lines, encoding="utf-8")
    monkeypatch.setattr("clara_hf.synthesis.synthesize.DOCUMENT_BATCH", 4)
    read, stop = synthesize.read_files, [6, 9, 13]

    def stopping(*arguments):
        for number, document in enumerate(read(*arguments), start=1):
            if stop and number > stop[0]:
                stop.pop(0)
                raise Stop
            yield document

    with Endpoint() as endpoint:
        run(corpus, tmp_path / "whole", endpoint.url)
        monkeypatch.setattr(synthesize, "read_files", stopping)
        for _ in range(3):
            with pytest.raises(Stop):
                run(corpus, tmp_path / "parts", endpoint.url)
        run(corpus, tmp_path / "parts", endpoint.url)
    assert files(tmp_path / "parts") == files(tmp_path / "whole")
    assert json.loads(files(tmp_path / "whole")["stats.json"])["reject_reasons"] == {
        "passage: duplicate passage": 6,
        "document: malformed JSON": 2,
    }


def start(corpus: str, out: Path, url: str) -> subprocess.Popen:
    arguments = ["--corpus", corpus, "--out", str(out), "--model", "scripted", "--base-url", url, "--concurrency", "4"]
    shared = ["--max_rounds", "1", "--validation_share", "0"]
    environment = {**os.environ, "OPENAI_API_KEY": KEY}
    return subprocess.Popen(
        [sys.executable, "recipes/synthesize.py", *arguments, "--min_passage_tokens", "8", *shared],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finished_passages(out: Path) -> set[str]:
    """Passages whose records are on the disk; the process that wrote them is gone."""
    connection = sqlite3.connect(out / STORE_FILE)
    try:
        if not connection.execute("SELECT name FROM sqlite_master WHERE name = 'records'").fetchone():
            return set()  # killed before there was a table
        found = connection.execute("SELECT items.payload FROM items JOIN records USING (number)").fetchall()
    finally:
        connection.close()
    return {json.loads(payload)["text"] for (payload,) in found}


@pytest.mark.slow
def test_killed_five_times_the_run_ends_with_the_same_bytes(tmp_path):
    corpus = write_corpus(tmp_path / "docs.jsonl", 40)
    out = tmp_path / "killed"
    with Endpoint(faulty, FactTeacher(0.5)) as endpoint:
        run(corpus, tmp_path / "whole", endpoint.url, "--max_rounds", "1")
        whole = len(endpoint.requests)
    rng = random.Random(5)
    with Endpoint(faulty, FactTeacher(0.5), delay=lambda: 0.01) as endpoint:
        kills, done = 0, set()
        while kills < 5:
            before = len(endpoint.requests)
            process = start(corpus, out, endpoint.url)
            # At a random moment of the work: so many requests after the first.
            target = before + rng.randint(1, whole // 7)
            while len(endpoint.requests) < target and process.poll() is None:
                time.sleep(0.002)
            assert process.poll() is None, process.stdout.read()
            os.kill(process.pid, signal.SIGKILL)
            process.wait()
            kills += 1
            assert not done & {passage_of(body["messages"]) for body in endpoint.requests[before:]}
            assert not any((out / name).exists() for name in OUTPUTS)
            done = finished_passages(out)
        assert 0 < len(done) < 40
        before = len(endpoint.requests)
        process = start(corpus, out, endpoint.url)
        said = process.communicate(timeout=300)[0]
        assert process.returncode == 0, said
        assert not done & {passage_of(body["messages"]) for body in endpoint.requests[before:]}
        assert all(headers["Authorization"] == f"Bearer {KEY}" for headers in endpoint.headers)
        # At most what was under way or not yet on the disk at each kill was asked for twice.
        assert len(endpoint.requests) < whole * 1.5
    assert files(out) == files(tmp_path / "whole")
    for path in out.iterdir():
        assert KEY.encode() not in path.read_bytes()
    assert KEY not in said


def test_a_limit_can_be_raised_and_the_files_are_those_of_one_run(corpus, tmp_path):
    with Endpoint() as endpoint:
        run(corpus, tmp_path / "a", endpoint.url, "--limit", "2")
        assert len(rows(tmp_path / "a" / "passages.jsonl")) == 2
        run(corpus, tmp_path / "a", endpoint.url)
        asked = len(endpoint.requests)
        run(corpus, tmp_path / "b", endpoint.url)
        assert len(endpoint.requests) == 2 * asked
        # Nothing is left to ask for, and no endpoint is needed.
        run(corpus, tmp_path / "a", "http://127.0.0.1:1/v1", "--limit", "4")
        assert len(rows(tmp_path / "a" / "passages.jsonl")) == 4
        run(corpus, tmp_path / "a", "http://127.0.0.1:1/v1")
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_the_log_replays_without_an_endpoint(corpus, tmp_path):
    with Endpoint(faulty) as endpoint:
        run(corpus, tmp_path / "a", endpoint.url)
    nowhere = "http://127.0.0.1:1/v1"
    run(corpus, tmp_path / "b", nowhere, "--replay", str(tmp_path / "a"))
    run(corpus, tmp_path / "c", nowhere, "--replay", str(tmp_path / "b"))
    assert files(tmp_path / "a") == files(tmp_path / "b") == files(tmp_path / "c")
    with pytest.raises(UsageError, match="--replay holds no reply"):
        run(corpus, tmp_path / "d", nowhere, "--replay", str(tmp_path / "a"), "--seed", "1")
    with pytest.raises(UsageError, match="--replay"):
        run(corpus, tmp_path / "e", nowhere, "--replay", str(tmp_path / "none"))


def test_other_settings_other_folders_and_other_processes_are_refused(corpus, tmp_path):
    out = tmp_path / "scp"
    with Endpoint() as endpoint:
        run(corpus, out, endpoint.url, "--limit", "1")
        before = files(out)
        with pytest.raises(UsageError, match="max_rounds: 10 there, 3 now"):
            run(corpus, out, endpoint.url, "--max_rounds", "3")
        lock = take_lock(out)
        with pytest.raises(UsageError, match="in use"):
            run(corpus, out, endpoint.url, "--overwrite", "true", "--max_rounds", "3")
        release_lock(out, lock)
        text = Path(corpus).read_text(encoding="utf-8")
        for edited in (text + '{"text": "More."}\n', text.replace("silver", "golden")):
            Path(corpus).write_text(edited, encoding="utf-8")
            with pytest.raises(UsageError, match="corpus: .*digest.* there, .* now") as caught:
                run(corpus, out, endpoint.url)
            assert len(str(caught.value)) < 600
        Path(corpus).write_text(text, encoding="utf-8")
        assert files(out) == before
        # The same documents by another path are the same run.
        (tmp_path / "elsewhere").mkdir()
        moved = tmp_path / "elsewhere" / ".." / "elsewhere" / "docs.jsonl"
        shutil.copy(corpus, moved)
        run(str(moved), out, endpoint.url, "--limit", "1")
        assert files(out) == before
        run(corpus, out, endpoint.url, "--overwrite", "true", "--max_rounds", "3", "--limit", "2")
        assert len(rows(out / "passages.jsonl")) == 2
        (tmp_path / "mine").mkdir()
        (tmp_path / "mine" / "thesis.txt").write_text("years of work", encoding="utf-8")
        with pytest.raises(UsageError, match="not empty"):
            run(corpus, tmp_path / "mine", endpoint.url, "--overwrite", "true")
        assert os.listdir(tmp_path / "mine") == ["thesis.txt"]


def test_a_run_that_was_cut_while_it_was_deleted_is_still_known(corpus, tmp_path, monkeypatch):
    out, unlink, removed = tmp_path / "scp", Path.unlink, []

    def cut(path, missing_ok=False):
        unlink(path, missing_ok=missing_ok)
        if path.parent == out and path.name.startswith(STORE_FILE):
            removed.append(path.name)
            raise KeyboardInterrupt

    with Endpoint() as endpoint:
        run(corpus, out, endpoint.url, "--limit", "1")
        for name in (f"{STORE_FILE}-wal", f"{STORE_FILE}-shm"):
            (out / name).touch()  # as a kill leaves them
        with monkeypatch.context() as patch:
            patch.setattr(Path, "unlink", cut)
            with pytest.raises(KeyboardInterrupt):
                run(corpus, out, endpoint.url, "--overwrite", "true", "--max_rounds", "3")
        assert removed and (out / STORE_FILE).exists()
        run(corpus, out, endpoint.url, "--overwrite", "true", "--max_rounds", "3")


def test_the_cure_for_a_refused_field_goes_on_in_the_same_folder(corpus, tmp_path):
    out = tmp_path / "scp"
    refusal = "Unsupported parameter: 'max_tokens' is not supported with this model."

    def script(messages, body, before):
        return Status(400, json.dumps({"error": {"message": refusal}})) if "max_tokens" in body else None

    with Endpoint(script) as endpoint:
        with pytest.raises(UsageError, match="--extra_body") as told:
            run(corpus, out, endpoint.url)
        cure = str(told.value).partition("--extra_body '")[2].partition("'")[0]
        refused = len(endpoint.requests)
        stats = run(corpus, out, endpoint.url, "--extra_body", cure)
        assert stats["pairs"] and all(body["max_completion_tokens"] == 2048 for body in endpoint.requests[refused:])
    assert stats["failed"] == 0


def test_another_data_set_on_disk_is_another_run(tmp_path):
    for name, first in (("a", 0), ("b", 50), ("copy/a", 0)):
        texts = [fact_document(first + number, 4) for number in range(3)]
        Dataset.from_dict({"text": texts}).save_to_disk(tmp_path / name / "set")
    shutil.rmtree(tmp_path / "copy" / "a" / "set")
    shutil.copytree(tmp_path / "a" / "set", tmp_path / "copy" / "a" / "set")

    def go(name):
        arguments = ["--dataset", str(tmp_path / name / "set"), "--out", str(tmp_path / "scp"), "--model", "scripted"]
        synthesize.main([*arguments, "--base_url", endpoint.url, "--min_passage_tokens", "8"])

    with Endpoint() as endpoint:
        go("a")
        asked = len(endpoint.requests)
        go("copy/a")
        assert len(endpoint.requests) == asked
        with pytest.raises(UsageError, match="dataset: "):
            go("b")
    assert rows(tmp_path / "scp" / "passages.jsonl")[0]["source"] == "set"


def test_a_passage_whose_requests_fail_is_set_aside_and_can_be_tried_again(corpus, tmp_path):
    poison = fact_document(2, 4)

    def script(messages, body, before):
        return Status(400, '{"error": {"message": "context too long"}}') if passage_of(messages) == poison else None

    out = tmp_path / "scp"
    with Endpoint(script) as endpoint:
        stats = run(corpus, out, endpoint.url)
    assert stats["failed"] == 1 and stats["passages"] == 6
    (row,) = [row for row in rows(out / "rejected.jsonl") if row["passage_id"] == "doc2#1"]
    assert row["reason"] == "request failed" and "context too long" in row["detail"]
    assert [row["passage_id"] for row in rows(out / "scp.jsonl")].count("doc2#1") == 0
    # What failed is part of the log.
    run(corpus, tmp_path / "replayed", "http://127.0.0.1:1/v1", "--replay", str(out))
    assert files(tmp_path / "replayed") == files(out)
    with Endpoint() as endpoint:
        run(corpus, tmp_path / "whole", endpoint.url)
        run(corpus, out, endpoint.url, "--retry_failed", "true")
    assert files(out) == files(tmp_path / "whole")


@pytest.mark.parametrize("code", [400, 413, 422])
@pytest.mark.parametrize("options", [["--concurrency", "1"], ["--limit", "3"]])
def test_an_endpoint_that_refuses_everything_stops_the_run_and_loses_nothing(corpus, tmp_path, code, options):
    out = tmp_path / "scp"
    with Endpoint(lambda *_: Status(code, '{"error": {"message": "no such model: llama"}}')) as endpoint:
        for _ in range(2):
            before = len(endpoint.requests)
            with pytest.raises(UsageError, match="in a row failed .HTTP 4.*no such model: llama"):
                run(corpus, out, endpoint.url, *options)
            # At most four passages of three requests, each in three formats.
            assert 0 < len(endpoint.requests) - before <= 4 * 9
    with Endpoint() as endpoint:
        run(corpus, tmp_path / "whole", endpoint.url)
        run(corpus, out, endpoint.url)
    assert files(out) == files(tmp_path / "whole")


def test_replies_without_content_stop_the_run_and_are_asked_for_again_after_the_server_is_mended(corpus, tmp_path):
    out = tmp_path / "scp"
    empty = Say(None, "length", {"reasoning_content": "first, let us see"})
    with Endpoint(lambda *_: empty) as endpoint:
        for _ in range(2):
            before = len(endpoint.requests)
            with pytest.raises(UsageError, match="without content beside reasoning_content"):
                run(corpus, out, endpoint.url)
            # Not the corpus, but a few requests, each tried three times.
            assert 0 < len(endpoint.requests) - before <= 18 * 3
    with RunStore(out) as store:
        assert not store.has_replies() and not store.totals(None).items
    with Endpoint() as endpoint:
        run(corpus, tmp_path / "whole", endpoint.url)
        whole = len(endpoint.requests)
        run(corpus, out, endpoint.url)
        assert len(endpoint.requests) == 2 * whole
    assert files(out) == files(tmp_path / "whole")


def test_an_empty_reply_in_the_log_of_an_earlier_version_is_asked_for_again(corpus, tmp_path):
    with Endpoint() as endpoint:
        run(corpus, tmp_path / "scp", endpoint.url, "--limit", "1")
        with RunStore(tmp_path / "scp") as store:
            empty = '{"text": "", "prompt_tokens": 1, "completion_tokens": 0}'
            store.connection.execute("UPDATE replies SET reply = ? WHERE step = 'simple'", (empty,))
            store.connection.execute("DELETE FROM records")
            store.commit()
        before = len(endpoint.requests)
        run(corpus, tmp_path / "scp", endpoint.url, "--limit", "1")
        assert [part_of(body["messages"]) for body in endpoint.requests[before:]] == ["simple"]


def test_a_refused_field_is_mended_in_the_same_folder(corpus, tmp_path):
    refused = '{"error": {"message": "Unsupported parameter: max_tokens"}}'
    with Endpoint(lambda messages, body, before: Status(400, refused) if "max_tokens" in body else None) as endpoint:
        with pytest.raises(UsageError, match="--extra_body") as caught:
            run(corpus, tmp_path / "scp", endpoint.url)
        cure = str(caught.value).partition("--extra_body '")[2].partition("'")[0]
        stats = run(corpus, tmp_path / "scp", endpoint.url, "--extra_body", cure)
        assert stats["pairs"] and endpoint.requests[-1]["max_completion_tokens"] == 2048
        # Once there are replies, another setting is another run.
        with pytest.raises(UsageError, match="extra_body"):
            run(corpus, tmp_path / "scp", endpoint.url)


def test_cut_off_replies_are_no_verdicts_also_when_they_are_replayed(corpus, tmp_path):
    def script(messages, body, before):
        cut = part_of(messages) == "judge" and not messages[-1]["content"].startswith(REPAIR)
        return Say('{"correct": true}', "length") if cut else None

    with Endpoint(script) as endpoint:
        stats = run(corpus, tmp_path / "a", endpoint.url)
        assert endpoint.parts().count("judge") == 2 * 6 and stats["kinds"]["aggregation"] == 6
    run(corpus, tmp_path / "b", "http://127.0.0.1:1/v1", "--replay", str(tmp_path / "a"))
    assert files(tmp_path / "a") == files(tmp_path / "b")
    with Endpoint(
        lambda messages, *_: Say('{"correct": true}', "length") if part_of(messages) == "judge" else None
    ) as e:
        stats = run(corpus, tmp_path / "c", e.url, "--max_rounds", "0", "--keep_uncovered", "true")
    assert "aggregation" not in stats["kinds"] and stats["reject_reasons"]["pair: malformed reply"] == 6


def test_what_always_fails_among_good_replies_is_set_aside(corpus, tmp_path):
    refused = Status(400, '{"error": {"message": "filtered"}}')
    bad = {fact_document(number, 4) for number in range(4)}

    def script(messages, body, before):
        return refused if passage_of(messages) in bad and part_of(messages) == "complex" else None

    with Endpoint(script) as endpoint:
        stats = run(corpus, tmp_path / "scp", endpoint.url, "--concurrency", "1")
    # What the other requests of a failed passage took is counted, too.
    assert stats["failed"] == 4 and stats["requests"] == len(endpoint.requests) - 2 * 4
    assert stats["completion_tokens"] > 0
    with Endpoint(lambda messages, *_: refused if passage_of(messages) in bad else None) as endpoint:
        with pytest.raises(UsageError, match="--tolerated_failures"):
            run(corpus, tmp_path / "all", endpoint.url, "--concurrency", "1")
        stats = run(corpus, tmp_path / "all", endpoint.url, "--concurrency", "1", "--tolerated_failures", "4")
    assert stats["failed"] == 4 and stats["coverage"] == 1.0


@pytest.mark.slow
def test_an_interrupt_is_one_sentence_and_the_run_goes_on(corpus, tmp_path):
    out = tmp_path / "scp"
    # After twelve requests replies wait, so that the run cannot end before it is interrupted.
    waits = [False] * 12 + [True] * 1000
    with Endpoint(delay=lambda: 20.0 if waits.pop(0) else 0.0) as endpoint:
        process = start(corpus, out, endpoint.url)
        while len(endpoint.requests) < 13 and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=60)[0]
        waits = [False] * 1000
        assert process.returncode == 130 and "Traceback" not in said
        assert "interrupted" in said.splitlines()[-1]
        process = start(corpus, out, endpoint.url)
        assert process.communicate(timeout=200) and process.returncode == 0
        asked = len(endpoint.requests)
    # Only what was under way is asked for twice.
    assert asked <= json.loads((out / "stats.json").read_text(encoding="utf-8"))["requests"] + 4
