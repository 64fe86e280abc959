"""From per-question scores to numbers with intervals and paired tests, and to tables.

`Results.data` is what `results.json` holds: `datasets` (data file -> `systems`, `tests`, `by_type`, `tests_by_type`,
`costs`, `published`), `checkpoints`, `seconds` and `settings`. `systems`: system -> metric -> `value`, `low`, `high`,
`n`; values from 0 to 1. `tests`: metric -> one entry per two systems. `by_type`, `tests_by_type`: the same per type,
where questions have types. `costs`: system -> milliseconds, tokens and memory. `published`: where a reference is given.
"""

import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from clara_hf.data.schema import QAExample
from clara_hf.data.sources import source_name
from clara_hf.evaluation import report
from clara_hf.evaluation.plan import UsageError, file_name
from clara_hf.evaluation.scores import COLUMNS, scores_of
from clara_hf.evaluation.statistics import intervals, paired_tests
from clara_hf.program.files import read_json, write_text
from clara_hf.program.paths import is_plain_name


RESULTS, PREDICTIONS, TREC = "results.json", "predictions", "trec"
TABLES = ("table.md", "table.csv", "costs.md", "costs.csv")
STAGED = ".eval.tmp"


def question_record(example: QAExample, ranking: dict | None, answer: dict | None, documents: list[str] | None) -> dict:
    """What is kept of one question of a system, with its scores: those of every metric that applies to it.

    Args:
        ranking: `order` (candidate positions, best first) and `scores`, for a system that ranks.
        answer: `prediction`, for one that answers.
        documents: what it answered from.
    """
    return {
        "id": example.id,
        "question": example.question,
        "answers": example.answers,
        "pos_index": example.pos_index,
        "prediction": answer and answer["prediction"],
        "ranking": ranking and ranking["order"],
        "candidate_scores": ranking and ranking["scores"],
        "scores": scores_of(example, ranking, answer, documents),
    }


def dataset_results(examples: list[QAExample], records: dict[str, list[dict]], seed: int) -> dict:
    """`systems` and `tests`, and the same by type where any question has a type, for one data file.

    Args:
        records: per system one record per example, in their order.
    """
    systems = {name: summarize(rows, seed) for name, rows in records.items()}
    results: dict[str, dict] = {"systems": systems, "tests": compare(records, seed)}
    types = sorted({example.type for example in examples if example.type})
    if types:
        results["by_type"], results["tests_by_type"] = {}, {}
        for kind in types:
            chosen = [index for index, example in enumerate(examples) if example.type == kind]
            part = {name: [rows[index] for index in chosen] for name, rows in records.items()}
            results["by_type"][kind] = {name: summarize(rows, seed) for name, rows in part.items()}
            results["tests_by_type"][kind] = compare(part, seed)
    return results


def summarize(records: list[dict], seed: int) -> dict[str, dict]:
    """Mean, interval and count of every metric in the records' `scores`.

    A record may lack any metric; a metric's count is that of the records with it.
    """
    names = list(dict.fromkeys(name for record in records for name in record["scores"]))
    if not names:
        return {}
    values = np.array([[record["scores"].get(name, np.nan) for name in names] for record in records])
    columns = np.nanmean(values, axis=0), *intervals(values, seed), (~np.isnan(values)).sum(axis=0)
    rows = zip(names, *(column.tolist() for column in columns), strict=True)
    return {name: {"value": mean, "low": low, "high": high, "n": n} for name, mean, low, high, n in rows}


def compare(records: dict[str, list[dict]], seed: int) -> dict[str, list[dict]]:
    """Paired tests between all systems, for each metric of the tables that two of them have."""
    found = {}
    for metric in COLUMNS:
        scores = {
            name: np.array([row["scores"].get(metric, np.nan) for row in rows])
            for name, rows in records.items()
            if any(metric in row["scores"] for row in rows)
        }
        if tests := paired_tests(scores, seed):
            found[metric] = tests
    return found


def judge_agreement(records: dict[str, list[dict]]) -> dict[str, dict]:
    """How far the judge and F1 say the same, per system that it judged: `n`, the share of answers on which the verdict
    is that of F1 of at least 0.5, and Cohen's kappa (`None` where one of both knows one verdict only)."""
    found = {}
    for system, rows in records.items():
        pairs = [(row["scores"]["judged"] > 0, row["scores"]["f1"] >= 0.5) for row in rows if "judged" in row["scores"]]
        if pairs:
            agreed = sum(one == other for one, other in pairs) / len(pairs)
            chance = sum(
                np.mean([one == kind for one, _ in pairs]) * np.mean([other == kind for _, other in pairs])
                for kind in (True, False)
            )
            kappa = None if chance == 1 else float((agreed - chance) / (1 - chance))
            found[system] = {"n": len(pairs), "share": agreed, "kappa": kappa}
    return found


