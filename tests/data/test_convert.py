"""Published formats in, the schema out; every malformed row by its number."""

import json
import os
import subprocess
import sys
from pathlib import Path

import conftest
import datasets
import pytest
from processes import exit_code

from clara_hf.data import convert, pools
from clara_hf.data.convert import Conversion
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
    return exit_code(convert.main, given), output


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
    assert exit_code(convert.main, given) == 0
    assert [example.id for example in load_examples(tmp_path / "o.jsonl.gz")] == ["5a7a", "2"]


def test_a_parquet_file_as_on_the_hub_is_converted(tmp_path):
    datasets.Dataset.from_list([HUB_HOTPOT]).to_parquet(str(tmp_path / "a.parquet"))
    given = ["--format", "hotpotqa", "--input", str(tmp_path / "a.parquet"), "--output", str(tmp_path / "o.jsonl")]
    assert exit_code(convert.main, given) == 0 and load_examples(tmp_path / "o.jsonl")[0].docs == HOTPOT_DOCS


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
    assert exit_code(pools.main, [*given, "--output", str(tmp_path / "pools.jsonl")]) == 0
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


@pytest.mark.parametrize("gold", [{"golden_answers": ["x", "y"]}, {"gold_answer": ["x", "y"]}, {"answers": ["x", "y"]}])
def test_the_releases_references_are_for_evaluation_and_its_generated_answer_for_training(tmp_path, gold):
    code, output = run(tmp_path, "release", [{"question": "Who?", "docs": ["d"], "answer": "It is x.", **gold}])
    (example,) = load_examples(output)
    assert code == 0 and (example.answers, example.target) == (["x", "y"], "It is x.")


DPR = {
    "dataset": "nq",
    "question": "who said it",
    "answers": ["Karl Marx"],
    "positive_ctxs": [{"title": "T", "text": "He did.", "score": 1000, "passage_id": "7"}],
    "hard_negative_ctxs": [{"title": "U", "text": "She did."}, {"title": "T", "text": "He did."}],
    "negative_ctxs": [{"title": "", "text": f"Nobody {number}."} for number in range(9)],
}
SQUAD = {
    "version": "v2.0",
    "data": [
        {
            "title": "Tom_and_Ann",
            "paragraphs": [
                {
                    "context": "Tom has an owl. Ann has a cat.",
                    "qas": [
                        {"id": "a", "question": "Who has an owl?", "answers": [{"text": "Tom", "answer_start": 0}] * 3},
                        {"id": "b", "question": "Who has a dog?", "answers": [], "is_impossible": True},
                        {"id": "c", "question": "What has Ann?", "answers": [{"text": "a cat", "answer_start": 24}]},
                    ],
                },
                {"context": "Bo sings.", "qas": [{"id": "d", "question": "Who?", "answers": [{"text": "Bo"}]}]},
            ],
        }
    ],
}
TRIVIA = {
    "Data": [
        {"Question": "Who?", "QuestionId": "t1", "Answer": {"Value": "Bo", "Aliases": ["Bob", "Bo"]}, "EntityPages": []}
    ],
    "Domain": "Web",
}
HUB_TRIVIA = {
    "question": "Who?",
    "question_id": "t1",
    "answer": {"value": "Bo", "aliases": ["Bob"], "normalized_aliases": ["bob"]},
    "entity_pages": {"title": ["Bo"], "wiki_context": ["Bo sings."], "filename": ["Bo.txt"]},
    "search_results": {"title": ["S"], "search_context": ["Found."], "rank": [0]},
}
FLASHRAG = {"id": "test_0", "question": "Who?", "golden_answers": ["Bo", "Bob"], "metadata": {}}


def test_dprs_positives_are_gold_wherever_they_come_to_lie(tmp_path):
    rows = [{**DPR, "question": f"who said {number}"} for number in range(20)]
    _, output = run(tmp_path, "dpr", [*rows, {**DPR, "positive_ctxs": []}])
    examples = load_examples(output)
    assert all(example.gold == ["T\nHe did."] and len(example.docs) == 11 for example in examples)
    assert len(examples) == 20 and len({example.pos_index[0] for example in examples}) > 5


