"""From per-question scores to numbers with intervals, tables and files.

`results` is what `results.json` holds: `systems` (system -> metric -> `value`, `low`, `high`, `n`; values from 0 to 1),
`by_type` (type -> the same) where questions have types, `seconds` and `settings`. For several data files `systems` and
`by_type` stand under `datasets` and the file's name.
"""

import json
import os
import shutil
from pathlib import Path

import numpy as np

from eval.data import QAExample
from eval.metrics.answer_f1.answer_f1 import ANSWER_METRICS


LEVEL = 0.95
RESAMPLES = 2000
# Numbers held at once while resampling, so that a long data file does not need gigabytes.
BLOCK = 4_000_000
RESULTS, TABLE, PREDICTIONS = "results.json", "table.md", "predictions"
TERMINAL_COLUMNS = {"F1": "f1", "EM": "em", "R@1": "recall@1", "R@5": "recall@5", "all@5": "all_gold@5"}
MARKDOWN_COLUMNS = {
    "F1": "f1",
    "EM": "em",
    "cover-EM": "cover_em",
    "R@1": "recall@1",
    "R@3": "recall@3",
    "R@5": "recall@5",
    "all@5": "all_gold@5",
    "MRR": "mrr",
    "nDCG@5": "ndcg@5",
}


def bootstrap_interval(values: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """95% percentile bootstrap intervals of the means of columns, over 2,000 resamples of the rows.

    All columns, and all calls with as many rows and the same seed, see the same resamples.

    Args:
        values: `[n, columns]`, one row per question.
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
    chance = np.random.default_rng(seed)
    means = []
    rows_per_block = max(1, BLOCK // n)
    for start in range(0, RESAMPLES, rows_per_block):
        rows = min(rows_per_block, RESAMPLES - start)
        drawn = chance.integers(n, size=(rows, n)) + n * np.arange(rows)[:, None]
        means.append(np.bincount(drawn.ravel(), minlength=rows * n).reshape(rows, n) @ values / n)
    low, high = np.quantile(np.concatenate(means), [(1 - LEVEL) / 2, (1 + LEVEL) / 2], axis=0)
    return low, high


def summarize(records: list[dict], seed: int) -> dict[str, dict]:
    """Mean, interval and count of every metric in the records' `scores`.

    A record holds answer metrics, retrieval metrics, both or none; a metric's count is that of the records with it.
    """
    summary = {}
    names = list(dict.fromkeys(name for record in records for name in record["scores"]))
    for group in ([n for n in names if n in ANSWER_METRICS], [n for n in names if n not in ANSWER_METRICS]):
        rows = [
            [record["scores"][name] for name in group] for record in records if group and group[0] in record["scores"]
        ]
        if rows:
            columns = np.mean(rows, axis=0), *bootstrap_interval(rows, seed)
            for name, value, low, high in zip(group, *(column.tolist() for column in columns), strict=True):
                summary[name] = {"value": value, "low": low, "high": high, "n": len(rows)}
    return summary


def dataset_results(examples: list[QAExample], records: dict[str, list[dict]], seed: int) -> dict:
    """`systems`, and `by_type` where any question has a type, for one data file.

    Args:
        records: per system one record per example, in their order.
    """
    results = {"systems": {name: summarize(rows, seed) for name, rows in records.items()}}
    types = sorted({example.type for example in examples if example.type})
    if types:
        results["by_type"] = {}
        for kind in types:
            chosen = [index for index, example in enumerate(examples) if example.type == kind]
            results["by_type"][kind] = {
                name: summarize([rows[index] for index in chosen], seed) for name, rows in records.items()
            }
    return results


def format_tables(results: dict, markdown: bool = False) -> str:
    """All tables of a run, in percent with 95% intervals: aligned text, or Markdown with more columns."""
    datasets = results.get("datasets") or {None: results}
    parts = []
    for dataset, found in datasets.items():
        for kind, systems in {None: found["systems"], **found.get("by_type", {})}.items():
            title = ", ".join(filter(None, [dataset, kind and f"type {kind}"]))
            table = _table(systems, MARKDOWN_COLUMNS if markdown else TERMINAL_COLUMNS, markdown)
            heading = f"## {title}\n\n" if markdown else f"{title}\n"
            parts.append((heading if title else "") + table)
    note = "Percent, with 95% bootstrap intervals. n: questions answered / ranked with known gold documents."
    return "\n\n".join([*parts, note]) + "\n"


def _table(systems: dict, columns: dict[str, str], markdown: bool) -> str:
    present = {title: name for title, name in columns.items() if any(name in row for row in systems.values())}
    rows = [["system", *present, "n"]]
    for system, summary in systems.items():
        answered, ranked = (summary[name]["n"] if name in summary else "–" for name in ("f1", "mrr"))
        cells = [_cell(summary.get(name)) for name in present.values()]
        rows.append([system, *cells, f"{answered} / {ranked}"])
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        for row in rows
    ]
    if markdown:
        rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
        return "\n".join("| " + " | ".join(line) + " |" for line in [lines[0], rule, *lines[1:]])
    lines.insert(1, ["─" * width for width in widths])
    return "\n".join("  ".join(line) for line in lines)


def _cell(number: dict | None) -> str:
    if number is None:
        return "–"
    value, low, high = (f"{100 * number[end]:.1f}" for end in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def holds_run(folder: str | Path) -> bool:
    """Whether a run was written to the folder, whole or in part."""
    return any((Path(folder) / name).exists() for name in (RESULTS, TABLE, PREDICTIONS))


def read_results(folder: str | Path) -> dict | None:
    """The results of a finished run in the folder, or `None`."""
    path = Path(folder) / RESULTS
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def write_run(folder: str | Path, results: dict, records: dict[str, dict[str, list[dict]]]) -> None:
    """Writes `predictions/<system>.jsonl`, `table.md` and `results.json`.

    Several data files have a folder each in `predictions`. Earlier results go only when everything new is on the disk,
    and `results.json` comes last, so that a folder which has it is whole.

    Args:
        records: per data file, per system, one record per question.
    """
    folder = Path(folder)
    staged = folder / ".eval.tmp"
    shutil.rmtree(staged, ignore_errors=True)
    try:
        for dataset, systems in records.items():
            target = staged / PREDICTIONS / (dataset if len(records) > 1 else "")
            target.mkdir(parents=True)
            for system, rows in systems.items():
                lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
                (target / f"{system}.jsonl").write_text("".join(lines), encoding="utf-8")
        (staged / TABLE).write_text(format_tables(results, markdown=True), encoding="utf-8")
        text = json.dumps(results, indent=2, ensure_ascii=False) + "\n"
        (staged / RESULTS).write_text(text, encoding="utf-8")
        (folder / RESULTS).unlink(missing_ok=True)
        shutil.rmtree(folder / PREDICTIONS, ignore_errors=True)
        for name in (PREDICTIONS, TABLE, RESULTS):
            os.replace(staged / name, folder / name)
    finally:
        shutil.rmtree(staged, ignore_errors=True)
