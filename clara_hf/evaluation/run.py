"""Compares CLaRa with what one would use instead, on one's own questions.

    python eval/run.py --model runs/nano/joint --data questions.jsonl.gz
    python eval/run.py --model runs/nano/joint --before_joint runs/nano/scp --data a.jsonl,b.jsonl --systems all
    python eval/run.py --data questions.jsonl --systems "bm25,cross-encoder BAAI/bge-reranker-base"     # no model
    python eval/run.py --config evaluation.yaml --limit 100
    accelerate launch eval/run.py --model runs/nano/joint --data questions.jsonl     # a process per accelerator
    torchrun --nproc_per_node 4 eval/run.py --model runs/nano/joint --data questions.jsonl        # several on a CPU

Data: one JSON object per line with `question`, `answers`, `docs` and, where known, `pos_index`, `id`, `type` (see
`eval/data.py`). Prints the tables and writes `results.json`, `table.md`, `table.csv`, `costs.md`, `costs.csv` and the
predictions to the output folder; `cache/` in it holds what later calls need not compute again. Run an interrupted call
again to resume it. See `docs/evaluation.md`.
"""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import yaml
from accelerate import PartialState
from transformers import HfArgumentParser
from transformers.utils import logging

from clara_hf.data.schema import DataError
from clara_hf.data.sources import kind_of, source_name, split_sources
from clara_hf.evaluation import report
from clara_hf.evaluation.evaluator import Evaluator
from clara_hf.evaluation.plan import Options, UsageError, file_name
from clara_hf.evaluation.reference import published_figures
from clara_hf.evaluation.results import PREDICTIONS, TABLES, Results
from clara_hf.evaluation.systems.loading import files_hash
from clara_hf.program.errors import print_what_can_be_printed
from clara_hf.program.folders import release_lock, take_lock


logger = logging.get_logger(__name__)
# Where results lie, and how they are shown, does not change them.
UNRECORDED = ("output_dir", "cache_dir", "overwrite", "reference", "trec")
# What may grow, or change, so that a finished run is added to.
ADDED_TO = ("data", "systems", "limit", "seed", "sha256")


@dataclass(kw_only=True)
class EvalSettings(Options):
    """What is evaluated, and where results go. Everything but `UNRECORDED` is recorded with the results.

    Raises:
        UsageError: a file or folder does not exist, a system is unknown or lacks its checkpoint, a limit is below 1.
    """

    data: str = field(
        metadata={"help": "Files of questions, separated by commas; or data sets, see eval/data_files.py."}
    )
    model: str | None = field(
        default=None, metadata={"help": "The CLaRa checkpoint. Systems that need none run without."}
    )
    systems: str | None = field(default=None, metadata=Options.__dataclass_fields__["systems"].metadata)
    output_dir: str | None = field(
        default=None,
        metadata={
            "help": "Where results go. Default: runs/eval/<model>-<data> in the working folder; without --model, the "
            "systems' names stand for it."
        },
    )
    cache_dir: str | None = field(
        default=None,
        metadata={
            "help": "Where predictions are kept for later calls. Default: the folder cache in the output folder."
        },
    )
    reference: str | None = field(
        default=None, metadata={"help": "JSON file with published figures to be shown beside the measured ones."}
    )
    trec: bool = field(
        default=False, metadata={"help": "Write TREC runs and qrels, too, to trec/ in the output folder."}
    )
    overwrite: bool = field(
        default=False,
        metadata={
            "help": "Replace another run's results in the output folder, and nothing else. What the cache holds of "
            "equal content is not computed again."
        },
    )

    def __post_init__(self):
        super().__post_init__()
        for name in ("model", "before_joint", "sup", "text_model"):
            folder = getattr(self, name)
            if folder is not None and not Path(folder).is_dir() and not could_be_on_hub(folder):
                raise UsageError(f"--{name}: there is no folder {folder}.")
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
            readers = [_short_name(self.text_model)] if self.text_model is not None else []
            name = file_name("-".join([*readers, *(spec.label for spec in self.plan(False))]))
        return Path("runs", "eval", "-".join([name, *self.files()]))

    def record(self, hashes: dict[str, str]) -> dict:
        """The settings as they stand in `results.json`, with a hash of every data file and model.

        Two runs with equal records give equal results.
        """
        values = {name: value for name, value in asdict(self).items() if name not in UNRECORDED}
        hashes = {**{source: data_hash(source) for source in self.files().values()}, **hashes}
        return {**values, "systems": [spec.label for spec in self.plan(self.model is not None)], "sha256": hashes}


def data_files(data: str) -> dict[str, str]:
    """Sources of questions, as they were given with commas between, by the name that they have in the results.

    Raises:
        UsageError: there is none, one does not exist, or two have the same name.
    """
    files = {}
    for source in split_sources(data):
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


def data_hash(source: str) -> str:
    """Changes with what a source of questions holds; of one on the Hub nothing is known but its name."""
    place = Path(source) if Path(source).exists() else Path(source.split("#")[0])
    if place.is_dir():
        return files_hash(place, [path for path in place.rglob("*") if path.is_file()])
    return files_hash(place.parent, [place][: place.is_file()])


def could_be_on_hub(name: str) -> bool:
    """Whether a name has the form of a model's on the Hub, and is no path."""
    return name.count("/") <= 1 and not name.startswith((".", "/", "~"))


def _short_name(folder: str) -> str:
    return "-".join(Path(folder).resolve().parts[-2:])


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
    with _locked(folder, settings.cache_dir and Path(settings.cache_dir)):
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
    earlier = {} if results is None else results.data.get("settings", {})
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
        and set(split_sources(earlier["data"])) <= set(split_sources(record["data"]))
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
    print_what_can_be_printed()
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
    except (UsageError, DataError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {error}. The results were not written: mend that and run it again.", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Interrupted: run the same command again to resume.", file=sys.stderr)
        return 130
    if PartialState().is_main_process:
        print(results.to_text())
        print(report.format_costs(results.data))
        print(f"{results.data['seconds']} s. Results, tables and predictions: {settings.folder()}")
    return 0
