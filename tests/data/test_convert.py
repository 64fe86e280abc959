"""Published formats in, the schema out; every malformed row by its number."""

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets
import pytest

from clara_hf.data.candidates import main as build_pools
from clara_hf.data.convert import Conversion, main
from clara_hf.data.converters import CONVERTERS
from clara_hf.data.files import write_jsonl
from clara_hf.data.schema import load_examples, load_scp
from clara_hf.data.sources import read_rows


ROOT = Path(__file__).parents[2]
HOTPOT = {
    "_id": "5a7a",
    "question": "Were both of them Danish?",
    "answer": "yes",
    "type": "comparison",
    "level": "hard",
    "supporting_facts": [["Ann", 0], ["Tom &amp; Jim", 1], ["Ann", 1]],
    "context": [
        ["Bo", ["Bo is a place.", " It is small."]],
        ["Tom &amp; Jim", ["They are two.", " They\u00a0sing."]],
        ["Ann", ["Ann is one."]],
        ["Empty", []],
    ],
}
HOTPOT_DOCS = ["Bo\nBo is a place. It is small.", "Tom & Jim\nThey are two. They sing.", "Ann\nAnn is one.", "Empty"]
HUB_HOTPOT = {
    **{name: HOTPOT[name] for name in ("question", "answer", "type", "level")},
    "id": "5a7a",
    "supporting_facts": {"title": ["Ann", "Tom &amp; Jim"], "sent_id": [0, 1]},
    "context": {"title": [pair[0] for pair in HOTPOT["context"]], "sentences": [pair[1] for pair in HOTPOT["context"]]},
}
MUSIQUE = {
    "id": "3hop1__12_34_56",
    "question": "Where?",
    "answer": "Stanley",
    "answer_aliases": ["Stan", "Stanley"],
    "answerable": True,
    "paragraphs": [
        {"idx": 0, "title": "A", "paragraph_text": "About a.", "is_supporting": False},
        {"idx": 1, "title": "B", "paragraph_text": "About b.", "is_supporting": True},
        {"idx": 2, "title": "A", "paragraph_text": "About  a.", "is_supporting": True},
        {"idx": 3, "title": "C", "paragraph_text": "About c.", "is_supporting": True},
    ],
}
ORACLE = {
    "question": "who said it",
    "answers": ["Karl Marx"],
    "ctxs": [
        {"id": "1", "title": "T", "text": "He did.", "isgold": False, "hasanswer": True},
        {"id": "2", "title": "", "text": "She did.", "isgold": True},
    ],
}
KILT = {
    "id": "k1",
    "input": "who said it",
    "output": [
        {"answer": "Karl", "provenance": [{"wikipedia_id": "290", "title": "X", "start_paragraph_id": 3}]},
        {"answer": "Marx", "provenance": [{"wikipedia_id": "290"}, {"wikipedia_id": 77}]},
        {"provenance": [{"wikipedia_id": "8"}]},
        {"answer": "Karl"},
    ],
    "meta": {},
}


def run(tmp_path, form, rows, *arguments):
    write_jsonl(tmp_path / "in.jsonl", rows)
    output = str(tmp_path / "out.jsonl")
    given = ["--format", form, "--input", str(tmp_path / "in.jsonl"), "--output", output, *arguments]
    return main(given), output


def converted(tmp_path, form, row, *arguments):
    code, output = run(tmp_path, form, [row], *arguments)
    assert code == 0
    ((_, result),) = read_rows(output)
    return result


@pytest.mark.parametrize("row", [HOTPOT, HUB_HOTPOT])
@pytest.mark.parametrize("form", ["hotpotqa", "2wikimultihopqa"])
def test_hotpotqa_in_both_of_its_forms(tmp_path, form, row):
    assert converted(tmp_path, form, row) == {
        "id": "5a7a",
        "question": "Were both of them Danish?",
        "answers": ["yes"],
        "docs": HOTPOT_DOCS,
        "pos_index": [1, 2],
        "type": "comparison",
        "level": "hard",
    }


def test_hotpotqa_as_it_is_distributed_is_one_array_in_one_line(tmp_path):
    (tmp_path / "dev.json").write_text(json.dumps([HOTPOT, {**HOTPOT, "_id": "2"}]))
    given = ["--format", "hotpotqa", "--input", str(tmp_path / "dev.json"), "--output", str(tmp_path / "o.jsonl.gz")]
    assert main(given) == 0
    assert [example.id for example in load_examples(tmp_path / "o.jsonl.gz")] == ["5a7a", "2"]


