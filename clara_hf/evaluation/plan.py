"""Which systems an evaluation compares, read from their names.

    clara, clara-before-joint, sup      a CLaRa checkpoint ranks, and answers from memories
    bm25                                ranks by words
    bi-encoder NAME                     ranks by a bi-encoder of sentence-transformers
    multi-vector NAME                   ranks by late interaction of token vectors (ColBERT's kind)
    sparse-encoder NAME                 ranks by learned word weights (SPLADE's kind)
    cross-encoder NAME                  ranks by a cross-encoder of sentence-transformers
    llm-listwise NAME                   ranks by asking a causal language model to order the list
    dro NAME                            ranks by DRO's selection model, and answers from text by its generator
    gold, no-memory, wrong-memory       no ranking: the gold documents, none, another question's
    shuffled-memory                     as gold, each of a memory's vectors in the place of another
    text-SYSTEM                         chooses documents as SYSTEM does, and answers from their text
    memory-sup, memory-clara-before-joint   choose as these do; the generator of `--model` answers from its memories
    text                                short for text-bm25
    llmlingua2 NAME                     as text, from text shortened by LLMLingua-2

NAME is a local folder or, but for `dro`, a name on the Hub. All but `sup`, `clara-before-joint` and `dro`, which are
whole models, answer with the generator of `--model`, or with the text model where they read text; `memory-` before
`sup` or `clara-before-joint` compares the retrievers alone.
"""

import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass, fields
from importlib import import_module
from pathlib import Path
from typing import Any

from clara_hf.program import option
from clara_hf.program.errors import UsageError
from clara_hf.program.models import ModelSource
from clara_hf.program.paths import check_model_name
from clara_hf.program.values import split


CHECKPOINTS = {"clara": "model", "clara-before-joint": "before_joint", "sup": "sup"}
# Rankers without CLaRa: the class in `systems`, imported where it is needed, and the package that loads its models.
RANKERS = {
    "bm25": ("bm25.BM25", None),
    "bi-encoder": ("encoders.BiEncoderRanker", "sentence_transformers"),
    "multi-vector": ("encoders.MultiVectorRanker", "sentence_transformers"),
    "sparse-encoder": ("encoders.SparseRanker", "sentence_transformers"),
    "cross-encoder": ("encoders.CrossEncoderRanker", "sentence_transformers"),
    "llm-listwise": ("listwise.ListwiseRanker", "transformers"),
    "dro": ("dro.DROSystem", "peft"),
}
CONTROLS = ("no-memory", "wrong-memory")
SHUFFLED = "shuffled-memory"
UNRANKED = ("gold", *CONTROLS, SHUFFLED)
# The order of the table. Those in `NAMED` are followed by a NAME.
CHOICES = (*CHECKPOINTS, *RANKERS, "text", "llmlingua2", *UNRANKED)
NAMED = {**{kind: package for kind, (_, package) in RANKERS.items() if package}, "llmlingua2": "llmlingua"}
# What runs unasked, where it has what it needs, and what `all` adds to it.
DEFAULT_SYSTEMS = (*CHECKPOINTS, "bm25", "gold", "text-gold", *CONTROLS)
ALL_SYSTEMS = (
    *("clara", "text-clara", "clara-before-joint", "memory-clara-before-joint", "sup", "memory-sup"),
    *("bm25", "text", "gold", "text-gold", *CONTROLS),
)
# Before a system that chooses documents: who reads them in its place.
MEMORY, TEXT = PREFIXES = ("memory-", "text-")


@dataclass(frozen=True)
class SystemSpec:
    """One system: who chooses the documents of a question, and who reads them.

    Attributes:
        label: its name in tables and files.
        chooser: `clara`, `bm25`, `gold`, ...: a name of `CHOICES` that chooses documents.
        name: the model of a chooser in `NAMED`, else `None`.
        reader: `memory`, `text`, `llmlingua2` or `dro`.
        shortener: the model of `llmlingua2`, else `None`.
    """

    label: str
    chooser: str
    name: str | None = None
    reader: str = "memory"
    shortener: str | None = None

    @property
    def ranker(self) -> str | None:
        """The chooser with its model's name, if it ranks; equal for systems that share a ranking."""
        if self.chooser in UNRANKED:
            return None
        return f"{self.chooser} {self.name}" if self.name else self.chooser

    @property
    def checkpoint(self) -> str:
        """The option that names the CLaRa checkpoint whose memories are read."""
        return "model" if self.label.startswith(MEMORY) else CHECKPOINTS.get(self.chooser, "model")

    @property
    def order(self) -> tuple[int, ...]:
        return CHOICES.index(core_of(self.label).split(" ")[0]), *map(self.label.startswith, PREFIXES[::-1])

    def missing(self, given: Collection[str]) -> str | None:
        """The option that a system cannot run without and that is not `given`; a ranking alone needs no reader."""
        ranks = CHECKPOINTS.get(self.chooser)
        if ranks is not None and ranks not in given:
            return f"--{ranks}"
        if self.reader == "memory":
            needs_reader = self.ranker is None or self.label.startswith(MEMORY)
            return "--model" if needs_reader and "model" not in given else None
        if self.reader == "dro":
            return None
        return None if {"text_model", "model"} & set(given) else "--text_model or --model"