def test_squad_gives_each_question_with_its_passage_in_both_of_its_forms(tmp_path):
    (tmp_path / "train.json").write_text(json.dumps(SQUAD, indent=1))
    given = ["--format", "squad", "--input", str(tmp_path / "train.json"), "--output", str(tmp_path / "o.jsonl")]
    assert exit_code(convert.main, given) == 0
    first, second, third = load_examples(tmp_path / "o.jsonl")
    assert [first.id, second.id, third.id] == ["a", "c", "d"] and first.answers == ["Tom"] and first.pos_index == [0]
    assert first.docs == second.docs == ["Tom and Ann\nTom has an owl. Ann has a cat."]
    hub = {"id": "a", "title": "Tom_and_Ann", "context": "Tom has an owl.", "question": "Who?"}
    row = {**hub, "answers": {"text": ["Tom", "Tom"], "answer_start": [0, 0]}}
    assert converted(tmp_path, "squad", row)["answers"] == ["Tom"]
    article = SQUAD["data"][0]
    assert run(tmp_path, "squad", [article], "--overwrite")[0] == 0
    assert [example.id for example in load_examples(tmp_path / "out.jsonl")] == ["a", "c", "d"]


def test_triviaqa_has_all_names_of_its_answer_and_the_texts_that_are_there(tmp_path):
    expected = {"id": "t1", "question": "Who?", "answers": ["Bo", "Bob"]}
    assert converted(tmp_path, "triviaqa", TRIVIA) == expected
    pool = {"docs": ["Bo\nBo sings.", "S\nFound."], "pos_index": []}
    assert converted(tmp_path, "triviaqa", HUB_TRIVIA, "--overwrite") == {**expected, **pool}


@pytest.mark.parametrize("sentences", ["sentences", "content"])
def test_flashrag_gives_questions_and_with_the_originals_paragraphs_candidates(tmp_path, sentences):
    plain = {"id": "test_0", "question": "Who?", "answers": ["Bo", "Bob"]}
    assert converted(tmp_path, "flashrag", FLASHRAG) == plain
    context = {"title": ["A", "B"], sentences: [["One.", "Two."], ["Three."]]}
    facts = {"title": ["B"], "sent_id": [0]}
    row = {**FLASHRAG, "metadata": {"type": "bridge", "context": context, "supporting_facts": facts}}
    pool = {"docs": ["A\nOne. Two.", "B\nThree."], "pos_index": [1], "type": "bridge"}
    assert converted(tmp_path, "flashrag", row, "--overwrite") == {**plain, **pool}


def test_flashrags_rows_of_musique_keep_their_paragraphs(tmp_path):
    rest = {name: MUSIQUE[name] for name in ("paragraphs", "answerable")}
    row = {"id": "f", "question": "Where?", "golden_answers": ["Stanley", "Stan"], "metadata": rest}
    found = converted(tmp_path, "flashrag", row)
    expected = converted(tmp_path, "musique", MUSIQUE, "--overwrite")
    assert (found["docs"], found["pos_index"]) == (expected["docs"], expected["pos_index"])
    assert found["answers"] == ["Stanley", "Stan"] and found["id"] == "f" and "target" not in found


def test_beirs_queries_go_with_their_qrels_to_the_pools(tmp_path):
    qrels = "query-id\tcorpus-id\tscore\nq1\t3\t1\nq1\t4\t0\nq1\t5\t2\nq2\t7\t0\n"
    (tmp_path / "test.tsv").write_text(qrels)
    queries = [{"_id": "q1", "text": "who said it", "metadata": {}}, {"_id": "q2", "text": "who"}]
    code, output = run(tmp_path, "beir", queries, "--qrels", str(tmp_path / "test.tsv"))
    ((_, row),) = read_rows(output)
    assert code == 0 and row == {"id": "q1", "question": "who said it", "answers": [], "positives": ["3", "5"]}
    write_jsonl(tmp_path / "c.jsonl", [{"_id": str(n), "title": "T", "text": f"Passage {n}."} for n in range(30)])
    given = ["--questions", output, "--corpus", str(tmp_path / "c.jsonl"), "--output", str(tmp_path / "p.jsonl")]
    assert exit_code(pools.main, given) == 0
    (example,) = load_examples(tmp_path / "p.jsonl", needs_answers=False)
    assert sorted(example.gold) == ["T\nPassage 3.", "T\nPassage 5."]