def test_a_parquet_file_as_on_the_hub_is_converted(tmp_path):
    datasets.Dataset.from_list([HUB_HOTPOT]).to_parquet(str(tmp_path / "a.parquet"))
    given = ["--format", "hotpotqa", "--input", str(tmp_path / "a.parquet"), "--output", str(tmp_path / "o.jsonl")]
    assert main(given) == 0 and load_examples(tmp_path / "o.jsonl")[0].docs == HOTPOT_DOCS


def test_the_answer_entitys_other_names_are_accepted(tmp_path):
    write_jsonl(
        tmp_path / "aliases.json",
        [
            {"Q_id": "Q1", "aliases": ["Cork City", "Cork", ""], "demonyms": ["Corkonian"]},
            {"Q_id": "Q2", "aliases": ["x"]},
        ],
    )
    given = ["--aliases", str(tmp_path / "aliases.json")]
    row = {**HOTPOT, "answer": "Cork", "answer_id": "Q1"}
    assert converted(tmp_path, "2wikimultihopqa", row, *given)["answers"] == ["Cork", "Cork City", "Corkonian"]
    (tmp_path / "aliases.json").write_text('{"Q_id": "Q1"}\n{"aliases": []}\n')
    code, _ = run(tmp_path, "2wikimultihopqa", [row], *given, "--overwrite")
    assert code == 2


def test_musique_has_aliases_hops_and_no_repeated_paragraph(tmp_path):
    assert converted(tmp_path, "musique", MUSIQUE) == {
        "id": "3hop1__12_34_56",
        "question": "Where?",
        "answers": ["Stanley", "Stan"],
        "docs": ["A\nAbout a.", "B\nAbout b.", "C\nAbout c."],
        "pos_index": [0, 1, 2],
        "type": "3hop1",
    }


def test_nq_open_gives_questions_and_with_contexts_candidates(tmp_path):
    plain = {"question": "who said it", "answer": ["Karl Marx", "Marx"]}
    assert converted(tmp_path, "nq-open", plain) == {
        "id": "1",
        "question": "who said it",
        "answers": ["Karl Marx", "Marx"],
    }
    full = converted(tmp_path, "nq-open", ORACLE, "--overwrite")
    assert (full["docs"], full["pos_index"]) == (["T\nHe did.", "She did."], [1])


def test_kilt_gives_questions_whose_positives_are_pages(tmp_path):
    row = {"id": "k1", "question": "who said it", "answers": ["Karl", "Marx"], "positives": ["290", "77", "8"]}
    assert converted(tmp_path, "kilt", KILT) == row


def test_questions_without_candidates_go_on_to_the_pools(tmp_path):
    run(tmp_path, "kilt", [KILT])
    write_jsonl(tmp_path / "c.jsonl", [{"id": str(name), "text": f"Passage {name}."} for name in range(300)])
    given = ["--questions", str(tmp_path / "out.jsonl"), "--corpus", str(tmp_path / "c.jsonl")]
    assert build_pools([*given, "--output", str(tmp_path / "pools.jsonl")]) == 0
    (example,) = load_examples(tmp_path / "pools.jsonl")
    assert sorted(example.gold) == ["Passage 290.", "Passage 77.", "Passage 8."] and len(example.docs) == 20


@pytest.mark.parametrize("docs", ["docs", "context", "content"])
@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ({"answer": "Mara"}, ["Mara"]),
        ({"answers": ["Mara", "M."]}, ["Mara", "M."]),
        ({"golden_answers": ["Mara"]}, ["Mara"]),
        ({"gold_answer": "Mara"}, ["Mara"]),
        ({"answer": "Mara", "golden_answers": ["x"]}, ["Mara"]),
    ],
)
def test_the_releases_questions_under_all_their_names(tmp_path, docs, answer, expected):
    row = {"question": "Who?", docs: ["a", "b"], **answer, "pos_index": [1], "data_type": "qa"}
    expected = {"id": "1", "question": "Who?", "answers": expected, "docs": ["a", "b"], "pos_index": [1]}
    assert converted(tmp_path, "release", row) == expected
    assert converted(tmp_path, "release", {**row, "pos_index": []}, "--overwrite").get("pos_index") is None


