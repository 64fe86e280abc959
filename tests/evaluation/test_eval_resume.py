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
from processes import in_processes

from clara_hf.evaluation.journal import Journal, JournalError
from clara_hf.evaluation.run import main
from clara_hf.evaluation.systems.readers import MemoryReader, TextReader


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
    assert not (folder / "unfinished").exists()
    return {path.name: path.read_text() for path in paths}


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def whole(tmp_path_factory, arguments):
    folder = tmp_path_factory.mktemp("whole")
    assert main([*arguments, "--output_dir", str(folder)]) == 0
    return folder


@pytest.fixture(scope="module")
def uninterrupted(whole):
    return written(whole)


@pytest.mark.parametrize("calls", [1, 9, 28])
def test_an_interrupted_run_goes_on_and_ends_in_the_same_files(tmp_path, arguments, uninterrupted, monkeypatch, calls):
    out, counts = tmp_path / "out", {"all": 0, "second": 0}
    for reader in (MemoryReader, TextReader):
        monkeypatch.setattr(reader, "answer", counted(reader.answer, counts, calls))
    assert main([*arguments, "--output_dir", str(out)]) == 130
    assert not (out / "results.json").exists() and (out / "unfinished" / "run.json").exists()
    first = counts["all"]
    assert main([*arguments, "--output_dir", str(out)]) == 0
    assert written(out) == uninterrupted
    # 5 batches for each of 6 systems; the interrupted one is the only one that is tried twice.
    assert counts["all"] == 6 * 5 + 1 and first == calls


def counted(answer, counts, limit):
    def wrapped(self, *args):
        counts["all"] += 1
        if counts["all"] == limit:
            raise KeyboardInterrupt
        return answer(self, *args)

    return wrapped


def test_other_settings_do_not_go_on_and_overwrite_starts_again(
    tmp_path, arguments, uninterrupted, monkeypatch, capsys
):
    out = ["--output_dir", str(tmp_path / "out")]
    with monkeypatch.context() as patch:
        patch.setattr(MemoryReader, "answer", counted(MemoryReader.answer, {"all": 0}, 2))
        assert main([*arguments, *out]) == 130
    assert main([*arguments, *out, "--seed", "1"]) == 2
    assert "unfinished run with other settings: give another --output_dir, or --overwrite." in capsys.readouterr().err
    assert main([*arguments, *out, "--overwrite"]) == 0
    assert written(tmp_path / "out") == uninterrupted


@pytest.mark.parametrize("flag", [[], ["--overwrite"]])
def test_an_interrupted_overwrite_leaves_the_earlier_results_and_goes_on(
    tmp_path, arguments, whole, uninterrupted, monkeypatch, flag
):
    folder, counts = shutil.copytree(whole, tmp_path / "whole"), {"all": 0}
    more = [*arguments, "--output_dir", str(folder), "--top_k", "1"]
    monkeypatch.setattr(MemoryReader, "answer", counted(MemoryReader.answer, counts, 8))
    assert main([*more, "--overwrite"]) == 130
    assert {name: (folder / name).read_text() for name in COMPARED} == {name: uninterrupted[name] for name in COMPARED}
    assert main([*more, *flag]) == 0
    # 5 batches for each of 5 systems that read memories, and the one that was interrupted.
    assert counts["all"] == 5 * 5 + 1
    assert json.loads((folder / "results.json").read_text())["settings"]["top_k"] == 1


def test_a_corrected_list_of_systems_goes_on_with_what_is_done(tmp_path, arguments, uninterrupted, monkeypatch):
    out, counts = tmp_path / "out", {"all": 0}
    monkeypatch.setattr(MemoryReader, "answer", counted(MemoryReader.answer, counts, 14))
    for systems, code in (("clara,bm25,gold,no-memory", 130), (SYSTEMS, 0)):
        assert main([*arguments, "--systems", systems, "--output_dir", str(out)]) == code
    assert written(out) == uninterrupted and counts["all"] == 5 * 5 + 1


@pytest.mark.slow
def test_a_killed_run_goes_on_and_ends_in_the_same_files(tmp_path, arguments, uninterrupted):
    out = tmp_path / "out"
    command = [sys.executable, str(ROOT / "eval/run.py"), *arguments, "--output_dir", str(out)]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    journal = out / "unfinished" / "answers" / "data" / "clara.0.jsonl"
    try:
        deadline = time.monotonic() + 240
        while not journal.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.02)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert journal.exists() and not (out / "results.json").exists()
    # What a kill in the middle of a write leaves.
    journal.write_bytes(journal.read_bytes() + b'{"id": "4", "predic')
    assert main([*arguments, "--output_dir", str(out)]) == 0
    assert written(out) == uninterrupted


def evaluate(rank, arguments, folder):
    with open(folder / f"told{rank}", "w") as told, contextlib.redirect_stdout(told):
        return main(arguments)


@pytest.mark.slow
def test_two_processes_give_what_one_gives(tmp_path, arguments, uninterrupted):
    out = tmp_path / "out"
    codes = in_processes(2, evaluate, tmp_path, [*arguments, "--output_dir", str(out)], tmp_path)
    assert codes == [0, 0]
    told = "".join((tmp_path / f"told{rank}").read_text() for rank in range(2))
    assert told.count("cost per question") == 1
    assert written(out) == uninterrupted


# The journal


def test_half_a_line_is_not_read_and_cut_off_by_the_next_append(tmp_path):
    journal = Journal(tmp_path, "clara")
    journal.append([{"id": "1", "x": "東京"}, {"id": "2"}])
    content = journal.path.read_bytes()
    for end in range(len(content) - 10, len(content)):
        journal.path.write_bytes(content[:end])
        again = Journal(tmp_path, "clara")
        assert again.read() == {"1": {"id": "1", "x": "東京"}}
        again.append([{"id": "3"}])
        assert Journal(tmp_path, "clara").read().keys() == {"1", "3"}


def test_reading_joins_the_files_of_all_processes_but_not_those_of_other_names(tmp_path):
    Journal(tmp_path, "clara", 0).append([{"id": "1"}])
    Journal(tmp_path, "clara", 1).append([{"id": "2"}])
    Journal(tmp_path, "clara.x", 0).append([{"id": "3"}])
    assert Journal(tmp_path, "clara").read().keys() == {"1", "2"}


def test_a_damaged_line_is_named(tmp_path):
    journal = Journal(tmp_path, "clara")
    journal.append([{"id": "1"}])
    journal.path.write_bytes(b"no json\n" + journal.path.read_bytes())
    with pytest.raises(JournalError, match="clara.0.jsonl, line 1 is damaged: delete that line, or the file"):
        journal.read()
