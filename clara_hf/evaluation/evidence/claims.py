"""Claims about differences between two systems, and what the scores of several seeds say about them."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from clara_hf.evaluation.statistics import LEVEL, RESAMPLES
from clara_hf.program import UsageError, option


LEAST_SEEDS = 3
TRUE, FALSE, UNDECIDED, NOT_RUN = "true", "false", "undecided", "not run"


@dataclass(kw_only=True)
class Claim:
    """One claim: that a system scores higher than another.

    Parameters:
        states (`str`): the claim, as the report shows it.
        metric (`str`): name of a question's score, such as `recall@1` or `f1`.
        better, worse (`str`): a variant, or a variant and a system of its evaluation, as in `joint clara-before-joint`.
        type (`str`, *optional*): only questions of this type.
        title (`str`): a few words for the picture; by default the claim's name and metric.
        not_run (`str`): why there are no runs for it; it is then only listed.
    """

    states: str
    metric: str = ""
    better: str = ""
    worse: str = ""
    type: str | None = None
    title: str = ""
    not_run: str = option("", "Why there are no runs.")

    def __post_init__(self):
        if not self.not_run and not (self.metric and self.better and self.worse):
            raise UsageError(
                f"claim {self.states!r} needs metric, better and worse, or says by not_run why it has none."
            )

    @property
    def sides(self) -> tuple[tuple[str, str], tuple[str, str]]:
        """Variant and system of the better and the worse side."""
        return side(self.better), side(self.worse)


def side(text: str) -> tuple[str, str]:
    variant, _, system = text.partition(" ")
    return variant, system or "clara"


def hierarchical_interval(values: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """95% bootstrap interval of a mean over seeds and questions, each drawn anew: the questions of all seeds are the
    same, so that both are drawn once per resample.

    Args:
        values: `[seeds, questions]`, NaN where a question has no value.
        seed: of the resamples.
    """
    present = ~np.isnan(values)
    filled, chance = np.nan_to_num(values), np.random.default_rng(seed)
    seeds, questions = values.shape
    means = []
    for _ in range(RESAMPLES):
        runs = np.bincount(chance.integers(seeds, size=seeds), minlength=seeds)
        rows = np.bincount(chance.integers(questions, size=questions), minlength=questions)
        total = runs @ present @ rows
        means.append(runs @ filled @ rows / total if total else np.nan)
    low, high = np.nanquantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return float(low), float(high)


def settle(claim: Claim, scores: dict[tuple[str, str], np.ndarray]) -> dict:
    """Effect, interval and verdict.

    Args:
        scores: of the claim's metric, `[seeds, questions]` by variant and system; NaN where there is none.
    """
    row: dict[str, Any] = {"states": claim.states, "metric": claim.metric, "better": claim.better, "worse": claim.worse}
    row |= {"type": claim.type, "title": claim.title}
    missing = [name for name in claim.sides if name not in scores] if not claim.not_run else []
    if claim.not_run or missing:
        told = ", ".join(" ".join(name) for name in missing)
        return {**row, "verdict": NOT_RUN, "why": claim.not_run or f"there is no {told} with {claim.metric}"}
    better, worse = (scores[name] for name in claim.sides)
    difference = better - worse
    mean, (low, high) = float(np.nanmean(difference)), hierarchical_interval(difference)
    verdict = TRUE if low > 0 else FALSE if high < 0 else UNDECIDED
    by_seed = [float(value) for value in np.nanmean(difference, axis=1)]
    counts = {"seeds": len(difference), "questions": int((~np.isnan(difference)).any(axis=0).sum())}
    if len(difference) < LEAST_SEEDS:
        verdict = UNDECIDED
    return {**row, "effect": mean, "low": low, "high": high, "by_seed": by_seed, **counts, "verdict": verdict}