def test_a_passage_that_a_question_of_the_release_has_twice_is_kept_once(tmp_path):
    row = {"question": "Who?", "docs": ["a", "b", "a", "c"], "answer": "x", "pos_index": [2, 3], "data_type": "qa"}
    example = converted(tmp_path, "release", row)
    assert (example["docs"], example["pos_index"]) == (["a", "b", "c"], [0, 2])


def test_the_releases_first_stage_stays_the_first_stage(tmp_path):
    pairs = {"data_type": "qa", "question": ["Who?", "Where?"], "answers": ["Mara", "Here"], "docs": ["d"]}
    paraphrase = {"data_type": "paraphrase", "question": "ignored", "answers": ["p"], "docs": ["d"]}
    code, output = run(tmp_path, "release", [pairs, paraphrase, {**pairs, "question": ["Who?"]}], "--skip_malformed")
    assert code == 0 and load_scp(output) == [pairs, {**paraphrase, "question": []}]


# What is broken, and what is left out


def without(row, name):
    return {key: value for key, value in row.items() if key != name}


@pytest.mark.parametrize(
    ("form", "row", "message"),
    [
        ("hotpotqa", without(HOTPOT, "answer"), "the field 'answer' is missing"),
        ("hotpotqa", without(HOTPOT, "_id"), "the field '_id' or 'id' is missing"),
        ("hotpotqa", without(HOTPOT, "context"), "the field 'context' is missing"),
        ("hotpotqa", {**HOTPOT, "context": ["x"]}, "'context' must be a list of pairs (title, sentences), but is"),
        ("hotpotqa", {**HOTPOT, "context": [["A", "x"]]}, "'context sentences' must be a list of strings, but"),
        ("hotpotqa", {**HOTPOT, "context": [[1, []]]}, "'context title' must be a string, but is 1"),
        ("hotpotqa", {**HOTPOT, "supporting_facts": {"title": ["A"]}}, "'supporting_facts.sent_id' must be a list of"),
        ("hotpotqa", {**HOTPOT, "supporting_facts": [[["A"], 0]]}, "'supporting_facts title' must be a string, but"),
        ("hotpotqa", {**HOTPOT, "question": " "}, "'question' is empty"),
        ("hotpotqa", HOTPOT, "id '5a7a' is already used in line 1"),
        ("2wikimultihopqa", {**HOTPOT, "answer": 3}, "'answers[0]' must be a string, but is 3"),
        ("musique", without(MUSIQUE, "paragraphs"), "the field 'paragraphs' is missing"),
        ("musique", {**MUSIQUE, "paragraphs": {}}, "'paragraphs' must be a list of objects, but is {}"),
        ("musique", {**MUSIQUE, "paragraphs": [{"title": "A"}]}, "'paragraphs[0].paragraph_text' must be a string"),
        ("musique", {**MUSIQUE, "answer_aliases": "Stan"}, "'answer_aliases' must be a list of strings"),
        ("nq-open", {"question": "who", "answer": []}, "'answer' is an empty list"),
        ("nq-open", {"question": "who", "answer": "x"}, "'answer' must be a list of strings, but is \"x\""),
        ("nq-open", {"answer": ["x"]}, "the field 'question' is missing"),
        ("nq-open", {**ORACLE, "ctxs": [{"title": "x"}]}, "'ctxs[0].text' must be a string, but is null"),
        ("kilt", without(KILT, "output"), "the field 'output' is missing"),
        ("kilt", {**KILT, "output": [{"provenance": [{}]}]}, "every provenance in 'output' needs a 'wikipedia_id'"),
        ("kilt", {**KILT, "output": [{"provenance": 3}]}, "'provenance' must be a list of objects, but is 3"),
        ("kilt", {**KILT, "output": []}, "'answers' is an empty list"),
        ("kilt", {**KILT, "output": [{"answer": ["x"]}]}, "'answer' must be a list of strings, but is [["),
        ("release", {"question": "Who?", "answer": "x"}, "one of 'docs', 'context' and 'content' must be a list"),
        ("release", {"question": "Who?", "docs": ["d"]}, "the field 'answer' or 'answers' or 'golden_answers' or"),
        ("release", {"question": "Who?", "docs": ["d"], "answer": "x", "pos_index": [1]}, "gold index 1 in"),
    ],
)
def test_every_malformed_row_is_named_and_nothing_is_written(tmp_path, capsys, form, row, message):
    good = {
        "musique": MUSIQUE,
        "nq-open": ORACLE,
        "kilt": KILT,
        "release": {"question": "Who?", "docs": ["d"], "answer": "x"},
    }.get(form, HOTPOT)
    if "already used" not in message:
        row = {**row, **{name: "other" for name in ("id", "_id") if name in row}}
    third = {**row, **{name: "third" for name in ("id", "_id") if name in row and "already used" not in message}}
    code, output = run(tmp_path, form, [good, row, third])
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith(str(tmp_path))]
    expected = [f"{tmp_path / 'in.jsonl'}, line {number}: {message}" for number in (2, 3)]
    assert code == 2 and len(lines) == len(expected)
    assert all(line.startswith(start) for line, start in zip(lines, expected, strict=True))
    assert not os.path.exists(output) and os.listdir(tmp_path) == ["in.jsonl"]
    code, output = run(tmp_path, form, [good, row], "--skip_malformed")
    assert code == 0 and len(list(read_rows(output))) == 1