def test_2wikis_columns_may_be_json_text(tmp_path):
    texts = {name: json.dumps(HOTPOT[name]) for name in ("context", "supporting_facts")}
    assert converted(tmp_path, "2wikimultihopqa", {**HOTPOT, **texts})["docs"] == HOTPOT_DOCS
    assert run(tmp_path, "2wikimultihopqa", [{**HOTPOT, "context": "no JSON"}], "--overwrite")[0] == 2


FOREIGN = {
    "dpr": DPR,
    "squad": SQUAD,
    "triviaqa": TRIVIA,
    "flashrag": FLASHRAG,
    "hotpotqa": HOTPOT,
    "musique": MUSIQUE,
    "nq-open": ORACLE,
    "kilt": KILT,
    "release": {"question": "Who?", "content": ["d"], "gold_answer": "x", "pos_index": [0]},
    "questions": {"question": "Who?", "answers": ["x"], "docs": ["d"], "positives": ["d1"]},
}


@pytest.mark.parametrize("form", [form for form in CONVERTERS if form != "beir"])
@pytest.mark.parametrize("other", FOREIGN)
def test_rows_of_another_format_are_refused_with_its_name(tmp_path, capsys, form, other):
    if form == other or {form, other} == {"hotpotqa", "2wikimultihopqa"}:
        return
    code, output = run(tmp_path, form, [FOREIGN[other]])
    assert code == 2 and not os.path.exists(output)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "line 1" in line]
    if (form, other) in (("release", "flashrag"), ("squad", "musique")):  # their telling field has the same name
        assert "'docs'" in line or "'qas'" in line
    else:
        assert f"--format {form} " in line and other in line.partition("use --format")[2]


@pytest.mark.parametrize("form", ["nq-open", "questions", "triviaqa"])
def test_rows_that_name_their_passages_as_tevatron_does_are_refused(tmp_path, capsys, form):
    row = {"question": "Who?", "answer": ["x"], "answers": ["x"], "positive_passages": [{"title": "T", "text": "A."}]}
    code, output = run(tmp_path, form, [row])
    assert code == 2 and not os.path.exists(output) and "'positive_passages'" in capsys.readouterr().err


def test_scp_rows_are_the_questions_of_each_passage(tmp_path):
    (tmp_path / "train.json").write_text(json.dumps(SQUAD))
    given = ["--format", "squad", "--to", "scp", "--input", str(tmp_path / "train.json")]
    assert exit_code(convert.main, [*given, "--output", str(tmp_path / "o.jsonl")]) == 0
    questions = ["Who has an owl?", "What has Ann?"]
    assert load_scp(tmp_path / "o.jsonl") == [
        {
            "data_type": "qa",
            "question": questions,
            "answers": ["Tom", "a cat"],
            "docs": ["Tom and Ann\nTom has an owl. Ann has a cat."],
        },
        {"data_type": "qa", "question": ["Who?"], "answers": ["Bo"], "docs": ["Tom and Ann\nBo sings."]},
    ]


def test_passages_become_their_own_targets_once(tmp_path, capsys):
    rows = [
        {"question": "Which?", "answers": ["f"], "docs": ["e f", "a b"], "pos_index": [0, 1]},
        {"question": "And?", "answers": ["E"], "docs": ["e f"], "pos_index": [0]},
    ]
    assert run(tmp_path, "questions", rows, "--to", "scp", "--reconstruct", "true")[0] == 0
    written = load_scp(tmp_path / "out.jsonl")
    own = [(row["docs"], row["answers"]) for row in written if row["data_type"] == "paraphrase"]
    assert own == [(["e f"], ["e f"]), (["a b"], ["a b"])] and len(written) == 4
    assert run(tmp_path, "questions", rows, "--reconstruct", "true")[0] == 2
    assert "--to scp" in capsys.readouterr().err


