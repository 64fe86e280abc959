"""The rounds of one passage as a function of replies, which a script gives by step."""

import asyncio
import json

import pytest

from benchmarks.synthesis.scripted_teacher import FACT, REPAIR, FactTeacher, fact_document, part_of
from clara_hf.synthesis.backends.client import ChatReply, RequestFailed
from clara_hf.synthesis.checks import PassageChecks
from clara_hf.synthesis.leaks import LeakIndex
from clara_hf.synthesis.outputs import as_written
from clara_hf.synthesis.prompts import MAX_ITEMS, Prompts
from clara_hf.synthesis.rounds import RoundLimits, synthesize_passage
from clara_hf.synthesis.store import RunStore
from clara_hf.synthesis.teacher import Conversation, Teacher


PASSAGE = fact_document(7)
NAME = PASSAGE.split()[3]
PROMPTS = Prompts()
PAIR = FactTeacher.pair(FACT.findall(PASSAGE)[1])


class Script(FactTeacher):
    """The teacher of facts, but for what `changes` says of a part: an object, a text, an error, or a function of the
    number of earlier requests for that part that returns one of these, or `None` for the teacher's own reply."""

    def __init__(self, **changes):
        super().__init__()
        self.changes, self.asked = changes, []

    async def complete(self, request):
        repairs = request.messages[-1]["content"].startswith(REPAIR)
        part = "repair" if repairs else part_of(request.messages)
        change = self.changes.get(part)
        if callable(change):
            change = change(sum(part == name for name, _ in self.asked))
        self.asked.append((part, request))
        if isinstance(change, Exception):
            raise change
        if change is None:
            return await super().complete(request)
        return ChatReply(change if isinstance(change, str) else json.dumps(change), 10, 5)

    def count(self, part: str) -> int:
        return sum(part == name for name, _ in self.asked)

    def said(self, part: str, index: int = -1) -> str:
        return [request.messages[-1]["content"] for name, request in self.asked if name == part][index]


def make(tmp_path, script: Script, passage: str = PASSAGE, **limits) -> dict:
    tmp_path.mkdir(exist_ok=True)
    with RunStore(tmp_path) as store:
        store.add_item(passage, {"text": passage})
        conversation = Conversation(Teacher(script, store, PROMPTS, "scripted"), 1, passage)
        checks = PassageChecks(passage, PROMPTS, LeakIndex())
        made = asyncio.run(synthesize_passage(passage, conversation, checks, RoundLimits(**limits)))
        store.commit()
    return made


def reasons(made: dict) -> list[str]:
    return [entry["reason"] for entry in made["rejected"]]


def test_a_teacher_without_fault_gives_covered_pairs_and_a_paraphrase(tmp_path):
    script = Script()
    made = make(tmp_path, script)
    assert [pair["kind"] for pair in made["pairs"]] == ["simple"] * 5 + ["aggregation"]
    assert made["covered"] and made["rounds"] == 0 and made["attempts"] == 1 and not made["rejected"]
    assert made["paraphrase"] and made["paraphrase"] != PASSAGE
    # Five answers are the same as the pairs'; only the sixth needs a judge.
    assert (script.count("answer"), script.count("judge"), made["requests"]) == (6, 1, 12)
    judged, written = (
        {request.temperature for name, request in script.asked if (name in parts)}
        for parts in (("answer", "judge", "coverage", "validate"), ("simple", "complex", "paraphrase"))
    )
    assert judged == {0.0} and written == {0.7}


def test_uncovered_facts_are_supplemented_until_none_is_missing(tmp_path):
    script = Script()
    script.first = 0.4
    made = make(tmp_path, script)
    assert made["covered"] and made["rounds"] == 1
    assert [pair["round"] for pair in made["pairs"]] == [0, 0, 0, 1, 1]
    facts = script.said("supplement").rpartition("Facts that are not asked for:")[2]
    assert [line[:2] for line in facts.strip().splitlines()] == ["1.", "2."]


