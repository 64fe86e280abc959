"""An evaluation that was interrupted, killed, or started in several processes gives what an uninterrupted one gives."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import TEXTS
from processes import exit_code, in_processes

from clara_hf.evaluation.cache import Cache, CacheError, Orders
from clara_hf.evaluation.results import Results
from clara_hf.evaluation.run import main
from clara_hf.evaluation.systems.readers import MemoryReader, TextReader
from modeling_clara import CLaRaForRetrievalGeneration


ROOT = Path(__file__).parents[2]
SYSTEMS = "clara,text-clara,bm25,gold,no-memory,wrong-memory"
COMPARED = ("table.md", "table.csv")


@pytest.fixture(scope="module")
def arguments(tmp_path_factory, untouched_clara):
    folder = tmp_path_factory.mktemp("resume")
    untouched_clara.save_pretrained(folder / "clara")
    words = " ".join(TEXTS).split()
    rows = [
        {
            "question": f"What of {words[place]} and {words[-place - 1]}?",
            "answers": [words[place]],
            "docs": [TEXTS[(place + offset) % len(TEXTS)] for offset in range(3)],
            "pos_index": [place % 3],
        }
        for place in range(14)
    ]
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = {"model": folder / "clara", "data": folder / "data.jsonl", "systems": SYSTEMS}
    options |= {"batch_size": 3, "max_new_tokens": 4}
    return [str(part) for name, value in options.items() for part in (f"--{name}", value)]


def written(folder: Path) -> dict[str, str]:
    paths = [folder / name for name in COMPARED] + sorted((folder / "predictions").iterdir())
    return {path.name: path.read_text() for path in paths}


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, arguments):
    folder = tmp_path_factory.mktemp("whole")
    assert exit_code(main, [*arguments, "--output_dir", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def uninterrupted(whole):
    return written(whole)


@pytest.fixture(scope="module")
def batches(tmp_path_factory, arguments):
    """How many batches of answers an uninterrupted run makes."""
    counts = {"all": 0}
    with pytest.MonkeyPatch.context() as patch:
        for reader in (MemoryReader, TextReader):
            patch.setattr(reader, "answer", counted(reader.answer, counts, -1))
        assert exit_code(main, [*arguments, "--output_dir", str(tmp_path_factory.mktemp("counted"))]) == 0
    # Never more than 5 for each of 6 systems; what two systems answer from the same documents is answered once.
    assert 20 < counts["all"] <= 30
    return counts["all"]


@pytest.mark.parametrize("calls", [1, 9, 20])
def test_an_interrupted_run_goes_on_and_ends_in_the_same_files(
    tmp_path, arguments, uninterrupted, batches, monkeypatch, calls
):
    out, counts = tmp_path / "out", {"all": 0}
    for reader in (MemoryReader, TextReader):
        monkeypatch.setattr(reader, "answer", counted(reader.answer, counts, calls))
    assert exit_code(main, [*arguments, "--output_dir", str(out)]) == 130
    assert not (out / "results.json").exists() and counts["all"] == calls
    assert exit_code(main, [*arguments, "--output_dir", str(out)]) == 0
    assert written(out) == uninterrupted
    # The interrupted batch is the only one that is tried twice.
    assert counts["all"] == batches + 1


def counted(answer, counts, limit):
    def wrapped(self, *args):
        counts["all"] += 1
        if counts["all"] == limit:
            raise KeyboardInterrupt
        return answer(self, *args)

    return wrapped


def test_an_interrupted_overwrite_leaves_the_earlier_results_and_goes_on(
    tmp_path, arguments, whole, uninterrupted, monkeypatch
):
    folder, counts = shutil.copytree(whole, tmp_path / "whole"), {"all": 0}
    more = [*arguments, "--output_dir", str(folder), "--top_k", "1"]
    monkeypatch.setattr(MemoryReader, "answer", counted(MemoryReader.answer, counts, 4))
    assert exit_code(main, [*more, "--overwrite"]) == 130
    assert {name: (folder / name).read_text() for name in COMPARED} == {name: uninterrupted[name] for name in COMPARED}
    assert exit_code(main, [*more, "--overwrite"]) == 0
    assert json.loads((folder / "results.json").read_text())["settings"]["top_k"] == 1
    # Without --top_k again: what the first run made is there.
    done = counts["all"]
    assert exit_code(main, [*arguments, "--output_dir", str(folder), "--overwrite"]) == 0
    assert counts["all"] == done and written(folder) == uninterrupted


@pytest.mark.parametrize("replaced", [1, 2, 4, 7])
def test_results_that_are_cut_while_they_take_their_place_are_gone_on_with(
    tmp_path, arguments, whole, uninterrupted, monkeypatch, replaced
):
    out, left = tmp_path / "out", [replaced]
    shutil.copytree(whole / "cache", out / "cache")

    def cut(old, new):
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        os.rename(old, new)

    for again in (replaced, 3):  # the second call is cut while it finishes what the first one left
        left[0] = again
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", cut)
            assert exit_code(main, [*arguments, "--output_dir", str(out)]) == 130
    assert exit_code(main, [*arguments, "--output_dir", str(out)]) == 0
    assert written(out) == uninterrupted and not list(out.glob(".eval*"))


def test_results_that_are_cut_are_no_other_runs(tmp_path, arguments, whole, monkeypatch, capsys):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    results = Results.load(out)
    results.data["settings"]["top_k"] = 1

    def cut(old, new):
        if str(new).endswith("table.md"):
            raise KeyboardInterrupt
        os.rename(old, new)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", cut)
        with pytest.raises(KeyboardInterrupt):
            results.save(out)
    assert exit_code(main, [*arguments, "--output_dir", str(out)]) == 2
    assert "holds another run's results" in capsys.readouterr().err


def test_a_finished_run_is_added_to_and_only_what_is_missing_is_made(tmp_path, arguments, uninterrupted, monkeypatch):
    made = {"ranked": [], "answered": [], "compressed": []}

    def note(name, method, told):
        def wrapped(self, *given, **options):
            made[name] += told(*given)
            return method(self, *given, **options)

        return wrapped

    monkeypatch.setattr(MemoryReader, "rank", note("ranked", MemoryReader.rank, lambda rows: [one.id for one in rows]))
    monkeypatch.setattr(MemoryReader, "answer", note("answered", MemoryReader.answer, lambda asked, _: asked))
    compress = CLaRaForRetrievalGeneration.compress
    monkeypatch.setattr(CLaRaForRetrievalGeneration, "compress", note("compressed", compress, lambda texts: texts))
    out = ["--output_dir", str(tmp_path / "out")]

    def call(*changes):
        for rows in made.values():
            rows.clear()
        assert exit_code(main, [*arguments, *out, *changes]) == 0
        return {name: len(rows) for name, rows in made.items()}

    few = ("--systems", "clara,no-memory", "--limit", "9")
    assert call(*few) == {"ranked": 9, "answered": 18, "compressed": len(set(made["compressed"]))}
    assert call(*few) == {"ranked": 0, "answered": 0, "compressed": 0}
    # More questions: the new ones, with their documents.
    assert call("--systems", "clara,no-memory", "--limit", "11") == {
        **{"ranked": 2, "answered": 4, "compressed": len(set(made["compressed"]))},
    }
    # Another system: its answers, and the documents that it answers from.
    found = call("--systems", "clara,no-memory,gold", "--limit", "11")
    assert found["ranked"] == 0 and 0 < found["answered"] <= 11 and found["compressed"] <= 11
    # Another seed: nothing of this depends on it.
    assert call("--systems", "clara,no-memory,gold", "--limit", "11", "--seed", "1")["answered"] == 0
    # Another file, which holds the same questions.
    data = arguments[arguments.index("--data") + 1]
    other = shutil.copy(data, tmp_path / "other.jsonl")
    both = ("--data", f"{data},{other}", "--systems", "clara,no-memory,gold", "--limit", "11")
    assert call(*both) == {"ranked": 0, "answered": 0, "compressed": 0}
    # All of it, beside: only what none of these made.
    assert call("--output_dir", str(tmp_path / "beside"), "--cache_dir", str(tmp_path / "out/cache"))["ranked"] == 3
    # Other batches, so that the last bits may differ, but nothing else.
    found = {path.name: rows_of(path.read_text()) for path in (tmp_path / "beside/predictions").iterdir()}
    for name, rows in found.items():
        for row, expected in zip(rows, rows_of(uninterrupted[name]), strict=True):
            assert row.pop("candidate_scores") == pytest.approx(expected.pop("candidate_scores"), abs=1e-5)
            assert row == expected


def rows_of(lines):
    return [json.loads(line) for line in lines.splitlines()]


@pytest.mark.slow
def test_a_killed_run_goes_on_and_ends_in_the_same_files(tmp_path, arguments, uninterrupted):
    out = tmp_path / "out"
    command = [sys.executable, str(ROOT / "eval/run.py"), *arguments, "--output_dir", str(out)]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    journals = out / "cache" / "answers"
    try:
        deadline = time.monotonic() + 240
        while not list(journals.glob("*.jsonl")) and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    (journal,) = journals.glob("model-*.0.jsonl")
    assert not (out / "results.json").exists()
    # What a kill in the middle of a write leaves.
    journal.write_bytes(journal.read_bytes() + b'{"key": "4", "predic')
    assert exit_code(main, [*arguments, "--output_dir", str(out)]) == 0
    assert written(out) == uninterrupted


def evaluate(rank, arguments, folder):
    with open(folder / f"told{rank}", "w") as told, contextlib.redirect_stdout(told):
        return exit_code(main, arguments)


@pytest.mark.long
def test_two_processes_give_what_one_gives(tmp_path, arguments, uninterrupted):
    out = tmp_path / "out"
    codes = in_processes(2, evaluate, tmp_path, [*arguments, "--output_dir", str(out)], tmp_path)
    assert codes == [0, 0]
    told = "".join((tmp_path / f"told{rank}").read_text() for rank in range(2))
    assert told.count("cost per question") == 1
    assert written(out) == uninterrupted


# The cache


def shelf(folder, label="clara", maker="one"):
    return Cache(folder).shelf("answers", label, maker)


def test_half_a_line_is_not_read_and_cut_off_by_the_next_append(tmp_path):
    shelf(tmp_path).add({"1": {"x": "東京"}, "2": {}})
    (path,) = tmp_path.rglob("*.jsonl")
    content = path.read_bytes()
    for end in range(len(content) - 10, len(content)):
        path.write_bytes(content[:end])
        again = shelf(tmp_path)
        assert again.records == {"1": {"x": "東京"}}
        again.add({"3": {}})
        assert shelf(tmp_path).records.keys() == {"1", "3"}


def test_reading_joins_the_files_of_all_processes_but_not_those_of_other_makers(tmp_path):
    shelf(tmp_path).add({"1": {}})
    (path,) = tmp_path.rglob("*.jsonl")
    path.with_name(path.name.replace(".0.jsonl", ".1.jsonl")).write_text('{"key": "2"}\n')
    shelf(tmp_path, maker="two").add({"3": {}})
    # The label is for people only.
    assert shelf(tmp_path, label="another name").records.keys() == {"1", "2"}
    assert shelf(tmp_path, maker="two").records.keys() == {"3"}


def test_a_damaged_line_is_named(tmp_path):
    shelf(tmp_path).add({"1": {}})
    (path,) = tmp_path.rglob("*.jsonl")
    for damaged in (b"no json\n", b"[]\n", b'{"id": "1"}\n'):
        path.write_bytes(damaged)
        with pytest.raises(CacheError, match="line 1 is damaged") as caught:
            shelf(tmp_path)
        assert str(path) in str(caught.value)


def test_an_order_is_kept_until_it_is_carried_out(tmp_path):
    def orders():
        return Orders(Cache(tmp_path).shelf("work", "orders", None))

    assert orders().begin("stage", ["a", "b", "c"]) == ["a", "b", "c"]
    assert orders().begin("stage", ["c"]) == ["a", "b", "c"]
    assert orders().begin("other", ["c"]) == ["c"]
    assert orders().begin("stage", ["c", "d"]) == ["c", "d"]
    done = orders()
    done.end("stage")
    assert orders().begin("stage", ["c"]) == ["c"]


# Two evaluations, one folder


def test_a_folder_that_is_evaluated_into_is_refused_and_its_process_is_named(tmp_path, arguments, capsys):
    out = tmp_path / "out"
    program = "import sys; from pathlib import Path; from clara_hf.program.folders import take_lock\n"
    program += "take_lock(Path(sys.argv[1])); print(flush=True); sys.stdin.read()"
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "cwd": ROOT}
    command = [*arguments, "--systems", "bm25", "--output_dir", str(out)]
    with subprocess.Popen([sys.executable, "-c", program, str(out)], **pipes) as other:
        other.stdout.readline()
        assert exit_code(main, command) == 2
        error = capsys.readouterr().err
        assert str(out) in error and f"process {other.pid} " in error and not (out / "results.json").exists()
        other.kill()
        other.wait()
    # What a dead process leaves is no lock.
    assert (out / ".lock").exists() and exit_code(main, command) == 0 and not (out / ".lock").exists()
