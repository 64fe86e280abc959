"""Compare CLaRa with its alternatives on your own questions.

    python eval/run.py --model runs/nano/joint --data questions.jsonl.gz
    python eval/run.py --model runs/nano/joint --before_joint runs/nano/scp --data a.jsonl,b.jsonl --systems all
    python eval/run.py --data questions.jsonl --systems "bm25,cross-encoder BAAI/bge-reranker-base"     # no model
    python eval/run.py --config evaluation.yaml --limit 100
    accelerate launch eval/run.py --model runs/nano/joint --data questions.jsonl     # a process per accelerator
    torchrun --nproc_per_node 4 eval/run.py --model runs/nano/joint --data questions.jsonl        # several on a CPU

Data: one JSON object per line with `question`, `answers`, `docs` and, where known, `pos_index`, `id`, `type` (see
`clara_hf.data.schema`). Prints the tables and writes `results.json`, `table.md`, `table.csv`, `costs.md`, `costs.csv`
and the predictions to the output folder; `cache/` in it holds what later calls need not compute again. Run an
interrupted call again to resume it. See `docs/evaluation.md`.
"""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import PartialState
from transformers.utils import logging

from clara_hf.data.sources import digest_of, kind_of, source_name
from clara_hf.evaluation import report
from clara_hf.evaluation.evaluator import Evaluator
from clara_hf.evaluation.plan import Options, file_name, model_source
from clara_hf.evaluation.reference import published_figures
from clara_hf.evaluation.results import PREDICTIONS, TABLES, Results, cut_settings
from clara_hf.program import UsageError, option, parse
from clara_hf.program.folders import release_lock, take_lock
from clara_hf.program.models import ModelSource
from clara_hf.program.values import split


logger = logging.get_logger(__name__)
# Where results lie, and how they are shown, does not change them.
UNRECORDED = ("judge_key_env", "output_dir", "cache_dir", "overwrite", "reference", "trec")
# What may grow, or change, so that a finished run is added to.
ADDED_TO = ("data", "systems", "limit", "seed", "sha256", "judge", "judge_model")


@dataclass(kw_only=True)
class EvalSettings(Options):
    """What is evaluated, and where results go. Everything but `UNRECORDED` is recorded with the results.

    Raises:
        UsageError: a file or folder does not exist, a system is unknown or lacks its checkpoint, a limit is below 1.
    """

    data: list[str] = option(help="Questions: files, folders or data sets, see clara_hf.data.sources.")
    model: ModelSource | None = option(None, "The CLaRa checkpoint. Systems that need none run without.")
    output_dir: str | None = option(
        None,
        "Where results go. Default: runs/eval/<model>-<data> in the working folder; without --model, the "
        "systems' names stand for it.",
    )
    cache_dir: str | None = option(
        None, "Where predictions are kept for later calls. Default: the folder cache in the output folder."
    )
    reference: str | None = option(None, "JSON file with published figures to be shown beside the measured ones.")
    trec: bool = option(False, "Write TREC runs and qrels, too, to trec/ in the output folder.")
    overwrite: bool = option(
        False,
        "Replace another run's results in the output folder, and nothing else. What the cache holds of "
        "equal content is not computed again.",
    )

    def __post_init__(self):
        super().__post_init__()
        self.data = split(self.data) if isinstance(self.data, str) else list(self.data)
        self.model = model_source("--model", self.model)
        if self.reference is not None and not Path(self.reference).is_file():
            raise UsageError(f"--reference: there is no file {self.reference}.")
        self.files()
        self.plan(self.model is not None)

    def files(self) -> dict[str, str]:
        """Sources of questions by the name that they have in the results."""
        return data_files(self.data)

    def options(self) -> dict:
        """The fields of [`~clara_hf.evaluation.plan.Options`]."""
        return {name: getattr(self, name) for name in Options.__dataclass_fields__}

    def folder(self) -> Path:
        """The output folder: the given one, or the default."""
        if self.output_dir is not None:
            return Path(self.output_dir)
        if self.model is not None:
            name = _short_name(self.model)
        else:
            readers = [_short_name(self.text_model)] if self.text_model else []
            name = file_name("-".join([*readers, *(spec.label for spec in self.plan(False))]))
        return Path("runs", "eval", "-".join([name, *self.files()]))

    def record(self, hashes: dict[str, str]) -> dict:
        """The settings as they stand in `results.json`, with a hash of every data file and model.

        Two runs with equal records give equal results.
        """
        values = {name: value for name, value in self.recorded().items() if name not in UNRECORDED}
        hashes = {**{source: digest_of(source, "sha256") for source in self.data}, **hashes}
        systems = [spec.label for spec in self.plan(self.model is not None)]
        return {**values, "data": self.files(), "systems": systems, "sha256": hashes}