def core_of(label: str) -> str:
    """A system's name without `text-` or `memory-`."""
    return next((label.removeprefix(prefix) for prefix in PREFIXES if label.startswith(prefix)), label)


def file_name(label: str) -> str:
    """A system's name as a file's name; the end of a long one."""
    return re.sub(r"[^\w.-]+", "-", label)[-120:].lstrip("-.")


def choose_systems(names: Sequence[str] | None, given: Collection[str]) -> list[SystemSpec]:
    """The systems to run, in the table's order.

    Args:
        names: what is asked for; `all` stands for every system without a NAME that has what it needs. `None`: those of
            `DEFAULT_SYSTEMS` that have it.
        given: the options that name a model: `model`, `before_joint`, `sup`, `text_model`.

    Raises:
        ValueError: there is no such system, it is named twice, or it lacks its checkpoint.
    """
    specs = [parse_system(name) for name in names or () if name != "all"]
    for place, spec in enumerate(specs):
        same = [other.label for other in specs[:place] if file_name(other.label) == file_name(spec.label)]
        if same:
            raise ValueError(f"{same[0]} and {spec.label} would share a file: name one of them once")
        if (missing := spec.missing(given)) is not None:
            raise ValueError(f"{spec.label} needs {missing}")
    if names is None or "all" in names:
        more = list(map(parse_system, DEFAULT_SYSTEMS if names is None else ALL_SYSTEMS))
        asks_text = names is not None or "text_model" in given
        more = [spec for spec in more if spec.missing(given) is None and (asks_text or spec.reader == "memory")]
        specs += [spec for spec in more if spec not in specs]
    return sorted(specs, key=lambda spec: spec.order)


def ranker_class(kind: str) -> type:
    """The class of a ranker without CLaRa. Imported here: some come with an extra, and slowly."""
    module, name = RANKERS[kind][0].split(".")
    return getattr(import_module(f"clara_hf.evaluation.systems.{module}"), name)


def parse_system(text: str) -> SystemSpec:
    """Reads a system's name.

    Raises:
        ValueError: there is no such system, or its NAME is missing or too much.
    """
    label = " ".join(text.split())
    kind, _, name = core_of(label).partition(" ")
    reads_text = label.startswith(TEXT)
    if kind not in CHOICES or (reads_text and kind in ("text", "llmlingua2", SHUFFLED)):
        known = ", ".join(f"{choice} NAME" if choice in NAMED else choice for choice in CHOICES)
        raise ValueError(f"there is no system {text!r}, choose from {known}, or text- before one that ranks or gold")
    if label.startswith(MEMORY) and CHECKPOINTS.get(kind, "model") == "model":
        raise ValueError(f"{label} is {kind} itself: memory- stands before sup and clara-before-joint only")
    if kind in NAMED and not name:
        raise ValueError(f"{label} needs the NAME of a model behind it, as in '{label} path/to/model'")
    if kind not in NAMED and name:
        raise ValueError(f"{kind} takes no NAME, but is followed by {name!r}")
    if kind == "text":
        return SystemSpec(label, "bm25", reader="text")
    if kind == "llmlingua2":
        return SystemSpec(label, "bm25", reader="llmlingua2", shortener=name)
    reader = "text" if reads_text else "dro" if kind == "dro" else "memory"
    return SystemSpec(label, kind, name or None, reader=reader)


