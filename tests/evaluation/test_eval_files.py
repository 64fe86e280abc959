"""What a run leaves in its folder: whole results, or those of an earlier run as they were."""

import json
from pathlib import Path

import pytest

from clara_hf.evaluation.files import claim_unfinished, holds_run, read_results, remove_unfinished, write_run
from clara_hf.evaluation.settings import UsageError


RESULTS = {
    "systems": {"clara": {"f1": {"value": 0.5, "low": 0.4, "high": 0.6, "n": 10}}},
    "seconds": 1.0,
    "settings": {"seed": 0},
}


def records(text):
    return {"nano": {"clara": [{"id": "1", "prediction": text}]}}


def test_a_run_is_written_whole_and_replaces_all_of_the_earlier_one(tmp_path):
    assert not holds_run(tmp_path) and read_results(tmp_path) is None
    write_run(tmp_path, RESULTS, {"nano": {"old": []}})
    write_run(tmp_path, RESULTS, records("東京"))
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")) == [
        *("costs.csv", "costs.md", "predictions", "predictions/clara.jsonl", "results.json", "table.csv", "table.md"),
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


def test_systems_with_names_have_files_of_their_own(tmp_path):
    write_run(tmp_path, RESULTS, {"nano": {"bi-encoder BAAI/bge-small": [], "bi-encoder /x/y z": []}})
    names = sorted(path.name for path in (tmp_path / "predictions").iterdir())
    assert names == ["bi-encoder-BAAI-bge-small.jsonl", "bi-encoder-x-y-z.jsonl"]


def test_an_unfinished_run_goes_on_only_with_its_own_settings(tmp_path):
    assert claim_unfinished(tmp_path, {"seed": 0}) is False
    assert claim_unfinished(tmp_path, {"seed": 0}) is True
    with pytest.raises(UsageError, match="unfinished run with other settings: give another --output_dir, or --over"):
        claim_unfinished(tmp_path, {"seed": 1})
    remove_unfinished(tmp_path)
    assert claim_unfinished(tmp_path, {"seed": 1}) is False


def test_an_unfinished_run_goes_on_with_other_systems_but_not_with_other_models(tmp_path):
    first = {"seed": 0, "systems": ["bm25", "bi-encoder a"], "sha256": {"q.jsonl": "1", "a": "2"}}
    later = {"seed": 0, "systems": ["bm25", "bi-encoder b"], "sha256": {"q.jsonl": "1", "b": "3"}}
    assert [claim_unfinished(tmp_path, record) for record in (first, later, first)] == [False, True, True]
    mark = json.loads((tmp_path / "unfinished" / "run.json").read_text())
    assert mark["systems"] == ["bm25", "bi-encoder a", "bi-encoder b"] and len(mark["sha256"]) == 3
    clash = {**first, "systems": ["text-bi-encoder a", "bi-encoder /a"]}
    for other in ({**later, "sha256": {"q.jsonl": "1", "b": "4"}}, {**later, "seed": 1}, clash):
        with pytest.raises(UsageError, match="unfinished run with other settings"):
            claim_unfinished(tmp_path, other)
    assert claim_unfinished(tmp_path, {**later, "seed": 1}, overwrite=True) is False


def test_what_half_a_removal_left_is_not_taken_for_a_part_of_the_next_run(tmp_path):
    claim_unfinished(tmp_path, {"seed": 0})
    journal = tmp_path / "unfinished" / "answers" / "nano" / "clara.0.jsonl"
    journal.parent.mkdir(parents=True)
    journal.write_text('{"id": "1", "prediction": "of seed 0"}\n')
    (tmp_path / "unfinished" / "run.json").unlink()
    assert claim_unfinished(tmp_path, {"seed": 1}) is False
    assert not journal.exists()


def test_a_damaged_results_file_is_one_sentence(tmp_path):
    (tmp_path / "results.json").write_text('{"systems": {')
    with pytest.raises(UsageError, match="results.json is damaged: delete it"):
        read_results(tmp_path)
