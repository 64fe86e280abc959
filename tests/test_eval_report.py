"""Bootstrap intervals, tables, and what a failed write leaves behind."""

import json
from pathlib import Path

import numpy as np
import pytest

from eval import report
from eval.data import QAExample
from eval.report import (
    bootstrap_interval,
    dataset_results,
    format_tables,
    holds_run,
    read_results,
    summarize,
    write_run,
)


def number(value, low, high, n):
    return {"value": value, "low": low, "high": high, "n": n}


RESULTS = {
    "systems": {
        "clara": {"f1": number(0.8125, 0.75, 0.87, 40), "recall@1": number(1, 1, 1, 30), "mrr": number(1, 1, 1, 30)},
        "no-memory": {"f1": number(0, 0, 0, 40)},
    },
    "seconds": 1.0,
    "settings": {"seed": 0},
}


def test_the_interval_of_a_share_is_that_of_the_binomial():
    shares = np.repeat([[1.0], [0.0]], 500, axis=0)
    (low,), (high,) = bootstrap_interval(shares, seed=0)
    expected = 1.96 * np.sqrt(0.25 / 1000)
    assert low == pytest.approx(0.5 - expected, abs=0.004) and high == pytest.approx(0.5 + expected, abs=0.004)


def test_intervals_cover_the_mean_as_often_as_they_say():
    chance = np.random.default_rng(0)
    samples = chance.normal(size=(100, 300)) ** 2
    low, high = bootstrap_interval(samples, seed=1)
    assert 0.88 <= np.mean((low <= 1) & (high >= 1)) <= 0.98


def test_intervals_depend_on_the_seed_and_on_nothing_else(monkeypatch):
    values = np.random.default_rng(0).random((50, 3))
    first = np.stack(bootstrap_interval(values, seed=3))
    assert (first == np.stack(bootstrap_interval(values, seed=3))).all()
    assert not (first == np.stack(bootstrap_interval(values, seed=4))).all()
    alone = np.stack(bootstrap_interval(values[:, 1:2], seed=3))
    assert alone[:, 0] == pytest.approx(first[:, 1])
    monkeypatch.setattr(report, "BLOCK", 50 * 7)
    assert np.stack(bootstrap_interval(values, seed=3)) == pytest.approx(first, abs=0.02)


def test_equal_values_have_an_interval_without_width():
    low, high = bootstrap_interval(np.ones((7, 1)), seed=0)
    assert low == high == 1
    with pytest.raises(ValueError, match="no value"):
        bootstrap_interval(np.ones((0, 1)), seed=0)


def test_a_metric_is_summarized_over_the_records_that_have_it():
    records = [
        {"scores": {"em": 1.0, "f1": 1.0, "mrr": 0.5}},
        {"scores": {"em": 0.0, "f1": 0.5}},
        {"scores": {}},
    ]
    summary = summarize(records, seed=0)
    assert {name: (entry["value"], entry["n"]) for name, entry in summary.items()} == {
        "em": (0.5, 2),
        "f1": (0.75, 2),
        "mrr": (0.5, 1),
    }
    assert all(entry["low"] <= entry["value"] <= entry["high"] for entry in summary.values())


def test_types_are_summarized_apart():
    kinds = ["single", "two-hop", "two-hop", None]
    examples = [QAExample(str(i), "q", ["a"], ["d"], None, kind) for i, kind in enumerate(kinds)]
    records = {"gold": [{"scores": {"f1": float(i)}} for i in range(4)]}
    results = dataset_results(examples, records, seed=0)
    assert results["systems"]["gold"]["f1"]["n"] == 4
    assert list(results["by_type"]) == ["single", "two-hop"]
    assert results["by_type"]["two-hop"]["gold"]["f1"] | {"low": 1, "high": 2} == number(1.5, 1, 2, 2)
    untyped = [QAExample("1", "q", ["a"], ["d"])]
    assert "by_type" not in dataset_results(untyped, {"gold": records["gold"][:1]}, seed=0)


def test_the_terminal_table_is_aligned_and_says_what_is_missing():
    lines = format_tables(RESULTS).splitlines()
    assert lines[:4] == [
        "system                    F1                   R@1        n",
        "─────────  ─────────────────  ────────────────────  ───────",
        "clara      81.2 [75.0, 87.0]  100.0 [100.0, 100.0]  40 / 30",
        "no-memory     0.0 [0.0, 0.0]                     –   40 / –",
    ]


def test_the_markdown_table_has_as_many_cells_in_every_row_and_a_heading_per_part():
    text = format_tables({"datasets": {"nano": {**RESULTS, "by_type": {"single": RESULTS["systems"]}}}}, markdown=True)
    rows = [line for line in text.splitlines() if line.startswith("|")]
    assert len(rows) == 8 and len({row.count("|") for row in rows}) == 1
    assert [line for line in text.splitlines() if line.startswith("#")] == ["## nano", "## nano, type single"]


def records(text):
    return {"nano": {"clara": [{"id": "1", "prediction": text}]}}


def test_a_run_is_written_whole_and_replaces_all_of_the_earlier_one(tmp_path):
    assert not holds_run(tmp_path) and read_results(tmp_path) is None
    write_run(tmp_path, RESULTS, {"nano": {"old": []}})
    write_run(tmp_path, RESULTS, records("東京"))
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")) == [
        *("predictions", "predictions/clara.jsonl", "results.json", "table.md"),
    ]
    assert read_results(tmp_path) == RESULTS and holds_run(tmp_path)
    assert json.loads((tmp_path / "predictions/clara.jsonl").read_text(encoding="utf-8"))["prediction"] == "東京"


def test_several_data_files_have_a_folder_each(tmp_path):
    write_run(tmp_path, {"datasets": {"a": RESULTS, "b": RESULTS}}, {"a": {"bm25": []}, "b": {"bm25": []}})
    assert (tmp_path / "predictions/a/bm25.jsonl").exists() and (tmp_path / "predictions/b/bm25.jsonl").exists()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_the_earlier_run_as_it_was(tmp_path, monkeypatch, error):
    write_run(tmp_path, RESULTS, records("earlier"))
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    write_text = Path.write_text

    def fail_at_results(path, *arguments, **options):
        if path.name == "results.json":
            raise error
        return write_text(path, *arguments, **options)

    monkeypatch.setattr(Path, "write_text", fail_at_results)
    with pytest.raises(type(error)):
        write_run(tmp_path, RESULTS, records("later"))
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
