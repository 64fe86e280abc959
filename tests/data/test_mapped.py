"""Training rows: memory-mapped, cached by content, and what they are checked for."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from clara_hf.data.files import DataError, write_jsonl
from clara_hf.data.mapped import distinct_texts, shared_questions, training_rows
from clara_hf.data.schema import iter_examples
from clara_hf.data.sources import digest_of, is_digest_of


ROWS = [{"question": f"Who {n}?", "answers": ["a", "b"], "docs": [f"d{n}", "same"], "pos_index": [0]} for n in range(9)]
SCP = [{"data_type": "qa", "question": ["Q?"], "answers": ["A"], "docs": ["d"]}] * 3


def test_rows_are_mapped_from_the_cache_and_limited(tmp_path):
    write_jsonl(
        tmp_path / "q.jsonl", [{**ROWS[0], "target": "b"}, {**ROWS[1], "target": "c", "pos_index": []}, *ROWS[2:]]
    )
    rows = training_rows(tmp_path / "q.jsonl", limit=3, cache_dir=tmp_path / "cache")
    assert rows["answers"][:] == [["b", "a"], ["c", "a", "b"], ["a", "b"]] and rows["id"][:] == ["1", "2", "3"]
    plain = training_rows(tmp_path / "q.jsonl", limit=3, targets=False, cache_dir=tmp_path / "cache")
    assert plain["answers"][:] == [["a", "b"]] * 3
    assert rows["pos_index"][:] == [[0], [], [0]] and rows["docs"][2] == ["d2", "same"]
    assert (
        all(Path(file["filename"]).is_relative_to(tmp_path / "cache") for file in rows.cache_files) and rows.cache_files
    )
    assert len(training_rows(tmp_path / "q.jsonl", cache_dir=tmp_path / "cache")) == 9
    write_jsonl(tmp_path / "s.jsonl", SCP)
    assert training_rows(tmp_path / "s.jsonl", "scp", cache_dir=tmp_path / "cache").to_list() == SCP


def test_a_file_is_read_once_until_what_it_holds_changes(tmp_path, monkeypatch):
    reads = []
    monkeypatch.setattr("clara_hf.data.mapped.iter_examples", lambda *a, **k: reads.append(a) or iter_examples(*a, **k))
    path = tmp_path / "q[1].jsonl"
    for rows, expected in ((ROWS, 1), (ROWS, 1), (ROWS[:4], 2)):
        write_jsonl(path, rows)
        assert len(training_rows(path, cache_dir=tmp_path / "cache")) == len(rows) and len(reads) == expected
    before = os.stat(path)
    path.write_bytes(path.read_bytes().replace(b"Who 0?", b"Who X?"))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert training_rows(path, cache_dir=tmp_path / "cache")[0]["question"] == "Who X?"


def test_a_broken_row_is_named_and_leaves_nothing_in_the_cache(tmp_path):
    write_jsonl(tmp_path / "q.jsonl", [*ROWS, {"question": "Who?"}])
    for _ in range(2):
        with pytest.raises(DataError, match=r"q\.jsonl, line 10: .*'answers'") as told:
            training_rows(tmp_path / "q.jsonl", cache_dir=tmp_path / "cache")
        chain = [told.value]
        while (cause := chain[-1].__cause__ or chain[-1].__context__) is not None:
            assert cause not in chain, "no error is its own cause"
            chain.append(cause)
    assert len(training_rows(tmp_path / "q.jsonl", limit=9, cache_dir=tmp_path / "cache")) == 9
    with pytest.raises(DataError, match=r"none\.jsonl"):
        training_rows(tmp_path / "none.jsonl")
    with pytest.raises(ValueError, match="'rows'.*questions, labelled, scp"):
        training_rows(tmp_path / "q.jsonl", "rows")


def test_each_text_comes_once_with_its_row(tmp_path, monkeypatch):
    monkeypatch.setattr("clara_hf.data.mapped.WRITTEN_ROWS", 2)
    write_jsonl(tmp_path / "q.jsonl", ROWS)
    rows = training_rows(tmp_path / "q.jsonl", cache_dir=tmp_path / "cache")
    assert list(distinct_texts(rows, "docs")) == [(n + 1, [f"d{n}", *["same"][: n == 0]]) for n in range(9)]
    assert list(distinct_texts(rows, "question")) == [(n + 1, [f"Who {n}?"]) for n in range(9)]


def test_questions_that_two_files_share_are_counted(tmp_path):
    other = [{**ROWS[0], "docs": ["x"]}, {**ROWS[5], "question": " who  5? "}, {**ROWS[5], "question": "New?"}]
    for name, rows in {"a": ROWS, "b": other}.items():
        write_jsonl(tmp_path / f"{name}.jsonl", rows)
    train, validation = (training_rows(tmp_path / f"{name}.jsonl", cache_dir=tmp_path / "c") for name in "ab")
    assert shared_questions(train, validation) == 2 and shared_questions(train, train) == 9


def test_a_digest_changes_with_name_and_content_and_older_ones_are_recognised(tmp_path):
    write_jsonl(tmp_path / "a.jsonl", ROWS)
    write_jsonl(tmp_path / "b.jsonl", ROWS)
    found = digest_of(tmp_path / "a.jsonl")
    older = digest_of(tmp_path / "a.jsonl", "sha256")
    assert found.startswith("xxh3:") and len(older) == 64 and found != digest_of(tmp_path / "b.jsonl")
    assert is_digest_of(found, tmp_path / "a.jsonl") and is_digest_of(older, tmp_path / "a.jsonl")
    folder = digest_of(tmp_path)
    write_jsonl(tmp_path / "a.jsonl", ROWS[1:])
    assert not is_digest_of(found, tmp_path / "a.jsonl") and not is_digest_of(older, tmp_path / "a.jsonl")
    assert folder != digest_of(tmp_path)


def test_reading_data_imports_no_torch():
    modules = [f"clara_hf.data.{path.stem}" for path in Path(__file__).parents[2].glob("clara_hf/data/[a-z]*.py")]
    code = f"import importlib, sys\nfor name in {modules}: importlib.import_module(name)\nprint('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert len(modules) > 8 and done.stdout == "False\n"


@pytest.mark.slow
def test_rows_larger_than_the_memory_are_read_checked_and_mapped(tmp_path):
    """138 MB of text under a limit of 100 MB for what the process allocates: its file is mapped, its rows pass by."""
    with open(tmp_path / "q.jsonl", "w") as file:
        for number in range(1600):
            file.write(
                json.dumps({"question": f"Q {number}?", "answers": ["a"], "docs": [f"{number} " * 20_000]}) + "\n"
            )
    code = f"""
import resource, datasets
from clara_hf.data.mapped import distinct_texts, training_rows
now = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmData"))
resource.setrlimit(resource.RLIMIT_DATA, ((now + 100_000) * 1024,) * 2)
rows = training_rows({str(tmp_path / "q.jsonl")!r}, cache_dir={str(tmp_path / "c")!r})
print(len(rows), sum(len(text) for _, texts in distinct_texts(rows, "docs") for text in texts))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    count, size = map(int, done.stdout.split())
    assert count == 1600 and size == 137_800_000
