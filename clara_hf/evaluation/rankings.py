"""What a system's scores are worth: gold against the rest, and how far a high top score means a right document."""

from dataclasses import dataclass

import numpy as np
from sklearn.metrics import roc_auc_score

from clara_hf.evaluation.statistics import wilson_interval


BINS = 10


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
    gold, rest, top, confidence, right = [], [], [], [], []
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
