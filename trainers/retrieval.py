"""Where the memories of candidates are: a store that is opened and filled before training, and workers that read it."""

import multiprocessing
import os
import shutil
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path

from datasets import Dataset
from torch.utils.data import DataLoader
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import logging

from clara_hf.data.schema import distinct_docs
from clara_hf.memory_store.keys import Maker
from clara_hf.memory_store.store import MemoryStore
from modeling_clara import CLaRaForRetrievalGeneration, CLaRaProcessor
from modeling_clara.functional_clara import gathered

from .arguments import CLaRaTrainingArguments
from .batches import encoded_documents
from .trainer import CLaRaTrainer


logger = logging.get_logger(__name__)

# In a run's folder, where the memory store is unless another place is given.
MEMORIES_FOLDER = "memories"
# Rows whose documents go into the store together: their texts are in memory at once.
FILL_ROWS = 50_000


@dataclass
class RetrievalTrainingArguments(CLaRaTrainingArguments):
    r"""
    Arguments of the stages that train the query reasoner.

    Parameters:
        > Parameters that control the memories

        memory_store (`str`, *optional*):
            Folder of the memory store, on a file system that all processes share; `memories` in the output folder by
            default.
        memory_batch_size (`int`, *optional*, defaults to `64`):
            Documents per forward pass when the store is filled.
        verify_memories (`str`, *optional*, defaults to `"changed"`):
            Which stored memories are read before training, and made again if they are damaged: those in files that
            `changed` since they were last found sound, or `all`. Each batch checks what it reads, always.
    """

    memory_store: str | None = field(default=None, metadata={"help": "Folder of the memory store."})
    memory_batch_size: int = field(default=64, metadata={"help": "Documents per forward pass filling the store."})
    verify_memories: str = field(
        default="changed", metadata={"help": "Stored memories to check before training: changed or all."}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.verify_memories not in ("changed", "all"):
            raise ValueError(f"verify_memories is {self.verify_memories!r}: it must be 'changed' or 'all'.")


def open_memories(
    model: CLaRaForRetrievalGeneration, args: RetrievalTrainingArguments, replace: bool = False
) -> MemoryStore:
    """The store of the run's memories, opened by all processes together.

    Args:
        replace: whether memories that another compressor left in `output_dir` are deleted; else they are an error.
    """
    own = Path(args.output_dir, MEMORIES_FOLDER)
    if not is_deepspeed_zero3_enabled():
        # Documents are compressed before the Trainer would put the model there.
        model.to(args.device)
    with gathered(model.parameters()), args.main_process_first(desc="opening the memory store"):
        if replace and args.process_index == 0:
            delete_foreign_memories(own, model)
        return MemoryStore.open(args.memory_store or own, model)


def delete_foreign_memories(path: Path, model: CLaRaForRetrievalGeneration) -> None:
    """Delete the memory store at `path` if another compressor made it; anything else there is left as it is."""
    try:
        maker = MemoryStore.open(path).maker
    except (FileNotFoundError, ValueError):
        return
    if not maker.makes_the_same_as(Maker.of(model)):
        logger.warning(f"The memories in {path} were made by another compressor: they are deleted, and made anew.")
        shutil.rmtree(path)


def fill_memories(store: MemoryStore, rows: Dataset, args: RetrievalTrainingArguments) -> None:
    """Compress the documents of `rows` that are not stored yet: every process a share, with whole weights where they
    are sharded."""
    documents = rows.select_columns("docs")
    for start in range(0, len(documents), FILL_ROWS):
        texts = [text for docs in documents[start : start + FILL_ROWS]["docs"] for text in docs]
        with gathered(store.model.parameters()):
            store.add(
                list(dict.fromkeys(texts)),
                batch_size=args.memory_batch_size,
                verify=args.verify_memories,
                distributed=True,
            )


class RetrievalTrainer(CLaRaTrainer):
    """What stages share whose candidates' memories are in `store`; `None` where they are made in every step."""

    retrieves = True
    model: CLaRaForRetrievalGeneration
    args: RetrievalTrainingArguments
    store: MemoryStore | None

    def prepare_rows(self, rows: Dataset) -> Dataset:
        examples = super().prepare_rows(rows)
        if self.store is not None and examples is not rows:
            fill_memories(self.store, rows, self.args)
        return examples

    def _get_dataloader(self, *arguments, **options) -> DataLoader:
        loader = super()._get_dataloader(*arguments, **options)
        if self.store is not None:
            start_workers_afresh(loader.base_dataloader)
        return loader


def candidate_columns(row: dict, number: int, processor: CLaRaProcessor, store: MemoryStore | None) -> dict:
    """Columns of an example for its question and candidates: their keys in `store`, else their token ids, and the gold
    positions among them, where known.

    Raises:
        ValueError: names the row whose `pos_index` goes beyond its documents.
    """
    given = row.get("pos_index") or []
    if wrong := [index for index in given if not 0 <= index < len(row["docs"])]:
        raise ValueError(
            f"row {number} (question {row['question'][:60]!r}) has pos_index {wrong[0]}, but {len(row['docs'])} docs: "
            "positions count from 0."
        )
    docs, gold = distinct_docs(row["docs"], given)
    query = processor.encode_questions([row["question"]])[0]
    columns = {"query_ids": query, "pos_index": gold, "copies": len(row["docs"]) - len(docs)}
    return {**columns, **(encoded_documents(processor, docs) if store is None else {"keys": store.keys(docs)})}


_START_METHOD = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
_Context = type(multiprocessing.get_context(_START_METHOD))


class WorkerProcess(_Context.Process):  # type: ignore[name-defined]
    """A data-loader worker from a process that has not used Lance, which can hang in forked ones.

    Unlike other such processes it does not run the user's script a second time, so that the script needs no main guard,
    and it ends with the process that it works for.
    """

    @staticmethod
    def _Popen(process):
        with _hidden_script():
            return _Context.Process._Popen(process)

    def run(self):
        threading.Thread(target=_end_with_parent, daemon=True).start()
        super().run()


class WorkerContext(_Context):
    """How data-loader workers are started where memories are read from a store."""

    Process = WorkerProcess


def start_workers_afresh(loader: DataLoader) -> None:
    """Have the workers of `loader`, which read a store, started as [`WorkerProcess`]es, unless the user chose a way."""
    context = loader.multiprocessing_context
    if loader.num_workers == 0 or (context is not None and context.get_start_method() != "fork"):
        return
    multiprocessing.set_forkserver_preload(["trainers.worker_server"])
    # A collator of the main script is found only where the script runs again.
    is_own = loader.collate_fn.__module__ != "__main__"
    loader.multiprocessing_context = WorkerContext() if is_own else multiprocessing.get_context(_START_METHOD)


@contextmanager
def _hidden_script() -> Iterator[None]:
    """Let multiprocessing, which would have a new process run it, not know of the main script."""
    main = vars(sys.modules["__main__"])
    hidden = {name: main.pop(name) for name in ("__file__", "__spec__") if name in main}
    main["__spec__"] = None
    try:
        yield
    finally:
        main.pop("__spec__")
        main.update(hidden)


def _end_with_parent() -> None:
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)
