"""Replies that SmolLM2-135M-Instruct really gave, by `transformers serve` and in the process, to Wikipedia passages.

The passages are of the training sets of HotpotQA and MuSiQue (Wikipedia, CC BY-SA). A model of this size writes mostly
bad questions and unreadable replies: what is tested is what becomes of them.
"""

import gzip
import json
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import pytest
from synthesis_runs import rows, run

from benchmarks.synthesis.scripted_teacher import REPAIR, part_of, passage_of
from clara_hf.program import UsageError
from clara_hf.synthesis import session
from clara_hf.synthesis.backends.client import ChatReply
from clara_hf.synthesis.prompts import (
    Answer,
    ComplexPairs,
    Coverage,
    Fidelity,
    Pairs,
    Paraphrase,
    ReplyError,
    Verdict,
    parse_reply,
)


RECORDED = Path(__file__).resolve().parents[1] / "data" / "smollm2_replies.jsonl.gz"
TYPES = {
    "simple": Pairs,
    "complex": ComplexPairs,
    "supplement": Pairs,
    "paraphrase": Paraphrase,
    "answer": Answer,
    "judge": Verdict,
    "coverage": Coverage,
    "validate": Fidelity,
}


@pytest.fixture(scope="module")
def recorded() -> list[dict]:
    with gzip.open(RECORDED, "rt", encoding="utf-8") as file:
        return list(map(json.loads, file))


def test_every_reply_is_read_or_refused_and_no_check_is_guessed(recorded):
    outcomes = Counter()
    for row in recorded:
        reply_type = TYPES[row["step"].partition(".")[0]]
        try:
            reply = parse_reply(row["text"], reply_type, row["cut"])
        except ReplyError:
            outcomes["refused", reply_type.mended] += 1
            continue
        assert not row["cut"]
        outcomes["read", reply_type.mended] += 1
        if not reply_type.mended:
            assert reply == reply_type.model_validate(json.loads(row["text"]))
    assert min(outcomes.values()) >= 10 and len(outcomes) == 4, outcomes


def test_a_reply_with_quotes_that_are_not_escaped_is_mended(recorded):
    (row,) = [row for row in recorded if 'fairy tale "The Snow Queen" was released' in row["text"]]
    assert '"The Snow Queen"' in parse_reply(row["text"], Paraphrase).paraphrase


class Recorded:
    """Says what was recorded for a passage and a part, in its order; the last one again where more is asked."""

    def __init__(self, recorded: list[dict]):
        self.replies: dict[tuple[str, str], list[dict]] = {}
        for row in recorded:
            part = "repair" if row["step"].endswith(".repair") else row["step"].partition(".")[0]
            self.replies.setdefault((row["passage"], part), []).append(row)

    async def complete(self, request):
        repairs = request.messages[-1]["content"].startswith(REPAIR)
        part = "repair" if repairs else part_of(request.messages)
        known = self.replies.get((passage_of(request.messages), part), [{"text": "I cannot help.", "cut": False}])
        row = known.pop(0) if len(known) > 1 else known[0]
        return ChatReply(row["text"], 700, len(row["text"]) // 4, row["cut"])


def test_a_run_of_real_replies_sets_aside_what_is_wrong_and_says_why(recorded, tmp_path, monkeypatch):
    monkeypatch.setattr(session, "make_backend", lambda _: nullcontext(Recorded(recorded)))
    passages = list(dict.fromkeys(row["passage"] for row in recorded))
    lines = [json.dumps({"text": text}) + "\n" for text in passages]
    (tmp_path / "docs.jsonl").write_text("".join(lines), encoding="utf-8")
    options = (
        "--max_rounds",
        "1",
        "--paraphrase_attempts",
        "2",
        "--passage_tokens",
        "2000",
        "--keep_uncovered",
        "true",
    )
    # Not one of this model's pairs stands up to the checks, which is said.
    with pytest.raises(UsageError, match="no pair and no paraphrase passed"):
        run(str(tmp_path / "docs.jsonl"), tmp_path / "scp", "http://127.0.0.1:1/v1", *options)
    stats = json.loads((tmp_path / "scp" / "stats.json").read_text(encoding="utf-8"))
    assert stats["passages"] == len(passages) and stats["failed"] == 0
    reasons = {reason.partition(": ")[2] for reason in stats["reject_reasons"]}
    assert {"malformed reply", "not answerable from the passage", "no verified pair"} <= reasons, reasons
    # What the small model copied of the prompts' examples is nowhere in the data.
    assert any("Ossa valley" in row["text"] for row in recorded)
    for row in rows(tmp_path / "scp" / "rejected.jsonl"):
        assert "Quenby" not in json.dumps(row.get("missing", []))
