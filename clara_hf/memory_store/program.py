"""Build, fit, search and maintain a memory store."""

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path

from clara_hf.data.sources import read_rows
from clara_hf.program import UsageError, parse
from clara_hf.program.arguments import choose
from clara_hf.program.models import ModelSource, load_trained

from .copies import locate
from .encoding import FORMS
from .store import MemoryStore


ASKED = 1000  # questions by which search is measured, at most


@dataclass(kw_only=True)
class StoreArguments:
    """What every command takes."""

    store: str = field(
        metadata={"positional": True, "help": "Folder or s3://... of the store; to read, also hf://datasets/..."}
    )


@dataclass(kw_only=True)
class ModelArguments(StoreArguments):
    """What commands take that compress or ask."""

    model: ModelSource = field(metadata={"help": "CLaRa checkpoint: folder or Hub id."})
    device: str | None = field(
        default=None, metadata={"help": "Device, such as cuda:0. Default: the accelerator, if there is one."}
    )


@dataclass(kw_only=True)
class BuildArguments(ModelArguments):
    """Compress the documents that a store lacks; run it again to resume."""

    documents: str = field(metadata={"help": "JSONL, JSON, CSV, Parquet, text, or a Hub data set."})
    text: str = field(default="text", metadata={"help": "Field with the document."})
    columns: list[str] = field(default_factory=list, metadata={"help": "Fields that are kept beside each document."})
    form: str = field(
        default="auto", metadata={"help": "How memories are encoded in the store.", "choices": ("auto", *FORMS)}
    )
    batch_size: int | None = field(default=None, metadata={"help": "Documents per forward pass; 64 by default."})
    max_tokens_per_batch: int | None = field(
        default=None, metadata={"help": "Tokens per forward pass, padding included, in place of --batch_size."}
    )
    limit: int | None = field(default=None, metadata={"help": "Take only this many documents from the start."})
    chunk_size: int = field(default=50_000, metadata={"help": "Documents taken in at a time."})
    engine: str = field(
        default="local",
        metadata={"help": "What compresses: this process, or a Ray cluster.", "choices": ("local", "ray")},
    )
    actors: int | None = field(
        default=None, metadata={"help": "Number of Ray actors. Default: one per GPU, or per CPU without GPUs."}
    )

    def __post_init__(self):
        for name in ("batch_size", "max_tokens_per_batch", "chunk_size", "actors"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"--{name} {value}: it must be at least 1.")
        if self.engine == "local" and self.actors is not None:
            raise UsageError(f"--actors {self.actors}: only --engine ray has actors.")


@dataclass(kw_only=True)
class FitArguments(ModelArguments):
    """Fit search, and a fitted form, to what is stored."""

    model: ModelSource | None = field(default=None, metadata={"help": "CLaRa checkpoint, to read --questions."})
    form: str = field(
        default="auto", metadata={"help": "Store memories in this form from then on.", "choices": ("auto", *FORMS)}
    )
    questions: str | None = field(
        default=None,
        metadata={
            "help": f"File with a field `question`, by the first {ASKED:,} of which search is measured; by default, by "
            "memories with noise."
        },
    )
    seed: int = field(default=0, metadata={"help": "Random seed for the samples."})
    texts: bool = field(default=False, metadata={"help": "Only make an index of the texts, for `search --hybrid`."})

    def __post_init__(self):
        if self.questions is not None and self.model is None:
            raise UsageError(f"--questions {self.questions}: they are read by the store's model: give --model too.")


@dataclass(kw_only=True)
class SearchArguments(ModelArguments):
    """Find documents; one JSON object per question."""

    questions: list[str] = field(metadata={"positional": True, "help": "One or more."})
    top_k: int = field(default=5, metadata={"help": "Documents for each question."})
    filter: str | None = field(
        default=None, metadata={"help": "SQL condition over columns, such as \"title LIKE 'A%%'\"."}
    )
    exact: bool = field(default=False, metadata={"help": "Score every stored memory."})
    hybrid: bool = field(default=False, metadata={"help": "Let BM25 over the texts count too (fit --texts first)."})


@dataclass(kw_only=True)
class CompactArguments(StoreArguments):
    """Join small files and remove old versions."""


@dataclass(kw_only=True)
class UnlockArguments(StoreArguments):
    """Let others write to a store in object storage whose writer was killed."""


@dataclass(kw_only=True)
class StatsArguments(StoreArguments):
    """Print counts and sizes as JSON."""


