"""What rankers and readers return."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Ranking:
    """The candidates of one question, best first.

    Attributes:
        order: positions in `QAExample.docs`, all of them.
        scores: in the same order, descending; `None` for a ranker that only orders.
    """

    order: list[int]
    scores: list[float] | None

    @classmethod
    def of(cls, scores: list[float]) -> "Ranking":
        """By descending score; the earlier candidate first among equals."""
        order = sorted(range(len(scores)), key=lambda position: -scores[position])
        return cls(order, [float(scores[position]) for position in order])


@dataclass(frozen=True)
class Answer:
    """An answer, and how many tokens the prompt before it had (memory vectors count as one token each)."""

    text: str
    prompt_tokens: int