def data_files(sources: Iterable[str]) -> dict[str, str]:
    """Sources of questions by the name that they have in the results.

    Raises:
        UsageError: there is none, one does not exist, or two have the same name.
    """
    files: dict[str, str] = {}
    for source in sources:
        name = source_name(source)
        if kind_of(source) not in ("hub", "folder") and not Path(source).is_file():
            raise UsageError(f"--data: there is no file {source}.")
        if name in files:
            other = files[name]
            raise UsageError(f"--data: {other} and {source} would share the name {name!r}: rename one of them.")
        files[name] = source
    if not files:
        raise UsageError("--data names no file.")
    return files


def recorded_files(settings: dict) -> dict[str, str]:
    """As [`data_files`], from what stands in `results.json`; earlier versions wrote one text there."""
    return data_files(split(settings["data"])) if isinstance(settings["data"], str) else settings["data"]


def _short_name(source: ModelSource) -> str:
    return "-".join(source.folder.resolve().parts[-2:])


def run(settings: EvalSettings) -> Results:
    """Evaluates and writes; returns the results, or those of an earlier run with equal settings, data and checkpoints.

    A finished run is added to where settings differ in further systems, files, questions, or in the seed.

    Raises:
        DataError: a data file breaks the schema.
        UsageError: a checkpoint cannot be loaded, a text cannot be put to it, there is nothing to score, another
            process evaluates into the folder, or it holds another run's results and `overwrite` is not set.
    """
    # Without an accelerator, accelerate counts several processes only if it is told so.
    state = PartialState(cpu=not torch.accelerator.is_available())
    folder = settings.folder()
    evaluator = Evaluator(settings.files(), cache_dir=settings.cache_dir or folder / "cache", **settings.options())
    work = evaluator.work(settings.model)
    record = settings.record(work.hashes)
    published = published_figures(settings.reference, evaluator.questions, work.compression_rate)
    earlier = None if settings.overwrite and not _is_equal(folder, record) else _earlier(folder, record)
    if earlier is not None and earlier.data["settings"] == record:
        logger.warning(f"{folder} holds these results already: they are reused.")
        if settings.reference is not None and _set_published(earlier, published) and state.is_main_process:
            earlier.save_tables(folder)
        return earlier
    with _locked(folder, Path(settings.cache_dir) if settings.cache_dir else None):
        results = evaluator.results(work)
        results.data["settings"] = record
        _set_published(results, published)
        if state.is_main_process:
            results.save(folder, settings.trec)
        state.wait_for_everyone()
    return results


def _is_equal(folder: Path, record: dict) -> bool:
    try:
        earlier = Results.load(folder)
    except UsageError:
        return False
    return earlier is not None and earlier.data.get("settings") == record


def _earlier(folder: Path, record: dict) -> Results | None:
    """The results in a folder that this run repeats, or adds to; `None` where there are none."""
    results = Results.load(folder)
    if results is None and not any((folder / name).exists() for name in (*TABLES, PREDICTIONS)):
        return None
    earlier = cut_settings(folder) or {} if results is None else results.data.get("settings", {})
    if earlier != record and not (earlier and _adds(earlier, record)):
        raise UsageError(
            f"{folder} holds another run's results: give another --output_dir, or --overwrite, which replaces the "
            "results and touches no checkpoint."
        )
    return results


def _adds(earlier: dict, record: dict) -> bool:
    """Whether a run has all that an earlier one had: its systems, files and questions, of the same content."""
    if {**earlier, **{name: record[name] for name in ADDED_TO}} != record:
        return False
    hashes = earlier.get("sha256", {})
    return (
        set(earlier["systems"]) <= set(record["systems"])
        and recorded_files(earlier).items() <= record["data"].items()
        and (record["limit"] is None or (earlier["limit"] is not None and earlier["limit"] <= record["limit"]))
        and all(hashes[name] == record["sha256"][name] for name in hashes.keys() & record["sha256"].keys())
    )


def _set_published(results: Results, published: dict[str, list[dict]]) -> bool:
    """Puts the reference's figures into results, in place of others. Returns whether this changed them."""
    changed = False
    for name, found in results.datasets.items():
        if published[name] != found.get("published", []):
            found["published"], changed = published[name], True
            if not published[name]:
                del found["published"]
    return changed


@contextmanager
def _locked(*folders: Path | None) -> Iterator[None]:
    """Keeps other evaluations out of folders.

    Raises:
        UsageError: another process holds one of them.
    """
    locks = {}
    try:
        for folder in filter(None, folders if PartialState().is_main_process else ()):
            locks[folder] = take_lock(folder)
        yield
    finally:
        for folder, lock in locks.items():
            release_lock(folder, lock)


def main(arguments: list[str] | None = None) -> None:
    """The program, see the top of this file."""
    settings = parse(EvalSettings, arguments, description=__doc__)
    results = run(settings)
    if PartialState().is_main_process:
        print(results.to_text())
        print(report.format_costs(results.data))
        print(f"{results.data['seconds']} s. Results, tables and predictions: {settings.folder()}")
