"""Results as tables: aligned text, Markdown, LaTeX, CSV, HTML. `clara_hf/evaluation/results.py` says what they hold."""

import base64
import csv
import io
import json
from collections.abc import Iterable
from pathlib import Path

from jinja2 import Environment, PackageLoader

from clara_hf.evaluation.scores import COLUMNS, TERMINAL
from clara_hf.evaluation.statistics import LEVEL, letters


COST_COLUMNS = {
    "compress_ms": "compress ms",
    "query_ms": "query ms",
    "decode_ms": "decode ms",
    "total_ms": "all ms",
    "total_ms_stored": "all ms, stored",
    "prompt_tokens": "prompt tokens",
    "peak_mib": "peak MiB",
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
LATEX = str.maketrans(
    {**{mark: f"\\{mark}" for mark in "&%$#_{}"}, "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\^{}"}
    | {"–": "--", "[": "{[}"}
)


def format_tables(results: dict, form: str = "text") -> str:
    """All tables of a run, in percent with 95% intervals; all but `"text"` have more columns.

    Equal scores give equal tables: what was measured by the clock is in `format_costs`.

    Args:
        form: `"text"` (aligned), `"markdown"` or `"latex"`.
    """
    names = TERMINAL if form == "text" else tuple(COLUMNS)
    tables = score_tables(results, names)
    published = published_tables(results, names)
    notes = [NOTE, PUBLISHED_NOTE] if published else [NOTE]
    tables += judge_tables(results)
    shown = [titled(title, render(rows, form), form) for title, rows in [*tables, *published]]
    return "\n\n".join([*shown, *(_note(note, form) for note in notes)]) + "\n"


def format_costs(results: dict, form: str = "text") -> str:
    """What the systems cost, per data file."""
    shown = [titled(title, render(rows, form), form) for title, rows in cost_tables(results)]
    return "\n\n".join([*shown, _note(COST_NOTE, form)]) + "\n" if shown else ""


def html_parts(results: dict) -> list[dict]:
    """Tables, costs and notes as parts of a [`page`]."""
    published = published_tables(results, tuple(COLUMNS))
    parts = [*_html_tables(score_tables(results, tuple(COLUMNS)) + judge_tables(results)), {"text": NOTE}]
    if published:
        parts += [*_html_tables(published), {"text": PUBLISHED_NOTE}]
    costs = cost_tables(results)
    return parts + ([*_html_tables(costs), {"text": COST_NOTE}] if costs else [])


def _html_tables(tables: list[tuple[str, list[list[str]]]]) -> list[dict]:
    return [
        part
        for title, rows in tables
        for part in (*([{"heading": title, "level": 3}] if title else []), {"rows": rows})
    ]


def figure_part(svg: Path, shows: str, caption: str) -> dict:
    """A picture as a part of a [`page`], which holds it."""
    data = base64.b64encode(svg.read_bytes()).decode()
    return {"image": f"data:image/svg+xml;base64,{data}", "shows": shows, "caption": caption}


def page(title: str, parts: list[dict]) -> str:
    """A whole HTML document, which loads nothing and runs nothing; every text in it is escaped.

    Args:
        parts: each with `heading` and `level`, `text`, `rows` (of a table, the heading first), `image`, `shows` and
            `caption`, or `lens` (rows of `question` and `tokens`).
    """
    environment = Environment(loader=PackageLoader("clara_hf.evaluation"), autoescape=True, trim_blocks=True)
    return environment.get_template("report.html").render(title=title, parts=parts)


def datasets_of(results: dict) -> dict[str | None, dict]:
    """The results of each data file."""
    return results.get("datasets") or {None: results}


def parts_of(results: dict) -> list[tuple[str | None, str | None, dict, dict]]:
    """Data file, type (`None` for all), systems and tests of each table."""
    parts = []
    for dataset, found in datasets_of(results).items():
        parts.append((dataset, None, found["systems"], found.get("tests", {})))
        for kind, systems in found.get("by_type", {}).items():
            parts.append((dataset, kind, systems, found.get("tests_by_type", {}).get(kind, {})))
    return parts


def marks(systems: dict, tests: dict) -> dict[str, dict[str, str]]:
    """Per metric with tests, each system's letters."""
    return {
        metric: letters({name: row[metric]["value"] for name, row in systems.items() if metric in row}, pairs)
        for metric, pairs in tests.items()
    }


def _title(results: dict, dataset: str | None, *more: str | None) -> str:
    """A data file's name stands in titles where there are several."""
    return ", ".join(filter(None, [dataset if len(datasets_of(results)) > 1 else None, *more]))


def shown_systems(systems: Iterable[str]) -> dict[str, str]:
    """Systems as tables show them: of a model's path the end, as much of it as tells it from the others.

    Names on the Hub, and what is as short, stay whole.
    """
    found, length = list(systems), 1
    while True:
        shown = {name: _shortened(name, length) for name in found}
        if len(set(shown.values())) == len(shown) or length > max(name.count("/") for name in found):
            return shown
        length += 1


def _shortened(system: str, length: int) -> str:
    kind, _, name = system.partition(" ")
    parts = [part for part in name.replace("\\", "/").split("/") if part not in ("", ".", "..")]
    is_short = name.count("/") < 2 and not name.startswith((".", "/", "~"))
    return system if is_short else f"{kind} {'/'.join(parts[-length:])}"


def score_tables(results: dict, names: tuple[str, ...]) -> list[tuple[str, list[list[str]]]]:
    """Titles and tables of scores."""
    return [
        (_title(results, dataset, kind and f"type {kind}"), score_rows(systems, tests, names))
        for dataset, kind, systems, tests in parts_of(results)
    ]


def judge_tables(results: dict) -> list[tuple[str, list[list[str]]]]:
    """Titles and tables of how far the judge agrees with F1."""
    tables = []
    for dataset, found in datasets_of(results).items():
        shown = shown_systems(found.get("judge", ()))
        rows = [
            [
                shown[name],
                str(one["n"]),
                f"{100 * one['share']:.1f}",
                NONE if one["kappa"] is None else f"{one['kappa']:.2f}",
            ]
            for name, one in found.get("judge", {}).items()
        ]
        if rows:
            title = _title(results, dataset, "judge beside F1 of 50 or more")
            tables.append((title, [["system", "n", "same verdict", "kappa"], *rows]))
    return tables


def cost_tables(results: dict) -> list[tuple[str, list[list[str]]]]:
    """Titles and tables of costs."""
    found = {dataset: found["costs"] for dataset, found in datasets_of(results).items() if "costs" in found}
    return [(_title(results, dataset, "cost per question"), cost_rows(costs)) for dataset, costs in found.items()]


def score_rows(systems: dict, tests: dict, names: tuple[str, ...]) -> list[list[str]]:
    """A table's heading and rows; a column that no system has is left out."""
    present = {COLUMNS[name]: name for name in names if any(name in row for row in systems.values())}
    shared = marks(systems, tests)
    widths = {name: max(map(len, found.values())) for name, found in shared.items()}
    rows, shown = [["system", *present, "n"]], shown_systems(systems)
    for system, summary in systems.items():
        answered, ranked = (summary[name]["n"] if name in summary else NONE for name in ("f1", "mrr"))
        cells = []
        for name in present.values():
            letters = shared.get(name, {}).get(system, "").ljust(widths.get(name, 0))
            cells.append(f"{_cell(summary.get(name))} {letters}" if name in shared else _cell(summary.get(name)))
        rows.append([shown[system], *cells, f"{answered} / {ranked}"])
    return rows


def cost_rows(costs: dict[str, dict]) -> list[list[str]]:
    """Heading and rows of the costs of one data file."""
    rows, shown = [["system", *COST_COLUMNS.values()]], shown_systems(costs)
    for system, values in costs.items():
        cells = [NONE if values[name] is None else f"{values[name]:,.1f}" for name in COST_COLUMNS]
        rows.append([shown[system], *cells])
    return rows


def published_tables(results: dict, names: tuple[str, ...]) -> list[tuple[str, list[list[str]]]]:
    """Titles and tables of published figures that are near the run; data files with the same ones share a table."""
    tables: dict[str, tuple[list, list[str | None]]] = {}
    for dataset, found in datasets_of(results).items():
        rows = [row for row in found.get("published", []) if row.get("near", True)]
        if any(name in row["values"] for row in rows for name in names):
            tables.setdefault(json.dumps(rows), (rows, []))[1].append(dataset)
    shown = []
    for rows, datasets in tables.values():
        origin = f"published, not measured here: {rows[0]['source']}; base {rows[0]['base']}"
        named = datasets if len(datasets_of(results)) > 1 else []
        shown.append((", ".join([*named, origin]), published_rows(rows, names)))
    return shown


def published_rows(published: list[dict], names: tuple[str, ...]) -> list[list[str]]:
    """Heading and rows of published figures, without columns and rows that would hold none."""
    present = {COLUMNS[name]: name for name in names if any(name in row["values"] for row in published)}
    rows = [["system", "candidates", *present]]
    for row in published:
        cells = [f"{100 * row['values'][name]:.1f}" if name in row["values"] else NONE for name in present.values()]
        if set(cells) > {NONE} or NONE not in cells:
            rows.append([row["system"], row["pool"], *cells])
    return rows


def titled(title: str, table: str, form: str) -> str:
    head = {"text": "{}\n", "markdown": "## {}\n\n", "latex": "% {}\n"}[form]
    return head.format(title) + table if title else table


def _note(note: str, form: str) -> str:
    return note if form != "latex" else "\n".join(f"% {line}" for line in note.splitlines())


def render(rows: list[list[str]], form: str) -> str:
    """Rows of cells, the heading first, as an aligned table; the first column to the left, the others to the right."""
    if form == "markdown":
        rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    if form == "latex":
        rows = [[cell.translate(LATEX) for cell in row] for row in rows]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = [
        [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        for row in rows
    ]
    if form == "markdown":
        rule = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
        return "\n".join("| " + " | ".join(line) + " |" for line in [lines[0], rule, *lines[1:]])
    if form == "latex":
        head, *body = [" & ".join(line) + r" \\" for line in lines]
        begin = [rf"\begin{{tabular}}{{l{'r' * (len(widths) - 1)}}}", r"\toprule", head, r"\midrule"]
        return "\n".join([*begin, *body, r"\bottomrule", r"\end{tabular}"])
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
    lines = [["dataset", "system", *COST_COLUMNS]]
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
