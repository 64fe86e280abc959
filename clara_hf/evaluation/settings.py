"""What an evaluation is told: files, checkpoints, systems and limits, checked before anything is loaded."""

import hashlib
import re
from dataclasses import asdict, dataclass, field
from fnmatch import fnmatch
from pathlib import Path

from clara_hf.data.sources import kind_of, source_name, split_sources
from clara_hf.evaluation.plan import (
    ALL_SYSTEMS,
    CHECKPOINTS,
    CHOICES,
    DEFAULT_SYSTEMS,
    MEMORY,
    NAMED,
    SystemSpec,
    parse_system,
)


FOLDERS = (*CHECKPOINTS.values(), "text_model")
# Files and folders beside a model that do not decide about its answers: logs, trainer states, results.
BESIDE_MODEL = (
    *(".*", "*.log", "*log.jsonl", "*.md", "runs", "events.out.*", "checkpoint-*", "trainer_state.json"),
    *("training_args.bin", "optimizer*", "scheduler.pt", "rng_state*", "global_step*", "unfinished", "predictions"),
    *("results.json", "table.*", "costs.*", "analysis.json", "*.html", "*.png", "*.svg"),
)
# Where results lie, and how they are shown, does not change them.
UNRECORDED = ("output_dir", "overwrite", "reference")


class UsageError(ValueError):
    """The evaluation cannot be carried out as it was asked for."""


@dataclass
class EvalSettings:
    """What is evaluated. Everything but `output_dir`, `overwrite` and `reference` is recorded with the results.

    Raises:
        UsageError: a file or folder does not exist, a system is unknown or lacks its checkpoint, a limit is below 1.
    """

    data: str = field(
        metadata={"help": "Files of questions, separated by commas; or data sets, see eval/data_files.py."}
    )
    model: str | None = field(
        default=None,
        metadata={"help": "Folder of the CLaRa checkpoint. Systems that need none run without."},
    )
    systems: str | None = field(
        default=None,
        metadata={
            "help": "Systems, separated by commas, of "
            + ", ".join(f"{choice} NAME" if choice in NAMED else choice for choice in CHOICES)
            + ", the same with text- before (answers from raw text), or all: every one without a NAME that has what it "
            "needs; further names may follow. memory- before sup or clara-before-joint: --model answers. "
            "Default: clara, clara-before-joint, sup, bm25, gold, no-memory and wrong-memory, as far as they have what "
            "they need, and text-gold with --text_model."
        },
    )
    before_joint: str | None = field(
        default=None, metadata={"help": "Folder of the CLaRa checkpoint that joint training started from."}
    )
    sup: str | None = field(
        default=None,
        metadata={"help": "Folder of the CLaRa checkpoint whose retriever was trained with relevance labels."},
    )
    text_model: str | None = field(
        default=None,
        metadata={
            "help": "Folder of a causal language model, or of a PEFT adapter on one, that answers from raw text. "
            "Default: the decoder of --model without its adapters."
        },
    )
    output_dir: str | None = field(
        default=None,
        metadata={
            "help": "Where results go. Default: runs/eval/<model>-<data> in the working folder; without --model, the "
            "systems' names stand for it."
        },
    )
    limit: int | None = field(
        default=None, metadata={"help": "Take only so many questions from the start of each file."}
    )
    seed: int = field(
        default=0, metadata={"help": "Of bootstrap, permutations, ties and the choice of wrong memories."}
    )
    batch_size: int = field(default=32, metadata={"help": "Questions, or documents to compress, per batch."})
    max_new_tokens: int = field(default=32, metadata={"help": "Limit of an answer's length in tokens."})
    top_k: int | None = field(
        default=None,
        metadata={"help": "Documents that a ranking system answers from. Default: the model's top_k, or 5."},
    )
    text_doc_max_length: int = field(
        default=256, metadata={"help": "Tokens of a document that systems on raw text read; the rest is cut."}
    )
    llmlingua_rate: float = field(default=4.0, metadata={"help": "Compression rate that llmlingua2 aims at."})
    memory_store: str | None = field(
        default=None, metadata={"help": "Folder of a MemoryStore: memories are read from it, missing ones added."}
    )
    reference: str | None = field(
        default=None, metadata={"help": "JSON file with published figures to be shown beside the measured ones."}
    )
    overwrite: bool = field(
        default=False,
        metadata={
            "help": "Start again, and replace another run's results in the output folder, and nothing else. An "
            "unfinished run with the same settings goes on."
        },
    )

    def __post_init__(self):
        for name in ("limit", "batch_size", "max_new_tokens", "top_k", "text_doc_max_length", "llmlingua_rate"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"--{name} must be at least 1, but is {value}.")
        if self.seed < 0:
            raise UsageError(f"--seed must be at least 0, but is {self.seed}.")
        for name in FOLDERS:
            folder = getattr(self, name)
            if folder is not None and not Path(folder).is_dir():
                raise UsageError(f"--{name}: there is no folder {folder}.")
        if self.memory_store is not None and self.model is None:
            raise UsageError("--memory_store needs --model, which makes its memories.")
        if self.reference is not None and not Path(self.reference).is_file():
            raise UsageError(f"--reference: there is no file {self.reference}.")
        self.files()
        self.plan()

    def files(self) -> dict[str, str]:
        """Sources of questions by the name that they have in the results."""
        return data_files(self.data)

    def plan(self) -> list[SystemSpec]:
        """The systems to run, in the table's order."""
        try:
            given = [] if self.systems is None else [part.strip() for part in self.systems.split(",")]
            specs = [parse_system(name) for name in given if name != "all"]
        except ValueError as error:
            raise UsageError(f"--systems: {error}.") from error
        if self.systems is None or "all" in given:
            names = DEFAULT_SYSTEMS if self.systems is None else ALL_SYSTEMS
            if self.systems is None and self.text_model is None:
                names = [name for name in names if not name.startswith("text")]
            more = [spec for spec in map(parse_system, names) if self._missing(spec) is None]
            specs += [spec for spec in more if spec not in specs]
        slugs = {}
        for spec in specs:
            if (missing := self._missing(spec)) is not None:
                raise UsageError(f"--systems: {spec.label} needs {missing}.")
            if (other := slugs.setdefault(slug(spec.label), spec)) is not spec:
                raise UsageError(
                    f"--systems: {other.label} and {spec.label} would share a file: name one of them once."
                )
        return sorted(specs, key=lambda spec: spec.order)

    def _missing(self, spec: SystemSpec) -> str | None:
        """The setting without which a system cannot run; a ranking alone needs no reader."""
        ranks = CHECKPOINTS.get(spec.chooser)
        if ranks is not None and getattr(self, ranks) is None:
            return f"--{ranks}"
        if spec.reader == "memory":
            needs_reader = spec.ranker is None or spec.label.startswith(MEMORY)
            return "--model" if needs_reader and self.model is None else None
        return "--text_model or --model" if self.text_model is None and self.model is None else None

    def folder(self) -> Path:
        """The output folder: the given one, or the default."""
        if self.output_dir is not None:
            return Path(self.output_dir)
        if self.model is not None:
            name = _short_name(self.model)
        else:
            readers = [_short_name(self.text_model)] if self.text_model is not None else []
            name = slug("-".join([*readers, *(spec.label for spec in self.plan())]))
        return Path("runs", "eval", "-".join([name, *self.files()]))

    def record(self) -> dict:
        """The settings as they stand in `results.json`, with a hash of every data file and local model.

        Two runs with equal records give equal results.
        """
        values = {name: value for name, value in asdict(self).items() if name not in UNRECORDED}
        hashes = {source: data_hash(source) for source in self.files().values()}
        plan = self.plan()
        named = [name for spec in plan for name in (spec.name, spec.shortener)]
        for folder in filter(None, [*(getattr(self, name) for name in FOLDERS), *named]):
            if Path(folder).is_dir():
                hashes[folder] = model_hash(folder, *filter(None, [self.folder(), self.memory_store]))
        return {**values, "systems": [spec.label for spec in plan], "sha256": hashes}


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