@dataclass(kw_only=True)
class Options:
    """What decides about an evaluation besides its questions and the model of `clara`.

    A model is a local folder or a name on the Hub, which is then fetched, or a
    [`~clara_hf.program.models.ModelSource`], which says how it is loaded, too.

    Raises:
        UsageError: a number is out of range, or a model's name cannot be one.
    """

    systems: list[str] | str | None = option(
        None,
        "Systems, of "
        + ", ".join(f"{choice} NAME" if choice in NAMED else choice for choice in CHOICES)
        + ", the same with text- before (answers from raw text), or all: every one without a NAME that has what it "
        "needs; further names may follow. memory- before sup or clara-before-joint: --model answers. "
        "Default: clara, clara-before-joint, sup, bm25, gold, no-memory and wrong-memory, as far as they have what "
        "they need, and text-gold with --text_model.",
    )
    before_joint: ModelSource | None = option(None, "The CLaRa checkpoint that joint training started from.")
    sup: ModelSource | None = option(None, "The CLaRa checkpoint whose retriever was trained with relevance labels.")
    text_model: ModelSource | None = option(
        None,
        "A causal language model, or a PEFT adapter on one, that answers from raw text. Default: the "
        "decoder of --model without its adapters.",
    )
    limit: int | None = option(None, "Take only this many questions from the start of each file.")
    seed: int = option(0, "Random seed for bootstrap, permutations, ties and wrong memories.")
    batch_size: int = option(32, "Questions, or documents to compress, per batch.")
    max_tokens_per_batch: int | None = option(
        None, "Tokens per batch of documents to compress, padding included, in place of --batch_size."
    )
    max_new_tokens: int = option(32, "Limit of an answer's length in tokens.")
    top_k: int | None = option(None, "Documents that a ranking system answers from. Default: the model's top_k, or 5.")
    text_doc_max_length: int = option(256, "Tokens of a document that systems on raw text read; the rest is cut.")
    llmlingua_rate: float = option(4.0, "Compression rate that llmlingua2 aims at.")
    memory_store: str | None = option(None, "Folder of a MemoryStore: memories are read from it, missing ones added.")
    judge: str | None = option(
        None,
        "Address, up to /v1, of an OpenAI-compatible endpoint whose model judges every answer, beside F1. "
        "Questions and answers are sent there.",
    )
    judge_model: str | None = option(None, "Name of the model at --judge.")
    judge_key_env: str = option("OPENAI_API_KEY", "Environment variable with its key.")

    def __post_init__(self):
        if isinstance(self.systems, str):
            self.systems = split(self.systems)
        for name in ("before_joint", "sup", "text_model"):
            setattr(self, name, model_source(f"--{name}", getattr(self, name)))
        if self.text_model is not None and (self.text_model.load_in_4bit or self.text_model.load_in_8bit):
            raise UsageError("--text_model: load_in_4bit and load_in_8bit are for CLaRa models; leave them out.")
        sizes = ("limit", "batch_size", "max_tokens_per_batch", "max_new_tokens", "top_k", "text_doc_max_length")
        for name in (*sizes, "llmlingua_rate"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"--{name} must be at least 1, but is {value}.")
        if (self.judge is None) != (self.judge_model is None):
            raise UsageError("--judge, the address, and --judge_model, a name there, need each other.")
        if self.seed < 0:
            raise UsageError(f"--seed must be at least 0, but is {self.seed}.")

    def recorded(self) -> dict[str, Any]:
        """The fields as they stand in `results.json`, models by name."""
        values = {one.name: getattr(self, one.name) for one in fields(self)}
        return {name: value.setting if isinstance(value, ModelSource) else value for name, value in values.items()}

    def plan(self, has_model: bool) -> list[SystemSpec]:
        """The systems to run, in the table's order.

        Raises:
            UsageError: a system is unknown or lacks its checkpoint, its NAME cannot be a model's, or `memory_store` has
                no model.
        """
        if self.memory_store is not None and not has_model:
            raise UsageError("--memory_store needs --model, which makes its memories.")
        if self.systems == []:
            raise UsageError("--systems names no system.")
        given = {name for name in ("before_joint", "sup", "text_model") if getattr(self, name) is not None}
        try:
            specs = choose_systems(self.systems, {*given, "model"} if has_model else given)
        except ValueError as error:
            raise UsageError(f"--systems: {error}.") from error
        for name in filter(None, (name for spec in specs for name in (spec.name, spec.shortener))):
            source = ModelSource(name)
            check_model_name("--systems", source.model_name_or_path, source.revision)
        return specs


def model_source(argument: str, model: Any) -> ModelSource | Any:
    """A model as `argument` gives it: a name becomes a source; an object, a source and `None` stay.

    Raises:
        UsageError: it cannot be a model's name, or is a GGUF file.
    """
    if isinstance(model, (str, Path)):
        model = ModelSource(str(model))
    if isinstance(model, ModelSource):
        check_model_name(argument, model.model_name_or_path, model.revision)
        if model.gguf_file is not None:
            raise UsageError(f"{argument}: an evaluation loads no GGUF file; gguf_file is {model.gguf_file}.")
    return model
