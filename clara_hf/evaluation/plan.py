"""Which systems an evaluation compares, read from their names.

    clara, clara-before-joint, sup      a CLaRa checkpoint ranks, and answers from memories
    bm25                                ranks by words
    bi-encoder NAME                     ranks by a bi-encoder of sentence-transformers
    cross-encoder NAME                  ranks by a cross-encoder of sentence-transformers
    llm-listwise NAME                   ranks by asking a causal language model to order the list
    gold, no-memory, wrong-memory       no ranking: the gold documents, none, another question's
    text-SYSTEM                         chooses documents as SYSTEM does, and answers from their text
    memory-sup, memory-clara-before-joint   choose as these do; the generator of `--model` answers from its memories
    text                                short for text-bm25
    llmlingua2 NAME                     as text, from text shortened by LLMLingua-2

NAME is a local folder or a name on the Hub. All but `sup` and `clara-before-joint`, which are whole models, answer with
the generator of `--model`, or with the text model where they read text; `memory-` before these two compares the
retrievers alone.
"""

from dataclasses import dataclass


CHECKPOINTS = {"clara": "model", "clara-before-joint": "before_joint", "sup": "sup"}
FOREIGN_RANKERS = ("bi-encoder", "cross-encoder", "llm-listwise")
CONTROLS = ("no-memory", "wrong-memory")
# The order of the table. Those in `NAMED` are followed by a NAME.
CHOICES = (*CHECKPOINTS, "bm25", *FOREIGN_RANKERS, "text", "llmlingua2", "gold", *CONTROLS)
NAMED = (*FOREIGN_RANKERS, "llmlingua2")
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
        name: the model of a chooser in `FOREIGN_RANKERS`, else `None`.
        reader: `memory`, `text` or `llmlingua2`.
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
        if self.chooser == "gold" or self.chooser in CONTROLS:
            return None
        return f"{self.chooser} {self.name}" if self.name else self.chooser

    @property
    def checkpoint(self) -> str:
        """The setting that names the CLaRa checkpoint whose memories are read."""
        return "model" if self.label.startswith(MEMORY) else CHECKPOINTS.get(self.chooser, "model")

    @property
    def core(self) -> str:
        """The label without what is before the system's own name."""
        return core_of(self.label)

    @property
    def order(self) -> tuple[int, bool, bool]:
        return CHOICES.index(self.core.split(" ")[0]), *map(self.label.startswith, PREFIXES[::-1])


def core_of(label: str) -> str:
    """A system's name without `text-` or `memory-`."""
    return next((label.removeprefix(prefix) for prefix in PREFIXES if label.startswith(prefix)), label)


def parse_system(text: str) -> SystemSpec:
    """Reads a system's name.

    Raises:
        ValueError: there is no such system, or its NAME is missing or too much.
    """
    label = " ".join(text.split())
    kind, _, name = core_of(label).partition(" ")
    reads_text = label.startswith(TEXT)
    if kind not in CHOICES or (reads_text and kind in ("text", "llmlingua2")):
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
    return SystemSpec(label, kind, name or None, reader="text" if reads_text else "memory")