def test_lines_that_are_no_json_are_named_beside_the_others(tmp_path, capsys):
    path = tmp_path / "in.jsonl"
    path.write_text(f'{json.dumps(HOTPOT)}\nnot json\n{{"_id": "x"}}\n')
    given = ["--format", "hotpotqa", "--input", str(path), "--output", str(tmp_path / "out.jsonl")]
    assert main(given) == 2
    error = capsys.readouterr().err
    assert f"{path}, line 2: malformed JSON" in error and f"{path}, line 3: the field 'context' is missing" in error
    assert "2 malformed, nothing was written" in error


def test_sound_rows_without_place_in_an_evaluation_are_counted(tmp_path, capsys):
    elsewhere = {**HOTPOT, "_id": "2", "supporting_facts": [["Not there", 0]]}
    assert run(tmp_path, "hotpotqa", [HOTPOT, elsewhere])[0] == 0
    assert "1 rows left out: a supporting paragraph is not in the context." in capsys.readouterr().err
    assert run(tmp_path, "musique", [{**MUSIQUE, "answerable": False}], "--overwrite")[0] == 2
    error = capsys.readouterr().err
    assert "1 rows left out: the question is not answerable." in error and "there is no row to write" in error


def test_the_command_refuses_to_replace_and_works_from_any_folder(tmp_path):
    write_jsonl(tmp_path / "in.jsonl", [HOTPOT])
    command = [sys.executable, str(ROOT / "eval/convert.py"), "--format", "hotpotqa"]
    command += ["--input", "in.jsonl", "--output", "out.jsonl"]
    first, second = (subprocess.run(command, cwd=tmp_path, capture_output=True, text=True) for _ in range(2))
    assert first.returncode == 0 and first.stdout == "out.jsonl: 1 rows.\n"
    assert second.returncode == 2 and "out.jsonl is there already: give another --output" in second.stderr


def changes(value):
    """The value with each part of it, at any depth, replaced by things that do not belong there."""
    yield from (None, 3, True, "x", "", "\ud800", [], {}, [None], [[]], [["x"]], {"x": 1}, ["x", 2])
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in parts:
        for changed in changes(part):
            copy = dict(value) if isinstance(value, dict) else list(value)
            copy[key] = changed
            yield copy


@pytest.mark.parametrize(
    ("form", "row"),
    [("hotpotqa", HOTPOT), ("hotpotqa", HUB_HOTPOT), ("musique", MUSIQUE), ("nq-open", ORACLE), ("kilt", KILT)]
    + [("release", {"question": "Who?", "docs": ["a"], "answers": ["b"], "pos_index": [0], "data_type": "qa"})],
)
def test_whatever_is_wrong_with_a_row_is_one_sentence(tmp_path, form, row):
    rows = [changed for changed in changes(row) if isinstance(changed, dict)]
    for number, changed in enumerate(rows):
        changed.update(
            {name: f"row {number}" for name in ("id", "_id") if name in row and changed.get(name) == row[name]}
        )
    source = tmp_path / "rows.json"
    source.write_text(json.dumps(rows))
    conversion = Conversion(str(source), CONVERTERS[form])
    sound = list(conversion)
    assert len(conversion.errors) > 50 and len(sound) > 10
    assert all("\n" not in error and ", item " in error for error in conversion.errors)
    write_jsonl(tmp_path / "sound.jsonl", sound)
    assert len(list(read_rows(tmp_path / "sound.jsonl"))) == len(sound)
    assert len(sound) + len(conversion.errors) + sum(conversion.left_out.values()) == len(rows)