def test_questions_on_two_passages_make_rows_of_two_and_absent_answers_none(tmp_path, capsys):
    rows = [
        {"question": "Is it so?", "answers": ["yes"], "docs": ["a b", "c d", "e f"], "pos_index": [0, 2]},
        {"question": "Which?", "answers": ["zz", "f"], "docs": ["e f", "a b"], "pos_index": [0, 1]},
        {"question": "And?", "answers": ["E"], "docs": ["e f", "a b"], "pos_index": [1, 0]},
        {"question": "Who?", "answers": ["nobody"], "docs": ["a b"], "pos_index": [0]},
        {"question": "Why?", "answers": ["a"], "docs": ["a b"]},
    ]
    code, output = run(tmp_path, "questions", rows, "--to", "scp")
    found = [(row["docs"], row["question"], row["answers"]) for row in load_scp(output)]
    assert code == 0 and found == [(["a b", "e f"], ["Is it so?", "Which?", "And?"], ["yes", "f", "E"])]
    assert capsys.readouterr().err.count("1 rows left out: no gold passage") == 2


SHARED = conftest.SHARED / "data"


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason="CLARA_SHARED is not there")
@pytest.mark.parametrize("name", ["hotpotqa_train20", "nq_tune20_matched", "musique_train20"])
def test_gold_passages_of_real_questions_become_scp_rows(tmp_path, name):
    given = ["--format", "questions", "--to", "scp", "--input", str(SHARED / f"{name}.jsonl.gz")]
    assert exit_code(convert.main, [*given, "--output", str(tmp_path / "scp.jsonl")]) == 0
    rows, examples = load_scp(tmp_path / "scp.jsonl"), load_examples(SHARED / f"{name}.jsonl.gz")
    assert sum(len(row["question"]) for row in rows) > 0.95 * len(examples)
    golds = {frozenset(example.gold): example for example in examples}
    assert all(frozenset(row["docs"]) in golds for row in rows)


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
        ("release", {"question": "Who?", "docs": ["d"]}, "the field 'golden_answers' or 'gold_answer' or 'answers' or"),
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
    assert exit_code(convert.main, given) == 2
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


@pytest.mark.parametrize("name", ["out.jsonl", "out.jsonl.gz"])
def test_the_command_repeated_is_done_and_another_one_is_refused(tmp_path, capsys, name):
    write_jsonl(tmp_path / "in.jsonl", [HOTPOT, {**HOTPOT, "_id": "2"}])
    out = tmp_path / name
    arguments = ["--format", "hotpotqa", "--input", str(tmp_path / "in.jsonl"), "--output", str(out)]
    assert exit_code(convert.main, arguments) == 0
    before, written_at = out.read_bytes(), out.stat().st_mtime_ns
    assert exit_code(convert.main, arguments) == 0
    assert "2 rows, which it held already" in capsys.readouterr().out
    # Fewer rows, more rows, other rows, and a file that is none of ours.
    for rows in ([HOTPOT], [HOTPOT, {**HOTPOT, "_id": "2"}, {**HOTPOT, "_id": "3"}], [HOTPOT, {**HOTPOT, "_id": "3"}]):
        write_jsonl(tmp_path / "in.jsonl", rows)
        assert exit_code(convert.main, arguments) == 2
        assert "holds other rows: give another --output, or --overwrite" in capsys.readouterr().err
    assert (out.read_bytes(), out.stat().st_mtime_ns) == (before, written_at)
    assert exit_code(convert.main, [*arguments, "--overwrite"]) == 0 and out.read_bytes() != before
    out.write_text("my notes")
    assert exit_code(convert.main, arguments) == 2 and out.read_text() == "my notes"
    assert exit_code(convert.main, [*arguments[:-1], str(tmp_path)]) == 2
    assert ".jsonl" in capsys.readouterr().err


def test_the_door_works_from_any_folder(tmp_path):
    write_jsonl(tmp_path / "in.jsonl", [HOTPOT])
    command = [sys.executable, str(ROOT / "eval/convert.py"), "--format", "hotpotqa"]
    command += ["--input", "in.jsonl", "--output", "out.jsonl"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout == "out.jsonl: 1 rows.\n"


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
    conversion = Conversion(str(source), form)
    sound = list(conversion)
    assert len(conversion.errors) > 50 and len(sound) > 10
    assert all("\n" not in error and ", item " in error for error in conversion.errors)
    write_jsonl(tmp_path / "sound.jsonl", sound)
    assert len(list(read_rows(tmp_path / "sound.jsonl"))) == len(sound)
    assert len(sound) + len(conversion.errors) + sum(conversion.left_out.values()) == len(rows)
