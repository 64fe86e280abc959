"""What training a retriever needs, with labels or without: candidates, their memories, and their ranking."""

import multiprocessing
import shutil
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import logging

from clara_hf.memory_store.keys import Maker
from clara_hf.memory_store.store import CorruptMemoryError, MemoryStore
from modeling_clara import CLaRaForRetrievalGeneration, CLaRaProcessor
from modeling_clara.processing_clara import index_matrix
from modeling_clara.sharded_clara import gathered

from .trainer import MEMORIES_FOLDER, CLaRaTrainer, CLaRaTrainingArguments, pad_documents, with_columns


logger = logging.get_logger(__name__)

# Candidates that evaluation ranks, for Recall@5 where fewer are selected.
RANKING_DEPTH = 5


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


def positives(dataset: Dataset) -> list[list[int]]:
    """The rows' `pos_index`, empty where it is not known."""
    if "pos_index" not in dataset.column_names:
        return [[] for _ in range(len(dataset))]
    return [gold or [] for gold in dataset["pos_index"][:]]


def positive_mask(golds: list[list[int]], document_index: torch.Tensor) -> torch.Tensor:
    """`True` `[B, N]` at each question's gold positions, in the shape of `document_index`."""
    is_positive = torch.zeros_like(document_index, dtype=torch.bool)
    for row, gold in enumerate(golds):
        is_positive[row, gold] = True
    return is_positive


