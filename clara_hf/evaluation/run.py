"""Compares CLaRa with what one would use instead, on one's own questions.

    python eval/run.py --model runs/nano/joint --data questions.jsonl.gz
    python eval/run.py --model runs/nano/joint --before_joint runs/nano/scp --data a.jsonl,b.jsonl --systems all
    python eval/run.py --data questions.jsonl --systems "bm25,cross-encoder BAAI/bge-reranker-base"     # no model
    python eval/run.py --config evaluation.yaml --limit 100
    accelerate launch eval/run.py --model runs/nano/joint --data questions.jsonl     # a process per accelerator
    torchrun --nproc_per_node 4 eval/run.py --model runs/nano/joint --data questions.jsonl        # several on a CPU

Data: one JSON object per line with `question`, `answers`, `docs` and, where known, `pos_index`, `id`, `type` (see
`eval/data.py`). Prints the tables and writes `results.json`, `table.md`, `table.csv`, `costs.md`, `costs.csv` and the
predictions to the output folder. A call that was interrupted goes on when it is repeated. See `docs/evaluation.md`.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import yaml
from accelerate import PartialState
from transformers import HfArgumentParser
from transformers.utils import logging

from clara_hf.data.schema import DataError, load_examples
from clara_hf.evaluation.evaluator import Evaluation
from clara_hf.evaluation.files import UNFINISHED, claim_unfinished, holds_run, read_results, write_run, write_tables
from clara_hf.evaluation.journal import JournalError
from clara_hf.evaluation.reference import published_figures
from clara_hf.evaluation.report import format_costs, format_tables
from clara_hf.evaluation.results import dataset_results, datasets_of
from clara_hf.evaluation.settings import EvalSettings, UsageError


logger = logging.get_logger(__name__)


def evaluate_systems(
    settings: EvalSettings, folder: Path, begin: Callable[[], None] | None = None
) -> tuple[dict, dict[str, dict[str, list[dict]]]]:
    """Runs every chosen system on every data file, or goes on with what `folder` holds of that.

    Args:
        folder: where rankings and answers are written as they come.
        begin: called once data and checkpoints are found to be sound, before anything is written.

    Returns:
        The results as in `results.json`, and per data file and system one record per question: `id`, `question`,
        `answers`, `pos_index`, `prediction`, `ranking`, `candidate_scores` (`None` where the system gives none) and
        `scores`.

    Raises:
        DataError: a data file breaks the schema.
        UsageError: a checkpoint cannot be loaded, or a text cannot be put to it.
    """
    began = time.perf_counter()
    examples = {name: load_examples(path) for name, path in settings.files().items()}
    evaluation = Evaluation(settings, folder, examples)
    published = published_figures(settings.reference, evaluation.questions, _rate(evaluation.checkpoints))
    for name in examples:
        reasons = {spec.label: evaluation.why_unscored(name, spec) for spec in settings.plan()}
        if None not in reasons.values():
            told = "; ".join(f"{label} {reason}" for label, reason in reasons.items())
            raise UsageError(f"{name}: nothing can be scored: {told}.")
    if begin is not None:
        begin()
    records = evaluation.run()
    found = {}
    for name, systems in records.items():
        for spec in settings.plan():
            if (reason := evaluation.why_unscored(name, spec)) is not None:
                logger.warning(f"{spec.label} is left out for {name}: it {reason}.")
                del systems[spec.label]
        found[name] = dataset_results(evaluation.questions[name], systems, settings.seed)
        found[name]["costs"] = {s.label: evaluation.costs(name, s) for s in settings.plan() if s.label in systems}
        if published[name]:
            found[name]["published"] = published[name]
    layout = {"datasets": found} if len(found) > 1 else next(iter(found.values()))
    seconds = round(time.perf_counter() - began, 1)
    rest = {"checkpoints": evaluation.checkpoints, "seconds": seconds, "settings": settings.record()}
    return {**layout, **rest}, records


def _rate(checkpoints: dict) -> float | None:
    return checkpoints.get("model", {}).get("compression_rate")


def _add_published(results: dict, settings: EvalSettings) -> bool:
    """Puts the reference's figures into finished results, in place of others. Returns whether this changed them."""
    changed = False
    examples = {name: load_examples(source)[: settings.limit] for name, source in settings.files().items()}
    for name, published in published_figures(settings.reference, examples, _rate(results["checkpoints"])).items():
        found = datasets_of(results)[name if "datasets" in results else None]
        if published != found.get("published", []):
            found["published"], changed = published, True
            if not published:
                del found["published"]
    return changed


