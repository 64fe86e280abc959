"""What an evaluation is told: files, checkpoints, systems and limits, checked before anything is loaded."""

import hashlib
import re
from dataclasses import asdict, dataclass, field
from pathlib import Path

from eval.data_files import kind_of, source_name
from eval.plan import ALL_SYSTEMS, CHECKPOINTS, CHOICES, DEFAULT_SYSTEMS, NAMED, SystemSpec, parse_system


FOLDERS = (*CHECKPOINTS.values(), "text_model")
# What decides about a checkpoint's answers; logs and trainer states beside it do not.
CHECKPOINT_FILES = ("*.safetensors", "*.jinja", "*config.json", "tokenizer*")
# Where results and memories lie, and how they are shown, does not change them.
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
            "needs. Default: all of these but text and text-clara."
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
        default=None, metadata={"help": "Where results go. Default: runs/eval/<model>-<data> in the working folder."}
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
        default=False, metadata={"help": "Start again, and replace another run's results in the output folder."}
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
        files = {}
        for source in filter(None, self.data.split(",")):
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

    def plan(self) -> list[SystemSpec]:
        """The systems to run, in the table's order."""
        given = self.systems or ""
        if self.systems is None or given == "all":
            names = ALL_SYSTEMS if given == "all" else DEFAULT_SYSTEMS
            if self.text_model is None and given != "all":
                names = [name for name in names if not name.startswith("text")]
            specs = [spec for spec in map(parse_system, names) if self._missing(spec) is None]
        else:
            try:
                specs = [parse_system(name) for name in given.split(",")]
            except ValueError as error:
                raise UsageError(f"--systems: {error}.") from error
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
        if spec.chooser in CHECKPOINTS and getattr(self, spec.checkpoint) is None:
            return f"--{spec.checkpoint}"
        if spec.reader == "memory":
            return "--model" if spec.ranker is None and self.model is None else None
        return "--text_model or --model" if self.text_model is None and self.model is None else None

    def folder(self) -> Path:
        """The output folder: the given one, or the default."""
        if self.output_dir is not None:
            return Path(self.output_dir)
        model = "-".join(Path(self.model).resolve().parts[-2:]) if self.model else "bm25"
        return Path("runs", "eval", "-".join([model, *self.files()]))

    def record(self) -> dict:
        """The settings as they stand in `results.json`, with a hash of every data file and local model.

        Two runs with equal records give equal results.
        """
        values = {name: value for name, value in asdict(self).items() if name not in UNRECORDED}
        hashes = {source: _sha256(_files_of(source)) for source in self.files().values()}
        plan = self.plan()
        named = [name for spec in plan for name in (spec.name, spec.shortener)]
        for folder in filter(None, [*(getattr(self, name) for name in FOLDERS), *named]):
            if Path(folder).is_dir():
                paths = {path for pattern in CHECKPOINT_FILES for path in Path(folder).glob(pattern)}
                hashes[folder] = _sha256(sorted(paths))
        return {**values, "systems": [spec.label for spec in plan], "sha256": hashes}


def slug(label: str) -> str:
    """A system's name as a file's name; the end of a long one."""
    return re.sub(r"[^\w.-]+", "-", label)[-120:].lstrip("-.")


def _files_of(source: str) -> list[Path]:
    """What a source of questions consists of; nothing for one on the Hub, whose name may hold its revision."""
    place = Path(source) if Path(source).exists() else Path(source.split("#")[0])
    return sorted(path for path in place.rglob("*") if path.is_file()) if place.is_dir() else [place][: place.is_file()]


def _sha256(paths: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.name.encode() + b"\0")
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