def slug(label: str) -> str:
    """A system's name as a file's name; the end of a long one."""
    return re.sub(r"[^\w.-]+", "-", label)[-120:].lstrip("-.")


def _short_name(folder: str) -> str:
    return "-".join(Path(folder).resolve().parts[-2:])


def data_hash(source: str) -> str:
    """Changes with what a source of questions holds; of one on the Hub nothing is known but its name."""
    place = Path(source) if Path(source).exists() else Path(source.split("#")[0])
    if place.is_dir():
        return _sha256(place, [path for path in place.rglob("*") if path.is_file()])
    return _sha256(place.parent, [place][: place.is_file()])


def model_hash(folder: str, *without: str | Path) -> str:
    """Changes with every file in a model's folder that may decide about its answers.

    Args:
        without: folders whose files do not count, should they lie in it.
    """
    place = Path(folder).resolve()
    without = [other for other in (Path(other).resolve() for other in without) if place in other.parents]
    paths = []
    for path in place.rglob("*"):
        parts = path.relative_to(place).parts
        beside = any(fnmatch(part, pattern) for part in parts for pattern in BESIDE_MODEL)
        if path.is_file() and not beside and not any(path.is_relative_to(other) for other in without):
            paths.append(path)
    return _sha256(place, paths)


def _sha256(root: Path, paths: list[Path]) -> str:
    digest = hashlib.sha256()
    for name, path in sorted((path.relative_to(root).as_posix(), path) for path in paths):
        digest.update(f"{name}\0{path.stat().st_size}\0".encode())
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