@dataclass(kw_only=True)
class VerifyArguments(StoreArguments):
    """Read everything and compare it with what was written."""

    model: ModelSource | None = field(default=None, metadata={"help": "CLaRa checkpoint, to make memories anew."})
    device: str | None = field(default=None, metadata={"help": "As for `build`."})
    repair: bool = field(default=False, metadata={"help": "Make anew what is damaged; memories need --model."})


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code, 1 where `verify` leaves damage.

    Raises:
        UsageError, ValueError, OSError: one sentence each for the user.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    told = {name: str(kind.__doc__) for name, (kind, _) in COMMANDS.items()}
    kind, command = COMMANDS[choose("clara store", told, arguments, __doc__)]
    options = parse(kind, arguments[1:], description=kind.__doc__)
    model = None
    if isinstance(options, (ModelArguments, VerifyArguments)) and options.model:
        # With Ray, this process has the model to tell whose store it is, and its tokenizer to check documents.
        on_ray = isinstance(options, BuildArguments) and options.engine == "ray"
        model = load_trained(options.model, "cpu" if on_ray else options.device)
    builds = isinstance(options, BuildArguments)
    place, _ = locate(options.store)
    if not builds and isinstance(place, Path) and not place.is_dir():
        raise UsageError(f"there is no memory store at {options.store}: build it with `clara store build`.")
    return command(MemoryStore.open(options.store, model, form=options.form if builds else "auto"), options) or 0


def _build(store: MemoryStore, options: BuildArguments) -> None:
    actors = None
    if options.engine == "ray":
        try:
            from .actors import RayActors
        except ImportError as error:
            raise UsageError(f"--engine ray: {error}.") from error
        actors = RayActors(partial(load_trained, options.model, options.device), options.actors)
    count = 0
    rows = _documents(options)
    while part := list(islice(rows, options.chunk_size)):
        columns = {name: [row.get(name) for row in part] for name in options.columns}
        for name in columns if not count else ():
            if not any(name in row for row in part):
                raise UsageError(
                    f"--columns {name}: none of the first {len(part)} documents has it; they have {sorted(part[0])}."
                )
        try:
            store.add(
                [row[options.text] for row in part],
                columns,
                options.batch_size,
                actors=actors,
                max_tokens_per_batch=options.max_tokens_per_batch,
            )
        except ValueError as error:
            raise UsageError(f"--documents {options.documents}, from document {count} on: {error}") from error
        count += len(part)
    print(f"{store.path}: {len(store)} documents, {count} given.")


def _documents(options: BuildArguments) -> Iterator[dict]:
    for number, row in islice(read_rows(options.documents), options.limit):
        if options.text not in row:
            raise UsageError(
                f"--text {options.text}: row {number} of {options.documents} has no such field, it has {sorted(row)}."
            )
        yield row


def _fit(store: MemoryStore, options: FitArguments) -> None:
    if options.texts:
        store.index_texts()
        return
    questions = None
    if options.questions is not None:
        questions = [row.get("question") for _, row in islice(read_rows(options.questions), ASKED)]
        if not questions or not all(isinstance(question, str) for question in questions):
            raise UsageError(f"--questions {options.questions}: every row needs a field `question` with a text.")
    print(json.dumps(store.fit(options.form, options.seed, questions=questions), indent=2))


def _search(store: MemoryStore, options: SearchArguments) -> None:
    found = store.search(options.questions, options.top_k, options.exact, options.filter, hybrid=options.hybrid)
    for row, question in enumerate(options.questions):
        names = {"key": found.keys, "score": found.scores.tolist(), "text": found.texts, **found.columns}
        hits = [
            dict(zip(names, values, strict=True))
            for values in zip(*(each[row] for each in names.values()), strict=True)
        ]
        print(json.dumps({"question": question, "documents": hits}, ensure_ascii=False, default=str))


def _compact(store: MemoryStore, options: CompactArguments) -> None:
    store.compact()
    _stats(store, options)


def _unlock(store: MemoryStore, options: UnlockArguments) -> None:
    store.unlock()


def _stats(store: MemoryStore, options: StoreArguments) -> None:
    print(json.dumps(store.stats(), indent=2))


def _verify(store: MemoryStore, options: VerifyArguments) -> int:
    report = store.verify(options.repair)
    print(json.dumps(asdict(report), indent=2, ensure_ascii=False))
    if options.repair and not report.is_sound:
        return 1 if report.unrepaired or report.lost or not store.verify().is_sound else 0
    return 0 if report.is_sound else 1


COMMANDS: dict[str, tuple[type[StoreArguments], Callable]] = {
    "build": (BuildArguments, _build),
    "fit": (FitArguments, _fit),
    "search": (SearchArguments, _search),
    "compact": (CompactArguments, _compact),
    "unlock": (UnlockArguments, _unlock),
    "stats": (StatsArguments, _stats),
    "verify": (VerifyArguments, _verify),
}
