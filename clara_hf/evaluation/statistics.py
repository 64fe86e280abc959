"""Intervals and paired tests over questions; what a system's scores are worth."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from scipy.stats import binomtest
from sklearn.metrics import roc_auc_score


LEVEL = 0.95
RESAMPLES = 2000
PERMUTATIONS = 10_000
# Numbers held at once while resampling, so that a long data file does not need gigabytes.
BLOCK = 4_000_000
# Sums of the same numbers in another order may differ by so much.
ROUNDING = 1e-9
BINS = 10


def intervals(values: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """95% intervals of the means of columns: Wilson's where all values are 0 or 1, else [`bootstrap_interval`].

    Resampling cannot see beyond the values it has: at 0% and 100% its interval would have no width.

    Args:
        values: `[n, columns]`, NaN where a question has no value; each column has at least one.
        seed: of the resamples.

    Returns:
        Lower and upper ends, `[columns]` each.
    """
    values = np.asarray(values, dtype=np.float64)
    low, high = bootstrap_interval(values, seed)
    for column, numbers in enumerate(values.T):
        numbers = numbers[~np.isnan(numbers)]
        if np.isin(numbers, (0, 1)).all():
            low[column], high[column] = wilson_interval(int(numbers.sum()), len(numbers))
    return low, high


def wilson_interval(count: int, n: int) -> tuple[float, float]:
    """95% Wilson score interval of the share `count / n`."""
    ends = binomtest(count, n).proportion_ci(LEVEL, method="wilson")
    return float(ends.low), float(ends.high)


def bootstrap_interval(values: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """95% percentile bootstrap intervals of the means of columns, over 2,000 resamples of the rows.

    All columns, and all calls with as many rows and the same seed, see the same resamples.

    Args:
        values: `[n, columns]`, one row per question; NaN where a question has no value. Means are over the others.
        seed: of the resamples.

    Returns:
        Lower and upper ends, `[columns]` each. A column of equal values has an interval of width zero.

    Raises:
        ValueError: there is no row.
    """
    values = np.asarray(values, dtype=np.float64)
    n = len(values)
    if n == 0:
        raise ValueError("There is no value to resample.")
    present = ~np.isnan(values)
    whole = bool(present.all())
    values, present = np.nan_to_num(values), present.astype(np.float64)
    chance = np.random.default_rng(seed)
    means = []
    for rows in _blocks(RESAMPLES, n):
        drawn = chance.integers(n, size=(rows, n)) + n * np.arange(rows)[:, None]
        times = np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n).astype(np.float64)
        with np.errstate(invalid="ignore"):  # a resample may hold none of the questions that have a value
            means.append(times @ values / (n if whole else times @ present))
    low, high = np.nanquantile(np.concatenate(means), [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    return low, high


def permutation_test(differences: np.ndarray, seed: int) -> np.ndarray:
    """Two-sided p-values that the means of columns are zero, by 10,000 random flips of the rows' signs.

    This is the paired permutation test: under the hypothesis that two systems are alike, each question's scores could
    as well be exchanged (Fisher's randomisation test).

    Args:
        differences: `[n, columns]`, one row per question, NaN where one of the two systems has no score.
        seed: of the flips, which are the same for all columns.

    Returns:
        `[columns]`, at least 1 / 10,001.
    """
    differences = np.nan_to_num(np.asarray(differences, dtype=np.float64))
    observed = np.abs(differences.sum(axis=0)) - ROUNDING
    chance = np.random.default_rng(seed)
    extreme = np.zeros(differences.shape[1])
    for rows in _blocks(PERMUTATIONS, len(differences)):
        signs = 2.0 * chance.integers(2, size=(rows, len(differences)), dtype=np.int8) - 1
        extreme += (np.abs(signs @ differences) >= observed).sum(axis=0)
    return (1 + extreme) / (1 + PERMUTATIONS)


def holm(p_values: np.ndarray) -> np.ndarray:
    """Holm's step-down adjustment for testing several pairs at once."""
    order = np.argsort(p_values, kind="stable")
    factors = np.arange(len(p_values), 0, -1)
    adjusted = np.empty(len(p_values))
    adjusted[order] = np.minimum(1.0, np.maximum.accumulate(np.asarray(p_values)[order] * factors))
    return adjusted


def paired_tests(scores: dict[str, np.ndarray], seed: int) -> list[dict]:
    """Compares every two systems on the questions that both have a score for.

    Args:
        scores: per system `[n]`, NaN where it has no score.
        seed: of permutations and resamples.

    Returns:
        One entry per pair with such questions: `a`, `b`, `difference` of the means (a - b) with its 95% bootstrap
        interval `low`, `high`, `p`, `p_holm` (adjusted for the number of pairs) and `n`.
    """
    pairs, columns = [], []
    for a, b in combinations(scores, 2):
        difference = scores[a] - scores[b]
        if not np.isnan(difference).all():
            pairs.append((a, b))
            columns.append(difference)
    if not pairs:
        return []
    differences = np.stack(columns, axis=1)
    low, high = bootstrap_interval(differences, seed)
    p = permutation_test(differences, seed)
    found = zip(pairs, np.nanmean(differences, axis=0), low, high, p, holm(p), columns, strict=True)
    return [
        {
            "a": a,
            "b": b,
            "difference": float(mean),
            "low": float(start),
            "high": float(end),
            "p": float(chance),
            "p_holm": float(adjusted),
            "n": int((~np.isnan(column)).sum()),
        }
        for (a, b), mean, start, end, chance, adjusted, column in found
    ]


def letters(values: dict[str, float], tests: list[dict]) -> dict[str, str]:
    """Marks systems so that two share a letter exactly if the tests cannot tell them apart (compact letter display).

    Args:
        values: per system its mean; the best has the first letter.
        tests: as `paired_tests` gives them. Pairs without a test share a letter.
    """
    order = sorted(values, key=lambda name: -values[name])
    groups = [set(order)]
    for test in tests:
        if test["p_holm"] < 1 - LEVEL:
            groups = _split(groups, test["a"], test["b"])
    groups.sort(key=lambda group: sorted(order.index(name) for name in group))
    return {name: "".join(_letter(n) for n, group in enumerate(groups) if name in group) for name in values}


def _split(groups: list[set], a: str, b: str) -> list[set]:
    parts = []
    for group in groups:
        parts += [group - {a}, group - {b}] if {a, b} <= group else [group]
    kept: list[set] = []
    for part in sorted(parts, key=len, reverse=True):
        if part and not any(part <= other for other in kept):
            kept.append(part)
    return kept


def _letter(number: int) -> str:
    return chr(ord("a") + number) if number < 26 else f"({number + 1})"


def _blocks(total: int, width: int) -> Iterator[int]:
    per_block = max(1, BLOCK // max(1, width))
    for start in range(0, total, per_block):
        yield min(per_block, total - start)


@dataclass(frozen=True)
class ScoredRankings:
    """The rankings of one system.

    Attributes:
        gold, rest: scores of gold and of all other candidates.
        top: the best candidate's score, per question.
        confidence: its share in the softmax of the scores at the model's temperature.
        right: whether the best candidate is gold.
    """

    gold: np.ndarray
    rest: np.ndarray
    top: np.ndarray
    confidence: np.ndarray
    right: np.ndarray


def scored_rankings(records: list[dict], temperature: float) -> ScoredRankings | None:
    """Gathers the scores of prediction records; `None` where none has scores and known gold documents."""
    gold: list[float] = []
    rest: list[float] = []
    top, confidence, right = [], [], []
    for record in records:
        if not record["candidate_scores"] or not record["pos_index"]:
            continue
        scores = np.array(record["candidate_scores"])
        is_gold = np.isin(record["ranking"], record["pos_index"])
        gold.extend(scores[is_gold])
        rest.extend(scores[~is_gold])
        top.append(scores[0])
        confidence.append(1 / np.exp((scores - scores[0]) / temperature).sum())
        right.append(is_gold[0])
    if not top:
        return None
    return ScoredRankings(*(np.array(values) for values in (gold, rest, top, confidence, right)))


def separation(found: ScoredRankings) -> float:
    """Probability that a gold candidate's score is above that of another one, over all questions (ROC AUC)."""
    if not len(found.rest) or not len(found.gold):
        return float("nan")
    is_gold = np.repeat([True, False], [len(found.gold), len(found.rest)])
    return float(roc_auc_score(is_gold, np.concatenate([found.gold, found.rest])))


def reliability(values: np.ndarray, right: np.ndarray, bins: int = BINS) -> list[dict[str, float]]:
    """Questions in bins of equal size by `values`: `value` (mean), `right` (share), its 95% Wilson interval, `n`."""
    order = np.argsort(values, kind="stable")
    rows = []
    for part in np.array_split(order, min(bins, len(order))):
        low, high = wilson_interval(int(right[part].sum()), len(part))
        mean = {"value": float(values[part].mean()), "right": float(right[part].mean())}
        rows.append({**mean, "low": low, "high": high, "n": len(part)})
    return rows


def calibration_error(rows: list[dict[str, float]]) -> float:
    """Expected calibration error over bins whose values are probabilities."""
    return sum(row["n"] * abs(row["value"] - row["right"]) for row in rows) / sum(row["n"] for row in rows)
