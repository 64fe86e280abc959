"""From per-question scores to numbers with intervals and paired tests.

`results` is what `results.json` holds: `systems` (system -> metric -> `value`, `low`, `high`, `n`; values from 0 to 1),
`tests` (metric -> one entry per two systems), `by_type` and `tests_by_type` (type -> the same) where questions have
types, `costs`, `published` where a reference is given, `checkpoints`, `seconds` and `settings`. For several data files
all but the last three stand under `datasets` and the file's name.
"""

import numpy as np

from clara_hf.data.schema import QAExample
from clara_hf.evaluation.statistics import intervals, letters, paired_tests


COMPARED = ("f1", "em", "cover_em", "grounding", "recall@1", "recall@3", "recall@5", "all_gold@5", "mrr", "ndcg@5")


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
    for metric in COMPARED:
        scores = {
            name: np.array([row["scores"].get(metric, np.nan) for row in rows])
            for name, rows in records.items()
            if any(metric in row["scores"] for row in rows)
        }
        if tests := paired_tests(scores, seed):
            found[metric] = tests
    return found


def dataset_results(examples: list[QAExample], records: dict[str, list[dict]], seed: int) -> dict:
    """`systems` and `tests`, and the same by type where any question has a type, for one data file.

    Args:
        records: per system one record per example, in their order.
    """
    systems = {name: summarize(rows, seed) for name, rows in records.items()}
    results = {"systems": systems, "tests": compare(records, seed)}
    types = sorted({example.type for example in examples if example.type})
    if types:
        results["by_type"], results["tests_by_type"] = {}, {}
        for kind in types:
            chosen = [index for index, example in enumerate(examples) if example.type == kind]
            part = {name: [rows[index] for index in chosen] for name, rows in records.items()}
            results["by_type"][kind] = {name: summarize(rows, seed) for name, rows in part.items()}
            results["tests_by_type"][kind] = compare(part, seed)
    return results


def parts_of(results: dict) -> list[tuple[str | None, str | None, dict, dict]]:
    """Data file (`None` for a single one), type (`None` for all), systems and tests of each table."""
    parts = []
    for dataset, found in datasets_of(results).items():
        parts.append((dataset, None, found["systems"], found.get("tests", {})))
        for kind, systems in found.get("by_type", {}).items():
            parts.append((dataset, kind, systems, found.get("tests_by_type", {}).get(kind, {})))
    return parts


def datasets_of(results: dict) -> dict[str | None, dict]:
    """The results of each data file; a single one has no name."""
    return results.get("datasets") or {None: results}


def marks(systems: dict, tests: dict) -> dict[str, dict[str, str]]:
    """Per metric with tests, each system's letters."""
    return {
        metric: letters({name: row[metric]["value"] for name, row in systems.items() if metric in row}, pairs)
        for metric, pairs in tests.items()
    }
