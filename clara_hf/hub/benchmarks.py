"""Figures for benchmarks that are registered on the Hub: `.eval_results/*.yaml`, which a model's page and the
benchmark's leaderboard show. Written only for what the user names, where the Hub knows the benchmark and its task."""

import re
from pathlib import Path

import yaml
from huggingface_hub import EvalResultEntry, eval_result_entries_to_yaml, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

from clara_hf.hub.cards import datasets_of, percent
from clara_hf.program import UsageError


FOLDER = ".eval_results"
# By which the Hub knows a data set as a benchmark.
BENCHMARK_FILE = "eval.yaml"
FORM = re.compile(r"(?P<id>[^/:=\s]+/[^/:=\s]+):(?P<task>[^=\s]+)=(?:(?P<data>.+)/)?(?P<metric>[^/\s]+)")


def write_benchmarks(wanted: list[str], results: dict | None, place: Path, notes: str) -> None:
    """Write the figures `wanted` into `.eval_results/` of `place`, a file for each benchmark.

    Args:
        wanted: as `ID:TASK=METRIC`, or `ID:TASK=DATA/METRIC` where the results are of several data files. ID is a data
            set of the Hub and TASK one of its `eval.yaml`; METRIC and DATA are those of `results`.
        results: a `results.json` of `clara eval`. Figures are those of its system `clara`, in percent.
        notes: on the model's settings; the number of questions is added.

    Raises:
        UsageError: another form, a figure that `results` does not hold, or a benchmark or task that is not registered.
    """
    entries: dict[str, list[EvalResultEntry]] = {}
    for text in wanted:
        found = FORM.fullmatch(text)
        if found is None:
            raise UsageError(f"benchmark is {text!r}: give ID:TASK=METRIC, such as user/benchmark:default=f1.")
        figure = _figure(text, found["metric"], found["data"], results)
        _check_registered(found["id"], found["task"])
        entry = EvalResultEntry(found["id"], found["task"], percent(figure["value"]))
        entry.notes = f"{notes}, {figure['n']} questions"
        entries.setdefault(found["id"], []).append(entry)
    for benchmark, rows in entries.items():
        path = place / FOLDER / f"{benchmark.replace('/', '--')}.yaml"
        path.parent.mkdir(exist_ok=True)
        path.write_text(yaml.safe_dump(eval_result_entries_to_yaml(rows), sort_keys=False), encoding="utf-8")


def _figure(text: str, metric: str, data: str | None, results: dict | None) -> dict:
    parts = datasets_of(results or {})
    if data is None and len(parts) > 1:
        raise UsageError(
            f"benchmark {text!r}: the results are of {_names(parts)}; write ={_names(parts, '/')}{metric}."
        )
    part = next(iter(parts.values()), {}) if data is None else parts.get(data, {})
    row = part.get("systems", {}).get("clara", {})
    if metric not in row:
        known = _names(row) if row else f"data {_names(parts)}" if parts else "no results file"
        raise UsageError(f"benchmark {text!r}: there is no such figure of the system clara (there is {known}).")
    return row[metric]


def _names(known, end: str = "") -> str:
    return ", ".join(f"{name}{end}" for name in known)


def _check_registered(benchmark: str, task: str) -> None:
    try:
        path = Path(hf_hub_download(benchmark, BENCHMARK_FILE, repo_type="dataset"))
        declared = yaml.safe_load(path.read_text(encoding="utf-8"))
        tasks = [str(row["id"]) for row in declared["tasks"]]
    except LocalEntryNotFoundError:
        raise  # no network: nothing is known of the benchmark
    except GatedRepoError as error:
        raise UsageError(
            f"benchmark {benchmark!r} is gated: ask for access to it, and log in (`hf auth login`)."
        ) from error
    except (RepositoryNotFoundError, EntryNotFoundError, yaml.YAMLError, KeyError, TypeError) as error:
        raise UsageError(
            f"benchmark {benchmark!r} is not registered on the Hub (a data set with {BENCHMARK_FILE} and its tasks): "
            "leave it out; the card tells the results in any case."
        ) from error
    if task not in tasks:
        raise UsageError(f"benchmark {benchmark!r} has no task {task!r}: its tasks are {', '.join(tasks)}.")
