"""What a run leaves in its folder: whole results, or those of an earlier run as they were."""

import json
import random
from pathlib import Path

import pytest

from clara_hf.evaluation.plan import UsageError
from clara_hf.evaluation.results import Results
from clara_hf.metrics.retrieval_recall.retrieval_recall import score_ranking


FOUND = {"systems": {"clara": {"f1": {"value": 0.5, "low": 0.4, "high": 0.6, "n": 10}}}}
REST = {"checkpoints": {}, "seconds": 1.0, "settings": {"seed": 0, "data": "x/nano.jsonl.gz"}}


def results(records, **datasets):
    return Results({"datasets": datasets or {"nano": FOUND}, **REST}, records)


def records(text):
    return {"nano": {"clara": [{"id": "1", "prediction": text}]}}


def test_a_run_is_written_whole_and_replaces_all_of_the_earlier_one(tmp_path):
    assert Results.load(tmp_path) is None
    results({"nano": {"old": []}}).save(tmp_path)
    results(records("東京")).save(tmp_path)
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")) == [
        *("costs.csv", "costs.md", "predictions", "predictions/clara.jsonl", "results.json", "table.csv", "table.md"),
    ]
    assert Results.load(tmp_path) == results(records("東京"))
    assert json.loads((tmp_path / "predictions/clara.jsonl").read_text(encoding="utf-8"))["prediction"] == "東京"


def test_several_data_files_have_a_folder_each(tmp_path):
    results({"a": {"bm25": []}, "b": {"bm25": []}}, a=FOUND, b=FOUND).save(tmp_path)
    assert (tmp_path / "predictions/a/bm25.jsonl").exists() and (tmp_path / "predictions/b/bm25.jsonl").exists()


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_write_that_fails_leaves_the_earlier_run_as_it_was(tmp_path, monkeypatch, error):
    results(records("earlier")).save(tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    write_text = Path.write_text

    def fail_at_results(path, *arguments, **options):
        if path.name.startswith("results.json"):
            raise error
        return write_text(path, *arguments, **options)

    monkeypatch.setattr(Path, "write_text", fail_at_results)
    with pytest.raises(type(error)):
        results(records("later")).save(tmp_path)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_systems_with_names_have_files_of_their_own(tmp_path):
    results({"nano": {"bi-encoder BAAI/bge-small": [], "bi-encoder /x/y z": []}}).save(tmp_path)
    names = sorted(path.name for path in (tmp_path / "predictions").iterdir())
    assert names == ["bi-encoder-BAAI-bge-small.jsonl", "bi-encoder-x-y-z.jsonl"]


@pytest.mark.parametrize(
    "content", ['{"systems": {', "[]", '{"datasets": {"../x": {"systems": {}}}}', '{"datasets": {"x": 3}}']
)
def test_a_damaged_results_file_is_one_sentence(tmp_path, content):
    (tmp_path / "results.json").write_text(content)
    with pytest.raises(UsageError, match="--overwrite") as caught:
        Results.load(tmp_path)
    assert str(tmp_path / "results.json") in str(caught.value) and "\n" not in str(caught.value)


def test_the_layout_of_earlier_versions_is_read(tmp_path):
    (tmp_path / "results.json").write_text(json.dumps({**FOUND, **REST, "stage_seconds": {"scp": 1}}))
    (tmp_path / "predictions").mkdir()
    (tmp_path / "predictions/clara.jsonl").write_text(json.dumps(records("x")["nano"]["clara"][0]) + "\n")
    found = Results.load(tmp_path)
    assert found.data == {"datasets": {"nano": FOUND}, **REST, "stage_seconds": {"scp": 1}}
    assert found.records == records("x")


def test_numbers_are_named_by_system_and_metric_and_by_file_where_there_are_several():
    assert (
        results({}).metrics() == {"clara_f1": 0.5} == results({}).metrics(["f1"]) and results({}).metrics(["em"]) == {}
    )
    assert results({}, a=FOUND, b=FOUND).metrics() == {"a_clara_f1": 0.5, "b_clara_f1": 0.5}


def test_trec_tools_see_the_measured_order_also_among_equal_scores(tmp_path):
    ir = pytest.importorskip("ir_measures")
    chance, rows = random.Random(0), {"scored": [], "ordered": []}
    for number in range(50):
        order = chance.sample(range(9), 9)
        scores = sorted((chance.choice([0.5, 0.25, 0.1]) for _ in order), reverse=True)
        row = {"id": f"q{number}", "pos_index": chance.sample(range(9), 2), "ranking": order}
        rows["scored"].append({**row, "candidate_scores": scores})
        rows["ordered"].append({**row, "candidate_scores": None})
    results({"nano": {**rows, "gold": [{**row, "ranking": None} for row in rows["ordered"]]}}).to_trec(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ordered.run", "qrels.txt", "scored.run"]
    expected = [score_ranking(row["ranking"], row["pos_index"], (1, 5)) for row in rows["scored"]]
    names = {ir.R @ 1: "recall@1", ir.R @ 5: "recall@5", ir.nDCG @ 5: "ndcg@5", ir.RR: "mrr"}
    qrels = list(ir.read_trec_qrels(str(tmp_path / "qrels.txt")))
    for system in ("scored", "ordered"):
        found = ir.calc_aggregate(list(names), qrels, ir.read_trec_run(str(tmp_path / f"{system}.run")))
        for measure, name in names.items():
            assert found[measure] == pytest.approx(sum(score[name] for score in expected) / 50)


def test_an_id_that_the_trec_format_cannot_hold_is_named(tmp_path):
    row = {"id": "a b", "pos_index": [0], "ranking": [0], "candidate_scores": [1.0]}
    with pytest.raises(ValueError, match="'a b'"):
        results({"nano": {"bm25": [row]}}).to_trec(tmp_path)
    assert list(tmp_path.iterdir()) == []
