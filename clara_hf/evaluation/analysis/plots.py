"""Pictures of an analysis, to be read in print and without colour: marks, hatches and line styles tell things apart."""

from pathlib import Path

import matplotlib


matplotlib.use("Agg")
import numpy as np  # noqa: E402 (after the backend is chosen)
from matplotlib import pyplot as plt  # noqa: E402

from clara_hf.evaluation.statistics import ScoredRankings  # noqa: E402


MARKERS = ("o", "s", "^", "D", "v", "X", "P", "*", "<", "p", ">", "h", "8", "d")
LINES = ("-", "--", ":", "-.", (0, (5, 1, 1, 1, 1, 1)))
FONT: dict = {"font.size": 10, "svg.hashsalt": "clara"}


def save(figure, folder: Path, name: str) -> list[str]:
    """Writes PNG and SVG; equal data give equal files."""
    files = [f"{name}.png", f"{name}.svg"]
    figure.savefig(folder / files[0], dpi=160)
    figure.savefig(folder / files[1], metadata={"Date": None})
    plt.close(figure)
    return files


def plot_scores(found: ScoredRankings, system: str, folder: Path, name: str) -> list[str]:
    """Histogram of the scores of gold candidates and of all others."""
    with plt.rc_context(FONT):
        figure, axis = plt.subplots(figsize=(6, 3.4), layout="constrained")
        edges = np.histogram_bin_edges(np.concatenate([found.gold, found.rest]), bins=25)
        shares = {"weights": np.full(len(found.rest), 100 / max(1, len(found.rest)))}
        axis.hist(
            found.rest, edges, histtype="step", color="black", linestyle="--", linewidth=1.2, **shares, label="rest"
        )
        shares = {"weights": np.full(len(found.gold), 100 / max(1, len(found.gold)))}
        style = {"facecolor": "0.85", "edgecolor": "0.35", "hatch": "///", "linewidth": 0.8}
        axis.hist(found.gold, edges, histtype="stepfilled", zorder=0, **style, **shares, label="gold documents")
        axis.set(xlabel=f"score of {system}", ylabel="percent of the group")
        axis.legend(frameon=False)
        return save(figure, folder, name)


def plot_reliability(
    by_score: list[dict], by_confidence: list[dict], error: float, folder: Path, name: str
) -> list[str]:
    """Share of right first documents over the top score, and over its softmax share."""
    with plt.rc_context(FONT):
        figure, axes = plt.subplots(1, 2, figsize=(8.4, 3.6), layout="constrained", sharey=True)
        for axis, rows in zip(axes, (by_score, by_confidence), strict=True):
            values, right = ([row[key] for row in rows] for key in ("value", "right"))
            ends = [[row["right"] - row["low"] for row in rows], [row["high"] - row["right"] for row in rows]]
            axis.errorbar(values, right, yerr=ends, fmt="o-", color="black", capsize=3, markersize=4, linewidth=1)
            axis.set(ylim=(-0.02, 1.02))
            axis.grid(alpha=0.3)
        axes[1].plot([0, 1], [0, 1], color="0.5", linestyle="--", linewidth=1, label="perfectly calibrated")
        axes[1].legend(frameon=False, loc="upper left")
        axes[0].set(xlabel="score of the first document", ylabel="first document is gold (share)")
        axes[1].set(xlabel=f"softmax share of the first document (ECE {error:.2f})", xlim=(-0.02, 1.02))
        return save(figure, folder, name)


def plot_means(texts: np.ndarray, memories: np.ndarray, method: str, folder: Path, name: str) -> list[str]:
    """Document means and memory means in the plane, a line between the two of a document."""
    with plt.rc_context(FONT):
        figure, axis = plt.subplots(figsize=(5.6, 5), layout="constrained")
        if len(texts) <= 300:
            for start, end in zip(texts, memories, strict=True):
                axis.plot(*zip(start, end, strict=True), color="0.8", linewidth=0.5, zorder=0)
        axis.scatter(
            *texts.T, s=16, marker="o", facecolors="none", edgecolors="black", linewidths=0.7, label="document"
        )
        axis.scatter(*memories.T, s=14, marker="x", color="0.35", linewidths=0.9, label="its memory vectors")
        axis.set(xlabel=f"{method} 1", ylabel=f"{method} 2")
        figure.legend(frameon=False, title="mean of", loc="outside upper center", ncols=2)
        return save(figure, folder, name)


def plot_rates(curves: dict[str, list[dict]], folder: Path, name: str) -> list[str]:
    """Answer F1 over the compression rate, one line per system; each point has `rate`, `value`, `low`, `high`."""
    with plt.rc_context(FONT):
        figure, axis = plt.subplots(figsize=(6.4, 4), layout="constrained")
        for number, (system, points) in enumerate(curves.items()):
            # 70 pairs: the two numbers have no divisor in common.
            marker, line = MARKERS[number % len(MARKERS)], LINES[number % len(LINES)]
            values = np.array([[point[key] for key in ("rate", "value", "low", "high")] for point in points])
            ends = 100 * np.abs(values[:, 2:].T - values[:, 1])
            # Beside each other, so that intervals at one rate can be told apart.
            rates = values[:, 0] * 1.02 ** (number - (len(curves) - 1) / 2)
            style = {"marker": marker, "linestyle": line, "color": str(0.55 * number / max(1, len(curves) - 1))}
            axis.errorbar(
                rates, 100 * values[:, 1], yerr=ends, capsize=3, markersize=5, linewidth=1.1, **style, label=system
            )
        rates = sorted({point["rate"] for points in curves.values() for point in points})
        axis.set_xscale("log", base=2)
        axis.set_xticks(rates, [f"{rate:g}" for rate in rates])
        axis.minorticks_off()
        axis.set(xlabel="compression rate", ylabel="answer F1, percent", ylim=(0, None))
        axis.grid(alpha=0.3)
        axis.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
        return save(figure, folder, name)
