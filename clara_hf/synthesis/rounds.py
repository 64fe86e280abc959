"""What is made of one passage (arXiv 2511.18659, section 2): questions, verified, until they cover it; a paraphrase.

The result is a function of the passage and the replies. Only pairs whose answer the language model finds again from
the passage count for coverage; what fails anywhere is kept aside with its reason.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from clara_hf.synthesis.checks import PassageChecks, QuestionAnswer
from clara_hf.synthesis.prompts import (
    MAX_FACT_CHARS,
    MAX_ITEMS,
    Answer,
    ComplexPairs,
    Coverage,
    Fidelity,
    Pair,
    Pairs,
    Paraphrase,
    ReplyError,
    Verdict,
    facts,
    numbered,
)
from clara_hf.synthesis.teacher import Conversation, together
from clara_hf.synthesis.text import clean_line, same_text


@dataclass(frozen=True)
class RoundLimits:
    """How often is tried.

    Attributes:
        max_rounds: supplementary rounds for facts that no pair covers (the paper's ten).
        paraphrase_attempts: paraphrases to ask for until one keeps every fact and adds none.
    """

    max_rounds: int = 10
    paraphrase_attempts: int = 3


@dataclass
class Questions:
    """What the question rounds came to; `missing` is `None` where coverage could not be read."""

    pairs: list[QuestionAnswer] = field(default_factory=list)
    rejected: list[dict[str, Any]] = field(default_factory=list)
    missing: list[str] | None = None
    rounds: int = 0


async def synthesize_passage(
    passage: str, conversation: Conversation, checks: PassageChecks, limits: RoundLimits
) -> dict[str, Any]:
    """Everything that one passage gives.

    Returns:
        `pairs` and `paraphrase` (`None` without one) that passed, `rejected` with reasons, the number of pairs that
        were `verified`, `covered`, `missing` facts, `rounds` of supplements,
        `attempts` at the paraphrase, `requests`.
    """
    questions, (paraphrase, attempts, faults) = await together(
        QuestionRounds(passage, conversation, checks, limits).run(),
        paraphrase_rounds(passage, conversation, checks, limits.paraphrase_attempts),
    )
    pairs, rejected = questions.pairs, questions.rejected
    # Where nothing is asked for nothing is covered, whatever is said to be missing.
    covered = questions.missing == [] and bool(pairs)
    return {
        "pairs": [asdict(pair) for pair in pairs],
        "paraphrase": paraphrase,
        "rejected": [*rejected, *faults],
        "verified": len(pairs),
        "covered": covered,
        "missing": questions.missing or [],
        "rounds": questions.rounds,
        "attempts": attempts,
        "requests": conversation.requests,
    }


class QuestionRounds:
    """The questions of one passage: written, checked, verified, supplemented."""

    def __init__(self, passage: str, conversation: Conversation, checks: PassageChecks, limits: RoundLimits):
        self.passage, self.ask, self.checks, self.limits = passage, conversation.ask, checks, limits
        self.result = Questions()
        self._verified = 0

    async def run(self) -> Questions:
        result = self.result
        simple, complex_ = await together(self._write("simple", Pairs), self._write("complex", ComplexPairs))
        await self._take([*simple, *complex_])
        while True:
            result.missing = await self._missing()
            if not result.missing or result.rounds == self.limits.max_rounds:
                return result
            result.rounds += 1
            told = {"pairs": self._listed(), "rejected": self._listed_rejected(), "facts": numbered(result.missing)}
            more = await self._write("supplement", Pairs, step=f".{result.rounds}", **told)
            await self._take(more)

    async def _write(self, prompt: str, reply_type: type, step: str = "", **values: str) -> list[QuestionAnswer]:
        try:
            reply = await self.ask(prompt + step, prompt, reply_type, write=True, passage=self.passage, **values)
        except ReplyError as error:
            self._reject("reply", "malformed reply", step=prompt + step, detail=str(error))
            return []
        if len(reply.pairs) > MAX_ITEMS:
            self._reject("reply", "too many pairs", step=prompt + step, detail=str(len(reply.pairs)))
        return [self._pair(pair) for pair in reply.pairs[:MAX_ITEMS]]

    def _pair(self, pair: Pair) -> QuestionAnswer:
        kind = getattr(pair, "kind", "simple")
        return QuestionAnswer(kind, self.result.rounds, clean_line(pair.question), clean_line(pair.answer))

    async def _take(self, pairs: Sequence[QuestionAnswer]) -> None:
        """Check and verify pairs, in their order; those that pass join the result."""
        passed = []
        for pair in pairs:
            fault = self.checks.pair_fault(pair)
            if fault:
                self._reject("pair", fault, **asdict(pair))
            else:
                passed.append(pair)
        first = self._verified
        self._verified += len(passed)
        verdicts = await together(*(self._verify(pair, first + i) for i, pair in enumerate(passed, start=1)))
        for pair, (fault, details) in zip(passed, verdicts, strict=True):
            if fault:
                self.checks.forget(pair)
                self._reject("pair", fault, **asdict(pair), **details)
            else:
                self.result.pairs.append(pair)

    async def _verify(self, pair: QuestionAnswer, number: int) -> tuple[str | None, dict[str, str]]:
        """Whether the passage alone leads to the pair's answer: the fault, if any, and the answer found instead."""
        asked = {"passage": self.passage, "question": pair.question}
        try:
            reply = await self.ask(f"answer.{number}", "answer", Answer, **asked)
            found = clean_line(reply.answer)
            if not reply.answerable or not found or self.checks.refused(found):
                return "not answerable from the passage", {}
            if same_text(found, pair.answer):
                return None, {}
            values = {**asked, "reference": pair.answer, "answer": found}
            verdict = await self.ask(f"judge.{number}", "judge", Verdict, **values)
        except ReplyError as error:
            return "malformed reply", {"detail": str(error)}
        return (None, {}) if verdict.correct else ("answer not confirmed", {"found": found})

    async def _missing(self) -> list[str] | None:
        try:
            step = f"coverage.{self.result.rounds}"
            reply = await self.ask(step, "coverage", Coverage, passage=self.passage, pairs=self._listed())
        except ReplyError as error:
            self._reject("reply", "malformed reply", step=step, detail=str(error))
            return None
        # A fact of the prompt's example is none of the passage, and could never be covered.
        return [fact for fact in facts(reply.missing) if not self.checks.of_example(fact)]

    def _listed(self) -> str:
        return numbered([f"{pair.question} - {pair.answer}" for pair in self.result.pairs])

    def _listed_rejected(self) -> str:
        """The last pairs that were set aside by a fault of theirs, each once, with the reason."""
        entries = [e for e in self.result.rejected if e["type"] == "pair" and e["reason"] != "malformed reply"]
        lines = [f"{entry['question']} - {entry['answer']} ({entry['reason']})" for entry in entries]
        return numbered(list(dict.fromkeys(line[:MAX_FACT_CHARS] for line in lines))[-MAX_ITEMS:])

    def _reject(self, what: str, reason: str, /, **content: Any) -> None:
        self.result.rejected.append(_aside(what, reason, **content))


async def paraphrase_rounds(
    passage: str, conversation: Conversation, checks: PassageChecks, attempts: int
) -> tuple[str | None, int, list[dict[str, Any]]]:
    """A paraphrase that keeps the facts, the attempts it took, and the earlier ones with their faults."""
    rejected: list[dict[str, Any]] = []
    faults: list[str] = []
    for attempt in range(1, attempts + 1):
        text = None
        try:
            asked = {"passage": passage, "faults": "".join(f"\n- {fault}" for fault in faults) or "none"}
            step = f"paraphrase.{attempt}"
            reply = await conversation.ask(step, "paraphrase", Paraphrase, write=True, **asked)
            text = clean_line(reply.paraphrase)
            reason, details = checks.paraphrase_fault(text), []
            if reason is None:
                step = f"validate.{attempt}"
                fidelity = await conversation.ask(step, "validate", Fidelity, passage=passage, paraphrase=text)
                added, lost = facts(fidelity.added), facts(fidelity.lost)
                if not added and not lost:
                    return text, attempt, rejected
                reason = "paraphrase adds facts" if added else "paraphrase loses facts"
                details = [f"added: {fact}" for fact in added] + [f"lost: {fact}" for fact in lost]
        except ReplyError as error:
            reason, details = "malformed reply", [str(error)]
        rejected.append(_aside("paraphrase", reason, attempt=attempt, paraphrase=text, detail="; ".join(details)))
        # What could not be read has no fault that another wording mends; a model may copy the words into its text.
        if text:
            faults = details or [reason]
    return None, attempts, rejected


def _aside(what: str, reason: str, /, **content: Any) -> dict[str, Any]:
    """An entry of `rejected.jsonl`."""
    return {"type": what, "reason": reason, **content}