@pytest.mark.parametrize("limit", [0, 1, 10])
def test_supplements_end_after_exactly_so_many_rounds(tmp_path, limit):
    script = Script(coverage={"missing": ["The moon is green."]})
    made = make(tmp_path, script, max_rounds=limit)
    assert script.count("supplement") == limit and script.count("coverage") == limit + 1
    assert made["rounds"] == limit and not made["covered"] and made["missing"] == ["The moon is green."]
    # What passed is set aside when it is written, with the reason; the paraphrase stands on its own.
    assert not made["rejected"] and made["verified"] == len(made["pairs"]) == 6 and made["paraphrase"]
    written = as_written(made, False)
    assert not written["pairs"] and reasons(written) == ["passage not covered"] * 6 and written["left_out"] == 6
    assert as_written(made, True)["pairs"] == made["pairs"]


def test_ten_rounds_are_the_default(tmp_path):
    script = Script(coverage={"missing": ["The moon is green."]}, supplement={"pairs": []})
    make(tmp_path, script)
    assert script.count("supplement") == 10


def test_refused_and_wrong_answers_are_set_aside_and_asked_again_in_a_supplement(tmp_path):
    replies = {0: {"answerable": False, "answer": ""}, 1: {"answerable": True, "answer": "golden gate"}}
    replies[2] = {"answerable": True, "answer": "The passage does not say."}
    script = Script(answer=replies.get)
    made = make(tmp_path, script)
    found = {entry["reason"]: entry for entry in made["rejected"]}
    assert reasons(made) == [
        "not answerable from the passage",
        "answer not confirmed",
        "not answerable from the passage",
    ]
    assert found["answer not confirmed"]["found"] == "golden gate" and found["answer not confirmed"]["question"]
    assert made["covered"] and made["rounds"] == 1 and sum(pair["round"] for pair in made["pairs"]) >= 2
    # The supplement's writer is told what was rejected and why.
    told = script.said("supplement").rpartition("Pairs that were rejected:")[2]
    assert all(f"{entry['question']} - {entry['answer']} ({entry['reason']})" in told for entry in made["rejected"])


def test_another_wording_counts_when_the_judge_agrees(tmp_path):
    said = {"answerable": True, "answer": "It is said to be something"}
    agreed = make(tmp_path / "a", Script(answer=said, judge={"correct": True}))
    denied = make(tmp_path / "b", Script(answer=said, judge={"correct": False}), max_rounds=0)
    assert len(agreed["pairs"]) == 6
    assert reasons(denied).count("answer not confirmed") == 6


@pytest.mark.parametrize(("reference", "found"), [("-5 degrees", "5 degrees"), ("C", "C++"), ("$5", "€5")])
def test_answers_that_differ_in_a_sign_are_judged(tmp_path, reference, found):
    passage = f"{PASSAGE} On each day the great scale of Quenby shows {reference}."
    pairs = {"pairs": [{"question": "What does the great scale of Quenby show on each day?", "answer": reference}]}
    said = {"answerable": True, "answer": found}
    script = Script(simple=pairs, complex={"pairs": []}, answer=said, judge={"correct": False})
    made = make(tmp_path, script, passage, max_rounds=0)
    assert script.count("judge") == 1 and "answer not confirmed" in reasons(made) and not made["pairs"]


def test_an_unreadable_reply_is_asked_for_once_more(tmp_path):
    script = Script(simple="Sure <|im_end|>! Here you go: {pairs: [", repair={"pairs": [PAIR]})
    made = make(tmp_path, script, max_rounds=0)
    assert script.count("repair") == 1 and "malformed" in script.said("repair")
    (request,) = [request for name, request in script.asked if name == "repair"]
    assert request.messages[-2]["content"] == "Sure < |im_end|>! Here you go: {pairs: ["
    assert [pair["question"] for pair in made["pairs"]][0] == PAIR["question"]
    twice = make(tmp_path / "2", Script(simple="no", repair="no", coverage={"missing": []}))
    assert [entry for entry in twice["rejected"] if entry["type"] == "reply"] == [
        {"type": "reply", "reason": "malformed reply", "step": "simple", "detail": "there is no JSON object in it"}
    ]


@pytest.mark.parametrize(
    ("part", "reason"),
    [("answer", "malformed reply"), ("judge", "malformed reply"), ("coverage", "coverage not known")],
)
def test_a_check_that_cannot_be_read_passes_nothing(tmp_path, part, reason):
    made = as_written(make(tmp_path, Script(**{part: '{"wrong": 1}'}, repair="none"), max_rounds=0), False)
    assert reason in reasons(made)
    touched = [pair for pair in made["pairs"] if part != "judge" or pair["kind"] != "simple"]
    assert not touched