def system_costs(
    parts: list[tuple[float, float | None]], rankings: list[dict], answers: list[dict]
) -> dict[str, float | None]:
    """Milliseconds, tokens and memory of one system, per question; `None` for what was not measured.

    Args:
        parts: documents per question that are prepared in some way, and the milliseconds for one.
        rankings, answers: the cached records, with `ms`, `mib`, and `prompt_tokens` of answers.

    Returns:
        `compress_ms`: preparing the documents of a question (compressing, embedding, indexing or shortening them), at
        the measured time per document. `query_ms`: ranking; `decode_ms`: answering, its prompt included. `total_ms` is
        their sum, `total_ms_stored` that without `compress_ms`, as for documents that were prepared before.
        `prompt_tokens`: mean length of the prompt. `peak_mib`: on an accelerator, the most that was allocated in a
        batch; else the most memory that the process held after one.
    """
    times = {
        "compress_ms": _total(count * each for count, each in parts if each is not None),
        "query_ms": _mean(row["ms"] for row in rankings),
        "decode_ms": _mean(row["ms"] for row in answers),
    }
    return {
        **times,
        "total_ms": _total(times.values()),
        "total_ms_stored": _total([times["query_ms"], times["decode_ms"]]),
        "prompt_tokens": _mean(row["prompt_tokens"] for row in answers),
        "peak_mib": max((row["mib"] for row in [*rankings, *answers]), default=None),
    }


def _mean(values: Iterable[float]) -> float | None:
    known = list(values)
    return sum(known) / len(known) if known else None


def _total(values: Iterable[float | None]) -> float | None:
    """The sum of those that are known."""
    known = [value for value in values if value is not None]
    return sum(known) if known else None