def batch_recall(indices: torch.Tensor, is_positive: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Recall of a batch: gold candidates found among all gold ones.

    Args:
        indices (`[B, k]` int64): ranked candidates, -1 where there are fewer.
        is_positive (`[B, N]` bool): gold candidates; a question without any does not count.

    Returns:
        the sum over questions, and their number.
    """
    found = is_positive.gather(1, indices.clamp(min=0)) & (indices >= 0)
    gold = is_positive.sum(dim=1)
    return (found.sum(dim=1) / gold.clamp(min=1)).sum(), (gold > 0).sum()


def start_workers_afresh(args: RetrievalTrainingArguments) -> None:
    """Have data-loader workers started from a process that has not used Lance, which can hang in forked ones."""
    if args.dataloader_multiprocessing_context not in (None, "fork"):
        return
    if "forkserver" in multiprocessing.get_all_start_methods():
        args.dataloader_multiprocessing_context = "forkserver"
        multiprocessing.set_forkserver_preload([__name__])  # else every worker would import everything anew
    else:
        args.dataloader_multiprocessing_context = "spawn"


def read_memories(store: MemoryStore, keys: list[str]) -> torch.Tensor:
    """[`MemoryStore.get`], with what to do about a damaged store.

    Raises:
        CorruptMemoryError: a memory is damaged on disk.
    """
    try:
        return store.get(keys)
    except CorruptMemoryError as error:
        raise CorruptMemoryError(
            f"a memory in {store.path} is damaged on disk: the same command with --resume true --verify_memories all "
            "makes it, and any other that is damaged, anew."
        ) from error


def delete_foreign_memories(path: Path, model: CLaRaForRetrievalGeneration) -> None:
    """Delete the memory store at `path` if another compressor made it; anything else there is left as it is."""
    try:
        maker = MemoryStore.open(path).maker
    except (FileNotFoundError, ValueError):
        return
    if not maker.makes_the_same_as(Maker.of(model)):
        logger.warning(f"The memories in {path} were made by another compressor: they are deleted, and made anew.")
        shutil.rmtree(path)


class CandidateCollator:
    """Questions and the memories of their candidates, each distinct document once.

    Args:
        processor ([`CLaRaProcessor`]): pads and knows the memory tokens.
        store (`MemoryStore`, *optional*): where the memories of the rows' `keys` are read; without one, the rows'
            `document_ids` are batched for compression in the step.
    """

    def __init__(self, processor: CLaRaProcessor, store: MemoryStore | None = None):
        self.processor = processor
        self.store = store

    def candidates(self, features: list[dict]) -> dict[str, torch.Tensor]:
        """The retrieval side of a batch: what `forward` needs to score the candidates."""
        query = self.processor.pad_encodings([row["query_ids"] for row in features])
        batch = {"query_input_ids": query["input_ids"], "query_attention_mask": query["attention_mask"]}
        if self.store is None:
            return {**batch, **pad_documents(features, self.processor)}
        position = {key: row for row, key in enumerate(dict.fromkeys(k for f in features for k in f["keys"]))}
        return {
            **batch,
            "memories": read_memories(self.store, list(position)),
            "document_index": index_matrix([[position[key] for key in row["keys"]] for row in features]),
        }


class RetrievalTrainer(CLaRaTrainer):
    """Base of the stages that train the query reasoner over candidates. Without a store, candidates are compressed in
    every step.

    Args:
        replace_memories (`bool`): whether memories that another compressor left in `output_dir` are deleted; else they
            are an error.
    """

    def __init__(
        self,
        model: CLaRaForRetrievalGeneration,
        args: RetrievalTrainingArguments,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | None = None,
        replace_memories: bool = False,
        **kwargs,
    ):
        model.add_query_reasoner()
        if not is_deepspeed_zero3_enabled():
            # Documents are compressed before the Trainer would put the model there.
            model.to(args.device)
        with gathered(model.parameters()), args.main_process_first(desc="opening the memory store"):
            if replace_memories and args.process_index == 0:
                delete_foreign_memories(Path(args.output_dir, MEMORIES_FOLDER), model)
            self.store = self.open_store(model, args)
        if self.store is not None and args.dataloader_num_workers > 0:
            start_workers_afresh(args)
        super().__init__(model, args, train_dataset, eval_dataset, **kwargs)

    def open_store(self, model, args: RetrievalTrainingArguments) -> MemoryStore | None:
        return MemoryStore.open(args.memory_store or Path(args.output_dir, MEMORIES_FOLDER), model)

    def add_candidates(self, tokenized: Dataset, dataset: Dataset, args: RetrievalTrainingArguments) -> Dataset:
        """`tokenized` with the candidates of `dataset`, as keys in the store, else token ids, and its `pos_index`."""
        candidates = dataset["docs"][:]  # at once, not row by row
        distinct = list(dict.fromkeys(text for docs in candidates for text in docs))
        if self.store is None:
            ids, column = self.processor.encode_documents(distinct), "document_ids"
        else:
            # Every process compresses a share, with whole weights where they are sharded.
            options = {"batch_size": args.memory_batch_size, "verify": args.verify_memories, "distributed": True}
            with gathered(self.store.model.parameters()):
                ids, column = self.store.add(distinct, **options), "keys"
        known = dict(zip(distinct, ids, strict=True))
        columns = {column: [[known[text] for text in docs] for docs in candidates], "pos_index": positives(dataset)}
        return with_columns(tokenized, columns)

    def candidate_memories(self, rows: list[int]) -> list[torch.Tensor]:
        """Memories `[N_b, l, H]` of the candidates of evaluation rows, stored or compressed now."""
        if self.store is not None:
            keys = [self.eval_dataset[row]["keys"] for row in rows]
            memories = read_memories(self.store, [key for candidates in keys for key in candidates])
            return list(memories.split([len(candidates) for candidates in keys]))
        documents = [self.eval_rows[row]["docs"] for row in rows]
        distinct = list(dict.fromkeys(text for docs in documents for text in docs))
        memories = dict(zip(distinct, self.compress_together(distinct), strict=True))
        return [torch.stack([memories[text] for text in docs]) for docs in documents]

    def rank(self, rows: list[int]) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Candidates of evaluation rows, ranked as a user of the model would.

        Returns:
            their memories `[N_b, l, H]`, and the positions of the best ones `[B, k]`, best first, -1 beyond a row's
            candidates; k is at least `top_k` and `RANKING_DEPTH`, if there are as many candidates.
        """
        memories = self.candidate_memories(rows)
        depth = min(max(self.model.config.top_k, RANKING_DEPTH), max(len(candidates) for candidates in memories))
        return memories, self.model.retrieve(self.eval_rows[rows]["question"], memories, top_k=depth).indices
