"""Results as tables: aligned text, Markdown, CSV. `eval/results.py` says what `results` holds."""

import csv
import io
import json

from clara_hf.evaluation.costs import COST_COLUMNS
from clara_hf.evaluation.results import datasets_of, marks, parts_of
from clara_hf.evaluation.statistics import LEVEL


TERMINAL_COLUMNS = {"F1": "f1", "EM": "em", "R@1": "recall@1", "R@5": "recall@5", "all@5": "all_gold@5"}
MARKDOWN_COLUMNS = {
    "F1": "f1",
    "EM": "em",
    "cover-EM": "cover_em",
    "grounded": "grounding",
    "R@1": "recall@1",
    "R@3": "recall@3",
    "R@5": "recall@5",
    "all@5": "all_gold@5",
    "MRR": "mrr",
    "nDCG@5": "ndcg@5",
}
NOTE = (
    "Percent, with 95% intervals: Wilson's for scores of 0 or 1, else bootstrap. n: questions answered / ranked with "
    "known gold\ndocuments. grounded: share of an answer's words that stand in the documents it was given from.\n"
    "Two systems that share a letter in a column are not distinguishable there (paired permutation test, Holm-adjusted "
    f"p of {1 - LEVEL:.2f} or more)."
)
PUBLISHED_NOTE = (
    "Published figures are from other questions, candidates and models: compare with care. Shown are those for "
    "candidates\nand a compression rate like the measured ones, where there are such; table.csv holds all."
)
COST_NOTE = (
    "Per question, measured on this run. compress: preparing the documents that a question needs, at the time per "
    "document;\nall, stored: without that, for documents prepared before. peak: allocated on the accelerator, or held "
    "by the whole process."
)
NONE = "–"


def format_tables(results: dict, markdown: bool = False) -> str:
    """All tables of a run, in percent with 95% intervals: aligned text, or Markdown with more columns.

    Equal scores give equal tables: what was measured by the clock is in `format_costs`.
    """
    columns = MARKDOWN_COLUMNS if markdown else TERMINAL_COLUMNS
    parts = []
    for dataset, kind, systems, tests in parts_of(results):
        title = ", ".join(filter(None, [dataset, kind and f"type {kind}"]))
        parts.append(titled(title, render(score_rows(systems, tests, columns), markdown), markdown))
    notes = [NOTE]
    for title, rows in published_tables(results, columns):
        parts.append(titled(title, render(rows, markdown), markdown))
        notes = [NOTE, PUBLISHED_NOTE]
    return "\n\n".join([*parts, *notes]) + "\n"


def format_costs(results: dict, markdown: bool = False) -> str:
    """What the systems cost, per data file."""
    parts = []
    for dataset, found in datasets_of(results).items():
        if "costs" in found:
            title = ", ".join(filter(None, [dataset, "cost per question"]))
            parts.append(titled(title, render(cost_rows(found["costs"]), markdown), markdown))
    return "\n\n".join([*parts, COST_NOTE]) + "\n" if parts else ""


def score_rows(systems: dict, tests: dict, columns: dict[str, str]) -> list[list[str]]:
    """A table's heading and rows; a column that no system has is left out."""
    present = {title: name for title, name in columns.items() if any(name in row for row in systems.values())}
    shared = marks(systems, tests)
    widths = {name: max(map(len, found.values())) for name, found in shared.items()}
    rows = [["system", *present, "n"]]
    for system, summary in systems.items():
        answered, ranked = (summary[name]["n"] if name in summary else NONE for name in ("f1", "mrr"))
        cells = []
        for name in present.values():
            letters = shared.get(name, {}).get(system, "").ljust(widths.get(name, 0))
            cells.append(f"{_cell(summary.get(name))} {letters}" if name in shared else _cell(summary.get(name)))
        rows.append([system, *cells, f"{answered} / {ranked}"])
    return rows


def cost_rows(costs: dict[str, dict]) -> list[list[str]]:
    """Heading and rows of the costs of one data file."""
    rows = [["system", *COST_COLUMNS]]
    for system, values in costs.items():
        cells = [NONE if values[name] is None else f"{values[name]:,.1f}" for name in COST_COLUMNS.values()]
        rows.append([system, *cells])
    return rows


def published_tables(results: dict, columns: dict[str, str]) -> list[tuple[str, list[list[str]]]]:
    """Titles and tables of published figures that are near the run; data files with the same ones share a table."""
    tables: dict[str, tuple[list, list[str | None]]] = {}
    for dataset, found in datasets_of(results).items():
        rows = [row for row in found.get("published", []) if row.get("near", True)]
        if any(name in row["values"] for row in rows for name in columns.values()):
            tables.setdefault(json.dumps(rows), (rows, []))[1].append(dataset)
    shown = []
    for rows, datasets in tables.values():
        origin = f"published, not measured here: {rows[0]['source']}; base {rows[0]['base']}"
        shown.append((", ".join(filter(None, [*datasets, origin])), published_rows(rows, columns)))
    return shown


def published_rows(published: list[dict], columns: dict[str, str]) -> list[list[str]]:
    """Heading and rows of published figures, without columns and rows that would hold none."""
    present = {title: name for title, name in columns.items() if any(name in row["values"] for row in published)}
    rows = [["system", "candidates", *present]]
    for row in published:
        cells = [f"{100 * row['values'][name]:.1f}" if name in row["values"] else NONE for name in present.values()]
        if set(cells) > {NONE} or NONE not in cells:
            rows.append([row["system"], row["pool"], *cells])
    return rows


def titled(title: str, table: str, markdown: bool) -> str:
    if not title:
        return table
    return f"## {title}\n\n{table}" if markdown else f"{title}\n{table}"


def render(rows: list[list[str]], markdown: bool) -> str:
    """Rows of cells, the heading first, as an aligned table; the first column to the left, the others to the right."""
    if markdown:
        rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        for row in rows
    ]
    if markdown:
        rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
        return "\n".join("| " + " | ".join(line) + " |" for line in [lines[0], rule, *lines[1:]])
    lines.insert(1, ["─" * width for width in widths])
    return "\n".join("  ".join(line).rstrip() for line in lines)


def scores_csv(results: dict) -> str:
    """One line per data file, type, system and metric; published figures have their source and no interval."""
    lines = [["dataset", "type", "system", "metric", "value", "low", "high", "n", "letters", "source"]]
    for dataset, kind, systems, tests in parts_of(results):
        shared = marks(systems, tests)
        for system, summary in systems.items():
            for metric, number in summary.items():
                ends = [number[name] for name in ("value", "low", "high", "n")]
                lines.append([dataset, kind, system, metric, *ends, shared.get(metric, {}).get(system), "measured"])
    for dataset, found in datasets_of(results).items():
        for row in found.get("published", []):
            name, origin = f"{row['system']}, {row['pool']}", f"published: {row['source']}; base {row['base']}"
            lines += [
                [dataset, None, name, metric, value, *4 * [None], origin] for metric, value in row["values"].items()
            ]
    return _csv(lines)


def costs_csv(results: dict) -> str:
    """One line per data file and system."""
    lines = [["dataset", "system", *COST_COLUMNS.values()]]
    for dataset, found in datasets_of(results).items():
        lines += [[dataset, system, *values.values()] for system, values in found.get("costs", {}).items()]
    return _csv(lines)


def _csv(lines: list[list]) -> str:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(lines)
    return text.getvalue()


def _cell(number: dict | None) -> str:
    if number is None:
        return NONE
    value, low, high = (f"{100 * number[end]:.1f}" for end in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"
