"""The report of an evidence suite: Markdown, HTML, a picture and the numbers."""

from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import pyplot as plt

from clara_hf.evaluation.analysis.plots import FONT, save
from clara_hf.evaluation.evidence.claims import NOT_RUN, hierarchical_interval
from clara_hf.evaluation.report import figure_part, page, render
from clara_hf.program import write_json, write_text


TITLE = "Evidence over seeds"
HOW = (
    "Effects are differences of means in percentage points, with 95% intervals of a bootstrap over seeds and "
    "questions (both drawn anew in every resample). A claim is true if its whole interval is above 0, false if it is "
    "below 0, and undecided otherwise, or with fewer than three seeds. A bootstrap over few seeds knows little about "
    "seeds: its intervals are too narrow rather than too wide."
)


def write_report(evidence: dict, folder: Path) -> None:
    """Write `evidence.md`, `.html`, `.png`, `.svg` and, last, `.json`; equal evidence gives equal files."""
    tables = {"Claims": claim_rows(evidence["claims"]), "Means": mean_rows(evidence["means"])}
    facts = facts_of(evidence)
    has_picture = draw(evidence["claims"], folder)
    markdown = [
        f"# {TITLE}",
        facts,
        HOW,
        *(f"## {title}\n\n{render(rows, 'markdown')}" for title, rows in tables.items()),
    ]
    markdown.append("## Runs\n\n" + "\n".join(f"- `{name}`" for name in evidence["runs"]))
    if has_picture:
        markdown.append("![Effects with their intervals](evidence.png)")
    write_text(folder / "evidence.md", "\n\n".join(markdown) + "\n")
    parts: list[dict[str, Any]] = [{"text": facts}, {"text": HOW}]
    for title, rows in tables.items():
        parts += [{"heading": title, "level": 2}, {"rows": rows}]
    if has_picture:
        parts.append(figure_part(folder / "evidence.svg", "effects of the claims", "Effects with 95% intervals."))
    write_text(folder / "evidence.html", page(TITLE, parts))
    write_json(folder / "evidence.json", {name: value for name, value in evidence.items() if name != "means"})


def facts_of(evidence: dict) -> str:
    seeds = ", ".join(map(str, evidence["seeds"]))
    code = ", ".join(f"{stage} {digest}" for stage, digest in evidence["code"].items())
    return f"Seeds {seeds}; {evidence['questions']} questions; commit {evidence['commit']}; code of {code}."


def claim_rows(claims: dict[str, dict]) -> list[list[str]]:
    rows = [["claim", "says", "measure", "effect", "by seed", "verdict"]]
    for name, row in claims.items():
        if row["verdict"] == NOT_RUN:
            rows.append([name, row["states"], row["metric"] or "–", "–", "–", f"{NOT_RUN}: {row['why']}"])
            continue
        measure = f"{row['metric']}: {row['better']} − {row['worse']}" + (f" ({row['type']})" if row["type"] else "")
        by_seed = " ".join(f"{100 * value:+.1f}" for value in row["by_seed"])
        rows.append([name, row["states"], measure, interval(row["effect"], row["low"], row["high"]), by_seed])
        rows[-1].append(row["verdict"])
    return rows


def interval(mean: float, low: float, high: float, sign: str = "+") -> str:
    return f"{100 * mean:{sign}.1f} [{100 * low:{sign}.1f}, {100 * high:{sign}.1f}]"


def mean_rows(means: dict[str, dict[tuple[str, str], np.ndarray]]) -> list[list[str]]:
    names = list(dict.fromkeys(name for found in means.values() for name in found))
    rows = [["variant", "system", *means]]
    for name in names:
        cells = []
        for found in means.values():
            values = found.get(name)
            cells.append(
                "–" if values is None else interval(np.nanmean(values), *hierarchical_interval(values), sign="")
            )
        rows.append([*name, *cells])
    return rows


def draw(claims: dict[str, dict], folder: Path) -> bool:
    """A forest plot of the effects; `False` where no claim has one."""
    shown = {name: row for name, row in claims.items() if row["verdict"] != NOT_RUN}
    if not shown:
        return False
    with plt.rc_context(FONT):
        figure, axis = plt.subplots(figsize=(7, 1 + 0.35 * len(shown)), layout="constrained")
        for place, row in enumerate(reversed(shown.values())):
            low, mean, high = (100 * row[key] for key in ("low", "effect", "high"))
            axis.plot([low, high], [place, place], color="black", linewidth=1.2)
            axis.plot(mean, place, "o", color="black")
            axis.plot([100 * value for value in row["by_seed"]], [place] * row["seeds"], "|", color="0.5")
        labels = [row["title"] or f"{name}: {row['metric']}" for name, row in reversed(shown.items())]
        axis.set_yticks(range(len(shown)), labels)
        axis.axvline(0, color="0.6", linewidth=0.8, linestyle="--")
        axis.set(xlabel="effect, percentage points", ylim=(-0.6, len(shown) - 0.4))
        save(figure, folder, "evidence")
    return True