def run(settings: EvalSettings) -> dict:
    """Evaluates and writes; returns the results, or those of an earlier run with equal settings, data and checkpoints.

    Raises:
        DataError, UsageError: as `evaluate_systems`; or the output folder holds another run, finished or not, and
            `overwrite` is not set.
    """
    # Without an accelerator, accelerate counts several processes only if it is told so.
    state = PartialState(cpu=not torch.accelerator.is_available())
    folder, record = settings.folder(), settings.record()
    finished = holds_run(folder) and not settings.overwrite
    unfinished = folder / UNFINISHED
    if finished and not (unfinished / "run.json").exists():
        earlier = read_results(folder)
        if earlier is None or earlier.get("settings") != record:
            raise UsageError(
                f"{folder} holds another run's results: give another --output_dir, or --overwrite, which replaces the "
                "results and touches no checkpoint."
            )
        logger.warning(f"{folder} holds these results already, they are reused (--overwrite computes them again).")
        if settings.reference is not None and _add_published(earlier, settings) and state.is_main_process:
            write_tables(folder, earlier)
        return earlier

    def begin() -> None:
        # Not before the data are read: a mark that a malformed file leaves would stand in the way of the mended one.
        if state.is_main_process:
            if claim_unfinished(folder, record, settings.overwrite):
                logger.warning(f"{folder} holds a part of this run already: it goes on from there.")
        state.wait_for_everyone()

    results, records = evaluate_systems(settings, unfinished, begin)
    # The other processes read the journals, too, and writing removes them.
    state.wait_for_everyone()
    if state.is_main_process:
        write_run(folder, results, records)
    state.wait_for_everyone()
    return results


def read_config(arguments: list[str]) -> list[str]:
    """Replaces `--config FILE` by the file's values as arguments, in front of the others, which override them.

    Raises:
        UsageError: the file cannot be read, or is no mapping of names to plain values.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--config")
    given, rest = parser.parse_known_args(arguments)
    if given.config is None:
        return arguments
    path = given.config
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise UsageError(f"--config: {path} cannot be read: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict) or any(isinstance(value, dict) for value in values.values()):
        raise UsageError(f"--config: {path} must hold one value, or one list, per argument.")
    for name, value in reversed(values.items()):
        if value is not None:
            value = ",".join(map(str, value)) if isinstance(value, list) else str(value)
            rest = [f"--{name}", value, *rest]
    return rest


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns the exit code."""
    try:
        parser = HfArgumentParser(EvalSettings)
        # Read before the others are; here for --help.
        parser.add_argument(
            "--config", default=argparse.SUPPRESS, help="YAML file with any of these; the command line overrides it."
        )
        arguments = read_config(list(sys.argv[1:] if arguments is None else arguments))
        settings, unknown = parser.parse_args_into_dataclasses(arguments, return_remaining_strings=True)
        if unknown:
            parser.error(f"there is no argument {' '.join(unknown)}")
        results = run(settings)
    except (UsageError, DataError, JournalError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error}. The results were not written: mend that and run it again.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Interrupted: the same command goes on from here.", file=sys.stderr)
        return 130
    if PartialState().is_main_process:
        print(format_tables(results))
        print(format_costs(results))
        print(f"{results['seconds']} s. Results, tables and predictions: {settings.folder()}")
    return 0
