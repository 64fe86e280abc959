"""What an evaluation is told: files, checkpoints, systems and limits, checked before anything is loaded."""

import hashlib
from dataclasses import asdict, dataclass, field
from pathlib import Path


# Each system, in the table's order, and the checkpoint that it needs. BM25 ranks without one, too.
SYSTEMS = {
    "clara": "model",
    "clara-before-joint": "before_joint",
    "sup": "sup",
    "bm25": "model",
    "gold": "model",
    "text-gold": "text_model",
    "no-memory": "model",
    "wrong-memory": "model",
}
CHECKPOINTS = tuple(dict.fromkeys(SYSTEMS.values()))
# What decides about a checkpoint's answers; logs and trainer states beside it do not.
CHECKPOINT_FILES = ("*.safetensors", "*.jinja", "*config.json", "tokenizer*")


class UsageError(ValueError):
    """The evaluation cannot be carried out as it was asked for."""


@dataclass
class EvalSettings:
    """What is evaluated. Everything but `output_dir` and `overwrite` is recorded with the results.

    Raises:
        UsageError: a file or folder does not exist, a system is unknown or lacks its checkpoint, a limit is below 1.
    """

    data: str = field(metadata={"help": "Files of questions, separated by commas."})
    model: str | None = field(
        default=None,
        metadata={"help": "Folder of the CLaRa checkpoint. Without one only BM25's retrieval is measured."},
    )
    systems: str | None = field(
        default=None,
        metadata={"help": f"Systems, separated by commas, of {', '.join(SYSTEMS)}. Default: all with a checkpoint."},
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
            "help": "Folder of a causal language model, or of a PEFT adapter on one, that answers from raw text."
        },
    )
    output_dir: str | None = field(
        default=None, metadata={"help": "Where results go. Default: runs/eval/<model>-<data> in the working folder."}
    )
    limit: int | None = field(
        default=None, metadata={"help": "Take only so many questions from the start of each file."}
    )
    seed: int = field(default=0, metadata={"help": "Of bootstrap, ties and the choice of wrong memories."})
    batch_size: int = field(default=32, metadata={"help": "Questions, or documents to compress, per batch."})
    max_new_tokens: int = field(default=32, metadata={"help": "Limit of an answer's length in tokens."})
    top_k: int | None = field(
        default=None, metadata={"help": "Documents that a ranking system answers from. Default: the model's top_k."}
    )
    overwrite: bool = field(default=False, metadata={"help": "Replace another run's results in the output folder."})

    def __post_init__(self):
        for name in ("limit", "batch_size", "max_new_tokens", "top_k"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"--{name} must be at least 1, but is {value}.")
        for name in CHECKPOINTS:
            folder = getattr(self, name)
            if folder is not None and not Path(folder).is_dir():
                raise UsageError(f"--{name}: there is no folder {folder}.")
        if self.text_model is not None and self.model is None:
            raise UsageError("--text_model needs --model, whose prompts and tokenizer it uses.")
        self.files()
        self.chosen_systems()

    def files(self) -> dict[str, Path]:
        """Data files by the name that they have in the results: the file's, without `.jsonl` and `.gz`."""
        files = {}
        for path in map(Path, filter(None, self.data.split(","))):
            name = path.name.removesuffix(".gz").removesuffix(".jsonl")
            if not path.is_file():
                raise UsageError(f"--data: there is no file {path}.")
            if name in files:
                raise UsageError(f"--data: {files[name]} and {path} would share the name {name!r}: rename one of them.")
            files[name] = path
        if not files:
            raise UsageError("--data names no file.")
        return files

    def chosen_systems(self) -> list[str]:
        """The systems to run, in the table's order."""
        available = [name for name, needs in SYSTEMS.items() if name == "bm25" or getattr(self, needs) is not None]
        named = available if self.systems is None else self.systems.split(",")
        for name in named:
            if name not in SYSTEMS:
                raise UsageError(f"--systems: there is no system {name!r}, choose from {', '.join(SYSTEMS)}.")
            if name not in available:
                raise UsageError(f"--systems: {name} needs --{SYSTEMS[name]}.")
        return [name for name in SYSTEMS if name in named]

    def folder(self) -> Path:
        """The output folder: the given one, or the default."""
        if self.output_dir is not None:
            return Path(self.output_dir)
        model = "-".join(Path(self.model).resolve().parts[-2:]) if self.model else "bm25"
        return Path("runs", "eval", "-".join([model, *self.files()]))

    def record(self) -> dict:
        """The settings as they stand in `results.json`, with a hash of every data file and checkpoint.

        Two runs with equal records give equal results.
        """
        values = {name: value for name, value in asdict(self).items() if name not in ("output_dir", "overwrite")}
        hashes = {str(path): _sha256([path]) for path in self.files().values()}
        for folder in filter(None, (getattr(self, name) for name in CHECKPOINTS)):
            hashes[folder] = _sha256(sorted({path for glob in CHECKPOINT_FILES for path in Path(folder).glob(glob)}))
        return {**values, "systems": self.chosen_systems(), "sha256": hashes}


def _sha256(paths: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.name.encode() + b"\0")
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