def test_a_paraphrase_is_tried_again_with_the_faults_of_the_last(tmp_path):
    faults = {0: {"added": ["It is pretty."], "lost": []}, 1: {"added": [], "lost": ["The tree."]}}
    script = Script(validate=faults.get)
    made = make(tmp_path, script)
    assert made["attempts"] == 3 and made["paraphrase"]
    assert reasons(made) == ["paraphrase adds facts", "paraphrase loses facts"]
    assert "It is pretty." in script.said("paraphrase", 1) and "The tree." in script.said("paraphrase", 2)
    assert script.said("paraphrase", 0).endswith("none")


def test_what_is_ours_or_the_examples_gets_into_no_text(tmp_path):
    # A small model copies what it is told: words of ours, and facts of the prompt's example.
    foreign = "The herring market of Quenby lies on the Strait of Lorn."
    script = Script(paraphrase={0: "no"}.get, repair="no", coverage={"missing": [foreign]}, answer={0: "no"}.get)
    made = make(tmp_path, script, max_rounds=1)
    assert made["covered"] and not made["missing"] and made["paraphrase"] and made["attempts"] == 2
    assert script.said("paraphrase", 1).endswith("none") and reasons(made).count("malformed reply") == 2
    script = Script(coverage={"missing": ["The moon is green."]}, answer={0: "no"}.get, repair="no")
    make(tmp_path / "2", script, max_rounds=1)
    assert "malformed" not in script.said("supplement")


def test_a_paraphrase_that_never_passes_is_set_aside(tmp_path):
    made = make(tmp_path, Script(paraphrase={"paraphrase": PASSAGE}))
    assert made["paraphrase"] is None and made["attempts"] == 3
    assert reasons(made) == ["paraphrase copies the passage"] * 3 and len(made["pairs"]) == 6


def test_a_reply_of_thousands_of_pairs_costs_no_thousand_requests(tmp_path):
    pairs = [{"question": f"What is thing {n} of {NAME} called there?", "answer": "marble"} for n in range(5000)]
    script = Script(simple={"pairs": pairs})
    made = make(tmp_path, script, max_rounds=0)
    assert script.count("answer") <= MAX_ITEMS + 1 and "too many pairs" in reasons(made)


def test_the_result_does_not_depend_on_the_order_of_replies(tmp_path):
    class Shuffled(Script):
        def __init__(self, seed, **changes):
            super().__init__(**changes)
            self.seed = seed

        async def complete(self, request):
            reply = await super().complete(request)
            await asyncio.sleep((hash((self.seed, request.seed)) % 7) * 0.004)
            return reply

    class Forgetful(Shuffled):
        def answer(self, facts, asked):
            known = "river" not in asked.rpartition("Question")[2]
            return super().answer(facts, asked) if known else {"answerable": False, "answer": ""}

    results = []
    for seed in range(4):
        script = Forgetful(seed)
        results.append(make(tmp_path / str(seed), script, max_rounds=2))
    assert results[0]["rejected"] and all(result == results[0] for result in results)


def test_a_failed_request_fails_the_passage_and_the_reason_does_not_depend_on_the_order(tmp_path):
    class Failing(Script):
        async def complete(self, request):
            part = part_of(request.messages)
            if part in self.changes:
                await asyncio.sleep(self.changes[part])
                raise RequestFailed(part)
            return await super().complete(request)

    for number, delays in enumerate(({"simple": 0.0, "paraphrase": 0.05}, {"simple": 0.05, "paraphrase": 0.0})):
        with pytest.raises(RequestFailed, match="simple"):
            make(tmp_path / str(number), Failing(**delays))


def test_a_logged_reply_is_not_asked_for_again_unless_the_request_changed(tmp_path):
    first, second, third = Script(), Script(), Script()
    made = make(tmp_path, first)
    assert make(tmp_path, second) == made and not second.asked
    tmp_path.mkdir(exist_ok=True)
    with RunStore(tmp_path) as store:
        conversation = Conversation(Teacher(third, store, PROMPTS, "another model"), 1, PASSAGE)
        checks = PassageChecks(PASSAGE, PROMPTS, LeakIndex())
        asyncio.run(synthesize_passage(PASSAGE, conversation, checks, RoundLimits()))
    assert len(third.asked) == len(first.asked)
