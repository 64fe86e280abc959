"""Instruction data: a teacher's answers from retrieved passages, judged where an answer is known."""

import json

import pytest
from scripted_endpoint import Endpoint, Say

from benchmarks.synthesis.scripted_teacher import FACT, FactTeacher, fact_document, part_of, sentence
from clara_hf.data.schema import load_examples
from clara_hf.program import UsageError
from clara_hf.synthesis import instruct_data


def question_row(number: int, **changes) -> dict:
    fact = FACT.findall(fact_document(number))[1]
    docs = [fact_document(number + 1), fact_document(number), fact_document(number + 2)]
    row = {"id": f"q{number}", "question": FactTeacher.pair(fact)["question"], "answers": [fact[2]], "docs": docs}
    return {**row, "pos_index": [1], **changes}


def run(tmp_path, rows: list[dict], script=None, *options: str) -> tuple[dict, Endpoint]:
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with Endpoint(script) as endpoint:
        arguments = ["--questions", str(tmp_path / "questions.jsonl"), "--out", str(tmp_path / "out")]
        instruct_data.main([*arguments, "--model", "scripted", "--base_url", endpoint.url, *options])
    return json.loads((tmp_path / "out" / "stats.json").read_text(encoding="utf-8")), endpoint


def rejected(tmp_path) -> dict[str, str]:
    lines = (tmp_path / "out" / "rejected.jsonl").read_text(encoding="utf-8").splitlines()
    return {row["question"]: row["reason"] for row in map(json.loads, lines)}


def test_the_teachers_answer_is_trained_and_the_known_one_still_counts(tmp_path):
    rows = [question_row(number) for number in range(4)]
    rows[3] = {"question": rows[3]["question"], "docs": rows[3]["docs"]}
    stats, endpoint = run(tmp_path, rows, None, "--top_k", "2")
    assert stats["kept"] == 4 and endpoint.parts() == ["teach"] * 4
    examples = load_examples(tmp_path / "out" / "instruct.jsonl")
    fact = FACT.findall(fact_document(0))[1]
    assert examples[0].answers == [sentence(fact), fact[2]] and examples[0].id == "q0"
    assert examples[0].docs == [fact_document(1), fact_document(0)] and examples[0].pos_index == [1]
    assert examples[3].pos_index is None and len(examples[3].answers) == 1


def test_refusals_and_contradictions_are_set_aside_and_a_judge_may_agree(tmp_path):
    rows = [question_row(0, docs=[fact_document(7)], pos_index=[])]
    rows += [question_row(number, answers=["something else"]) for number in (1, 2)]
    rows += [question_row(3), question_row(3)]

    def script(messages, body, before):
        second = rows[2]["question"] in messages[-1]["content"]
        return Say(json.dumps({"correct": second})) if part_of(messages) == "judge" else None

    stats, _ = run(tmp_path, rows, script)
    assert (stats["questions"], stats["kept"]) == (4, 2)
    assert rejected(tmp_path) == {
        rows[0]["question"]: "not answerable from the passages",
        rows[1]["question"]: "differs from the known answer",
        rows[3]["question"]: "duplicate question",
    }


def test_a_second_call_asks_for_nothing(tmp_path):
    run(tmp_path, [question_row(0)])
    before = (tmp_path / "out" / "instruct.jsonl").read_bytes()
    _, endpoint = run(tmp_path, [question_row(0)])
    assert not endpoint.requests and (tmp_path / "out" / "instruct.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"docs": ["x"]}, "line 1: 'question'"),
        ({"question": "Who?"}, "line 1: 'docs'"),
        ({"question": "Who?", "docs": []}, "line 1: 'docs'"),
        ({"question": "Who?", "docs": ["x"], "answers": "y"}, "line 1: 'answers'"),
        ({"question": "Who?", "docs": ["x"], "pos_index": ["a"]}, "line 1: 'pos_index'"),
        ({"question": "Who?", "docs": ["x"], "pos_index": [-1]}, "line 1: 'pos_index'"),
        ({"question": "Who?", "docs": ["x"], "pos_index": 1}, "line 1: 'pos_index'"),
    ],
)
def test_a_line_that_breaks_the_schema_is_named(tmp_path, row, words):
    with pytest.raises(UsageError, match=words):
        run(tmp_path, [row])


def test_a_teacher_that_always_refuses_is_said_to(tmp_path):
    with pytest.raises(UsageError, match="no answer could be used"):
        run(tmp_path, [question_row(0)], lambda *_: Say('{"answerable": false, "answer": ""}'))
