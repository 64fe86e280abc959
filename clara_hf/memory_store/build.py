"""How a memory store's missing documents are compressed: in which batches, with how much room, and part by part."""

import errno
import math
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Sequence

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers.utils import logging

from .keys import KEY_LENGTH
from .table import TORCH_TYPES, MemoryTable


logger = logging.get_logger(__name__)

# From this size on, the user is told how much is written even where only warnings are shown.
TOLD_BYTES = 2**30


def plan_batches(documents: Sequence[str], positions: Iterable[int], batch_size: int) -> list[list[int]]:
    """Positions in `documents` in batches of `batch_size`, longest first.

    In the last bits, a memory depends on the batch that it was made in. Parts hold whole batches, and all batches but
    the last are full; so whichever of them are stored already, planning the rest gives the remaining ones unchanged.
    """
    order = sorted(positions, key=lambda position: -len(documents[position]))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def bytes_needed(table: MemoryTable, documents: Sequence[str], positions: Collection[int]) -> int:
    """Bytes on disk of the memories and texts of the documents at `positions`."""
    row = table.form.size * table.form.numpy_type.itemsize + 2 * KEY_LENGTH
    return len(positions) * row + sum(len(documents[position].encode()) for position in positions)


def check_space(table: MemoryTable, documents: Sequence[str], positions: Collection[int]) -> None:
    """Tells the user what the documents at `positions` will need on disk.

    Raises:
        OSError: the disk has less.
    """
    needed, free = bytes_needed(table, documents, positions), shutil.disk_usage(table.path).free
    if needed > free:
        raise OSError(
            errno.ENOSPC,
            f"{len(positions)} documents need {size_text(needed)} in {table.path}, and the disk has "
            f"{size_text(free)}: make room, or choose a path on another disk",
        )
    if positions:
        tell = logger.warning if needed >= TOLD_BYTES else logger.info
        tell(f"{len(positions)} documents to compress: {size_text(needed)} in {table.path}, of {size_text(free)} free")


def check_encodable(model, documents: Sequence[str], positions: Collection[int]) -> None:
    """Raises `ValueError`, with the position in `documents`, if the model's processor refuses one at `positions`.

    A model without a processor takes every text.
    """
    processor = getattr(model, "processor", None)
    if processor is None or not positions:
        return
    # The others passed when they were stored: a stand-in for each keeps the positions right.
    texts = ["stored"] * len(documents)
    for position in positions:
        texts[position] = documents[position]
    processor.check_user_texts(texts, "documents")


def report_cut(table: MemoryTable, cut: int, total: int) -> None:
    """Tells the user that `cut` of the `total` documents that were compressed were cut."""
    if cut:
        logger.warning(
            f"{cut} of {total} compressed documents are longer than doc_max_length={table.maker.doc_max_length} "
            "tokens and were cut; model.processor.find_cut_documents(documents) lists them."
        )


def fill(
    batches: list[list[int]],
    compress: Callable[[list[int]], tuple[np.ndarray, ...]],
    write: Callable[[list[int], list[np.ndarray]], dict],
    part_bytes: int,
    part_seconds: float,
    description: str | None,
) -> list[dict]:
    """Compresses `batches` and writes them in parts, what is compressed at an interruption included.

    Args:
        batches: positions of documents.
        compress: gives what is stored of a batch: memories, and sketches where there are some.
        write: writes a part of whole batches and returns its record.
        part_bytes, part_seconds: a part is written at this size, or after this time.
        description: of the progress bar; None for no bar.

    Returns:
        The records of the parts.
    """
    waiting: list[tuple[list[int], tuple[np.ndarray, ...]]] = []
    parts: list[dict] = []

    def write_waiting() -> None:
        rows, made = [position for batch, _ in waiting for position in batch], [part for _, part in waiting]
        waiting.clear()  # first: rows that cannot be written must not be tried again on the way out
        if rows:
            parts.append(write(rows, [np.concatenate(part) for part in zip(*made, strict=True)]))

    since = time.monotonic()
    total = sum(len(batch) for batch in batches)
    with tqdm(total=total, desc=description, unit="doc", disable=description is None or not batches) as bar:
        try:
            for batch in batches:
                waiting.append((batch, compress(batch)))
                bar.update(len(batch))
                size = sum(part.nbytes for _, made in waiting for part in made)
                if size >= part_bytes or time.monotonic() - since >= part_seconds:
                    write_waiting()
                    since = time.monotonic()
        finally:
            write_waiting()
    return parts


def compress_batch(model, table: MemoryTable, documents: Sequence[str], batch: list[int]) -> tuple[torch.Tensor, int]:
    """Memories of the documents at the positions `batch`, `[len(batch), width]`, and how many of these were cut.

    Raises:
        ValueError: a memory of another shape than the store's, not finite, or too large for its dtype.
    """
    texts = [documents[position] for position in batch]
    processor = getattr(model, "processor", None)
    if processor is None:
        memories, cut = model.compress(texts, batch_size=len(batch)), []
    else:
        rows, cut = processor.encode_and_cut(texts)
        memories = model.compress_encoded(rows, batch_size=len(batch))
    expected = (len(batch), table.maker.num_memory_tokens, table.maker.hidden_size)
    if memories.shape != expected:
        raise ValueError(f"the model gave memories of shape {tuple(memories.shape)}; the store needs {expected}")
    memories = memories.detach().flatten(1)
    dtype = TORCH_TYPES[table.dtype]
    bad = torch.nonzero(~torch.isfinite(memories.to(dtype)).all(1)).flatten().tolist()
    if bad:
        document = documents[batch[bad[0]]]
        which = f"the memory of documents[{batch[bad[0]]}] ({document[:60]!r})"
        largest = memories[bad[0]].abs().max().item()
        if not math.isfinite(largest):
            raise ValueError(f"{which} is not finite: check the compressor's weights and the dtype it runs in")
        raise ValueError(
            f"{which} reaches {largest:.4g}, too large for {table.dtype}: use a new store, opened with dtype='bfloat16'"
        )
    return memories.to(dtype), len(cut)


def size_text(count: int) -> str:
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"