@dataclass
class Results:
    """What came of an evaluation.

    Attributes:
        data: what `results.json` holds, see the module.
        records: per data file and system one record per question: `id`, `question`, `answers`, `pos_index`,
            `prediction`, `ranking`, `candidate_scores` (`None` where the system gives none) and `scores`.
    """

    data: dict
    records: dict[str, dict[str, list[dict]]] = field(default_factory=dict)

    @property
    def datasets(self) -> dict[str, dict]:
        """The results of each data file."""
        return self.data["datasets"]

    def metrics(self, names: Sequence[str] | None = None) -> dict[str, float]:
        """Plain numbers: `<system>_<metric>`, with several data files `<dataset>_<system>_<metric>`."""
        return {
            "_".join([*([dataset] if len(self.datasets) > 1 else []), system, metric]): number["value"]
            for dataset, found in self.datasets.items()
            for system, summary in found["systems"].items()
            for metric, number in summary.items()
            if names is None or metric in names
        }

    def to_text(self) -> str:
        """The tables in aligned columns, for a terminal."""
        return report.format_tables(self.data, "text")

    def to_markdown(self) -> str:
        """The tables, with more columns."""
        return report.format_tables(self.data, "markdown")

    def to_latex(self) -> str:
        """The tables as `tabular` environments; they need the package `booktabs`."""
        return report.format_tables(self.data, "latex")

    def to_html(self) -> str:
        """One page with tables and costs, which loads nothing and runs nothing."""
        return report.page("CLaRa evaluation", report.html_parts(self.data))

    def to_csv(self) -> str:
        """One line per data file, type, system and metric."""
        return report.scores_csv(self.data)

    def to_json(self) -> str:
        return json.dumps(self.data, indent=2, ensure_ascii=False) + "\n"

    def to_trec(self, folder: str | Path) -> None:
        """Writes `qrels.txt` and a `.run` per ranking system, in a folder per data file where there are several.

        A document's name is its question's id and its position among the candidates. Equal scores, and
        those of systems that only order, are made to fall by the least that 32 bits can tell, so that every tool sees
        the order that was measured.

        Raises:
            ValueError: an id holds white space, which the format cannot.
        """
        for dataset, systems in self.records.items():
            target = Path(folder) / (dataset if len(self.records) > 1 else "")
            for name, text in _trec_files(systems):
                target.mkdir(parents=True, exist_ok=True)
                (target / name).write_text(text, encoding="utf-8")

    def save(self, folder: str | Path, trec: bool = False) -> None:
        """Writes `predictions/<system>.jsonl`, the tables, `results.json` and, if asked for, `trec/`.

        Several data files have a folder each in `predictions`. Earlier results go only when everything new is on the
        disk, and `results.json` comes last, so that a folder which has it is whole. What is interrupted in between is
        finished by the next call.
        """
        folder = Path(folder)
        with _staged(folder) as staged:
            for dataset, systems in self.records.items():
                target = staged / PREDICTIONS / (dataset if len(self.records) > 1 else "")
                target.mkdir(parents=True, exist_ok=True)
                for system, rows in systems.items():
                    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
                    (target / f"{file_name(system)}.jsonl").write_text("".join(lines), encoding="utf-8")
            if trec:
                self.to_trec(staged / TREC)
            self._write_tables(staged)

    def save_tables(self, folder: str | Path) -> None:
        """Writes the tables and `results.json` of a finished run again; its predictions stay."""
        with _staged(Path(folder)) as staged:
            self._write_tables(staged)

    def _write_tables(self, folder: Path) -> None:
        costs = report.format_costs(self.data, "markdown"), report.costs_csv(self.data)
        for name, text in zip(TABLES, (self.to_markdown(), self.to_csv(), *costs), strict=True):
            (folder / name).write_text(text, encoding="utf-8")
        write_text(folder / RESULTS, self.to_json())  # last and whole: with it, all is there

    @classmethod
    def load(cls, folder: str | Path) -> "Results | None":
        """The results of a finished run in the folder, or `None`. The layout of earlier versions is read, too.

        Raises:
            UsageError: the file is damaged.
        """
        path = Path(folder) / RESULTS
        if not path.exists():
            return None
        try:
            data = in_one_layout(json.loads(path.read_text(encoding="utf-8")))
            if not all(map(is_plain_name, data["datasets"])):
                raise ValueError("a data file's name cannot be a folder's")
            records = {
                dataset: {
                    system: _records(_predictions(path.parent, data, dataset, system)) for system in found["systems"]
                }
                for dataset, found in data["datasets"].items()
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UsageError(
                f"{path}, or a file in {PREDICTIONS} beside it, is damaged ({error!r}): delete it, or start again with "
                "--overwrite."
            ) from error
        return cls(data, records)


def in_one_layout(data: dict) -> dict:
    """Results as they are written today: those of a single data file stood at the top once, without its name."""
    if "datasets" in data:
        return data
    rest = {name: data[name] for name in ("checkpoints", "seconds", "settings", "stage_seconds") if name in data}
    source = data.get("settings", {}).get("data")
    name = source_name(source) if isinstance(source, str) else "questions"
    return {"datasets": {name: {key: value for key, value in data.items() if key not in rest}}, **rest}


def _predictions(folder: Path, data: dict, dataset: str, system: str) -> Path:
    several = dataset if len(data["datasets"]) > 1 else ""
    return folder / PREDICTIONS / several / f"{file_name(system)}.jsonl"


def _records(path: Path) -> list[dict]:
    if not path.exists():
        return []
    # Not by splitlines, which also splits at line separators inside a text.
    with open(path, encoding="utf-8") as lines:
        return [json.loads(line) for line in lines]


def _trec_files(systems: dict[str, list[dict]]) -> Iterator[tuple[str, str]]:
    gold = {}
    for system, rows in systems.items():
        lines = []
        for row in rows:
            if any(map(str.isspace, row["id"])):
                raise ValueError(
                    f"TREC files separate by white space, but there is a question with the id {row['id']!r}."
                )
            if row["pos_index"]:
                gold[row["id"]] = row["pos_index"]
            last = np.float32(np.inf)
            for rank, place in enumerate(row["ranking"] or ()):
                given = row["candidate_scores"][rank] if row["candidate_scores"] else -rank
                last = min(np.float32(given), np.nextafter(last, np.float32(-np.inf)))
                lines.append(f"{row['id']} Q0 {row['id']}:{place} {rank + 1} {last:.9g} {file_name(system)}\n")
        if lines:
            yield f"{file_name(system)}.run", "".join(lines)
    if gold:
        yield "qrels.txt", "".join(f"{key} 0 {key}:{place} 1\n" for key, places in gold.items() for place in places)


def cut_settings(folder: Path) -> dict | None:
    """The settings of results that were all written, but not all moved to where they belong; `None` without such."""
    try:
        settings = read_json(folder / STAGED / RESULTS)["settings"]
    except (OSError, UsageError, KeyError, TypeError):
        return None
    return settings if isinstance(settings, dict) else None


@contextmanager
def _staged(folder: Path) -> Iterator[Path]:
    """A folder beside the results to write to; at the end its content takes their place."""
    staged = folder / STAGED
    if cut_settings(folder) is not None:
        _move(staged, folder)
    shutil.rmtree(staged, ignore_errors=True)
    try:
        staged.mkdir(parents=True)
        yield staged
    except BaseException:
        shutil.rmtree(staged, ignore_errors=True)
        raise
    _move(staged, folder)


def _move(staged: Path, folder: Path) -> None:
    """Put what is staged in its place; a call that was interrupted can be repeated."""
    if (staged / PREDICTIONS).exists():  # which go first: nothing was moved before
        (folder / RESULTS).unlink(missing_ok=True)
        for name in (PREDICTIONS, TREC):
            shutil.rmtree(folder / name, ignore_errors=True)
    for name in (PREDICTIONS, TREC, *TABLES, RESULTS):
        if (staged / name).exists():
            os.replace(staged / name, folder / name)
    staged.rmdir()
