"""How documents come into a memory store: which are missing, in which batches they are compressed, part by part."""

import errno
import hashlib
import math
import shutil
import time
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa
import torch
from tqdm.auto import tqdm
from transformers.utils import logging

from modeling_clara.functional_clara import token_batches

from .keys import KEY_LENGTH
from .processes import Processes
from .table.layout import TORCH_TYPES
from .table.snapshot import unpacked
from .table.table import MemoryTable, pick


if TYPE_CHECKING:
    from .actors import RayActors

logger = logging.get_logger(__name__)

# Documents per forward pass where nothing else is asked for.
DEFAULT_BATCH_SIZE = 64
# Documents that are tokenized at once only to be counted.
COUNTED = 4096
# From this size on, the user is told how much is written even where only warnings are shown.
TOLD_BYTES = 2**30


def plan_batches(documents: Sequence[str], positions: Iterable[int], batch_size: int) -> list[list[int]]:
    """Positions in `documents` in batches of `batch_size`, longest first.

    In the last bits, a memory depends on the batch that it was made in. Parts hold whole batches, and all batches but
    the last are full; so whichever of them are stored already, planning the rest gives the remaining ones unchanged.
    """
    order = sorted(positions, key=lambda position: -len(documents[position]))
    return [order[start : start + batch_size] for start in range(0, len(order), batch_size)]


def plan_token_batches(processor, documents: Sequence[str], positions: Sequence[int], most: int) -> list[list[int]]:
    """As [`plan_batches`], in batches of at most `most` tokens, see [`~modeling_clara.functional_clara.token_batches`].

    Raises:
        ValueError: a document has more.
    """
    lengths: list[int] = []
    for start in range(0, len(positions), COUNTED):
        texts = [documents[position] for position in positions[start : start + COUNTED]]
        lengths += processor.encoded_lengths(processor.encode_and_cut(texts)[0])
    return [[positions[place] for place in batch] for batch in token_batches(lengths, most)]


def bytes_needed(table: MemoryTable, documents: Sequence[str], positions: Collection[int]) -> int:
    """Bytes on disk of the memories and texts of the documents at `positions`."""
    row = table.form.size * table.form.numpy_type.itemsize + 2 * KEY_LENGTH
    return len(positions) * row + sum(len(documents[position].encode()) for position in positions)


def check_space(table: MemoryTable, documents: Sequence[str], positions: Collection[int]) -> None:
    """Tells the user what the documents at `positions` will need on disk.

    Raises:
        OSError: the disk has less.
    """
    needed = bytes_needed(table, documents, positions)
    free = None if table.remote is not None else shutil.disk_usage(table.path).free
    if free is not None and needed > free:
        raise OSError(
            errno.ENOSPC,
            f"{len(positions)} documents need {size_text(needed)} in {table.path}, and the disk has "
            f"{size_text(free)}: make room, or choose a path on another disk",
        )
    if positions:
        tell = logger.warning if needed >= TOLD_BYTES else logger.info
        room = "" if free is None else f", of {size_text(free)} free"
        tell(f"{len(positions)} documents to compress: {size_text(needed)} in {table.path}{room}")


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
    write: Callable[[list[int], list[np.ndarray]], list[dict]],
    part_bytes: int,
    part_seconds: float,
    description: str | None,
) -> list[dict]:
    """Compresses `batches` and writes them in parts, what is compressed at an interruption included.

    Args:
        batches: positions of documents.
        compress: gives what is stored of a batch: memories, and sketches where there are some.
        write: writes a part of whole batches and returns its records.
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
            parts.extend(write(rows, [np.concatenate(part) for part in zip(*made, strict=True)]))

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


def compress_batch(
    model, table: MemoryTable, texts: Sequence[str], positions: Sequence[int] | np.ndarray
) -> tuple[torch.Tensor, int]:
    """Memories of `texts`, `[len(texts), width]`, and how many of these were cut.

    Raises:
        ValueError: a memory of another shape than the store's, not finite, or too large for its dtype; its document's
            place in `positions` is named.
    """
    processor = getattr(model, "processor", None)
    if processor is None:
        memories, cut = model.compress(texts, batch_size=len(texts)), []
    else:
        rows, cut = processor.encode_and_cut(texts)
        memories = model.compress_encoded(rows, batch_size=len(texts))
    expected = (len(texts), table.maker.num_memory_tokens, table.maker.hidden_size)
    if memories.shape != expected:
        raise ValueError(f"the model gave memories of shape {tuple(memories.shape)}; the store needs {expected}")
    memories = memories.detach().flatten(1)
    dtype = TORCH_TYPES[table.dtype]
    bad = torch.nonzero(~torch.isfinite(memories.to(dtype)).all(1)).flatten().tolist()
    if bad:
        which = f"the memory of documents[{positions[bad[0]]}] ({texts[bad[0]][:60]!r})"
        largest = memories[bad[0]].abs().max().item()
        if not math.isfinite(largest):
            raise ValueError(f"{which} is not finite: check the compressor's weights and the dtype it runs in")
        raise ValueError(
            f"{which} reaches {largest:.4g}, too large for {table.dtype}: use a new store, opened with dtype='bfloat16'"
        )
    return memories.to(dtype), len(cut)


def size_text(count: int) -> str:
    return f"{count / 2**30:,.1f} GiB" if count >= 2**30 else f"{count / 2**20:,.1f} MiB"


@dataclass
class Portion:
    """Documents that are to be compressed, with what is stored beside their memories, and in which batches.

    Attributes:
        positions: of the documents in the user's list, for messages.
        columns: the user's columns, in Arrow.
        replaced: keys whose rows are in the table already, and are removed when the new ones come in.
        batches: rows of the other attributes.
    """

    positions: list[int]
    keys: list[str]
    texts: list[str]
    columns: dict[str, pa.Array]
    replaced: set[str]
    batches: list[list[int]]

    def part(self, batches: list[list[int]]) -> "Portion":
        """The portion with these of its batches alone."""
        rows = [row for batch in batches for row in batch]
        place = {row: number for number, row in enumerate(rows)}
        return Portion(
            [self.positions[row] for row in rows],
            [self.keys[row] for row in rows],
            [self.texts[row] for row in rows],
            pick(self.columns, rows),
            self.replaced,
            [[place[row] for row in batch] for batch in batches],
        )


def write_portion(store, portion: Portion, description: str | None) -> tuple[list[dict], int]:
    """Compresses a portion by the store's model, and writes it as parts; returns their records, and how many were cut.

    `description` is that of a progress bar; None for no bar.
    """
    table, sketch, total = store._table, store._searcher.sketch, 0

    def some(values: list, rows: list[int]) -> list:
        return [values[row] for row in rows]

    def write(rows: list[int], made: list[np.ndarray]) -> list[dict]:
        keys = some(portion.keys, rows)
        replaced = [key for key in keys if key in portion.replaced]
        return table.write_part(keys, some(portion.texts, rows), made, pick(portion.columns, rows), replaced)

    def compress(batch: list[int]) -> tuple[np.ndarray, ...]:
        nonlocal total
        texts, positions = some(portion.texts, batch), some(portion.positions, batch)
        memories, cut = compress_batch(store.model, table, texts, positions)
        total += cut
        # Or their codes; and their sketches, if there are some.
        stored = table.form.encode(memories).cpu().numpy()
        return (stored,) if sketch is None else (stored, sketch.of_memories(memories).cpu().numpy())

    return fill(portion.batches, compress, write, store.write_bytes, store.write_seconds, description), total


def batch_size_of(model, batch_size: int | None, max_tokens_per_batch: int | None) -> tuple[str, int]:
    """Name and value of the one that says how large a batch is.

    Raises:
        ValueError: both are given, the one is less than 1, or there is no tokenizer to count tokens with.
    """
    both = {"batch_size": batch_size, "max_tokens_per_batch": max_tokens_per_batch}
    given = {name: value for name, value in both.items() if value is not None} or {"batch_size": DEFAULT_BATCH_SIZE}
    if len(given) > 1:
        raise ValueError(
            f"batch_size={batch_size} and max_tokens_per_batch={max_tokens_per_batch} both say how large a batch is: "
            "leave one of them out"
        )
    ((name, value),) = given.items()
    if value < 1:
        raise ValueError(f"{name} is {value}; it must be at least 1")
    if name == "max_tokens_per_batch" and getattr(model, "processor", None) is None:
        raise ValueError("max_tokens_per_batch needs a model with a processor, which counts tokens: give batch_size")
    return name, value


class Addition:
    """One call of [`MemoryStore.add`]: `documents` with their keys and the user's columns, on their way into a store.

    A document that occurs several times counts where it occurs first. `size` is what says how large a batch is, see
    [`batch_size_of`].
    """

    def __init__(
        self,
        store,
        documents: list[str],
        columns,
        size: tuple[str, int],
        processes: Processes,
        actors: "RayActors | None" = None,
    ):
        self.store = store
        self.actors = actors
        self.table: MemoryTable = store._table
        self.documents = documents
        self.keys = [self.table.key_of(document) for document in documents]
        self.first: dict[str, int] = {}
        for position, key in enumerate(self.keys):
            self.first.setdefault(key, position)
        self.size = size
        self.processes = processes
        digest = hashlib.sha256("".join(self.keys).encode()).hexdigest()
        processes.check_same((digest, size, sorted(columns or {})), f"documents, {size[0]} or columns")
        self.table.load(processes.from_first(self.table.newest))
        self.arrays = self.table.arrays(columns)

    def missing(self, damaged: Collection[str] = ()) -> dict[str, int]:
        """Keys of the documents that are not stored, or `damaged`, with their positions."""
        offsets = dict(zip(self.first, self.table.find(list(self.first)), strict=True))
        absent = [key for key, offset in offsets.items() if offset < 0]
        return {key: self.first[key] for key in [*absent, *damaged]}

    def is_done(self) -> bool:
        """Whether everything is stored already, and nothing waits to be taken in."""
        table = self.table
        if self.missing() or table.snapshot().unreadable or not set(self.arrays) <= set(table.names):
            return False
        if table.parts.are_waiting() and table.is_writable:
            return False
        return not table.changed_rows(list(self.first), pick(self.arrays, list(self.first.values())))

    def run(self, verify: str, show_progress: bool) -> None:
        """Compresses what is missing and takes it into the table."""
        table, processes = self.table, self.processes
        show_progress = show_progress and processes.is_first
        with ExitStack() as held:
            table.load(processes.from_first(table.bring_up))
            damaged = self._find_damaged(show_progress) if verify == "all" else set()
            while True:
                version = processes.from_first(lambda: self._make_way(damaged))
                if processes.is_first:
                    # Shared: nothing may give the table another layout until these parts are in.
                    held.enter_context(table.parts.lock(exclusive=False))
                table.load(processes.from_first(table.newest))
                if table.version == version:
                    break
                held.close()  # another process changed the table between the two locks
            missing = self.missing(damaged)
            size = size_text(bytes_needed(table, self.documents, missing.values()))
            description = f"Compressing documents ({size})" if show_progress else None
            portion = self._portion(missing, damaged)
            if self.actors is not None:
                parts, cut = self.actors.write(self.store, portion, description)
            else:
                mine = portion.part(portion.batches[processes.rank :: processes.count])
                parts, cut = write_portion(self.store, mine, description)
            written, cut = processes.gather(parts), sum(processes.gather(cut))
            if processes.is_first:
                report_cut(table, cut, len(missing))
        processes.from_first(lambda: self._take_in([part for each in written for part in each], missing))

    def _find_damaged(self, show_progress: bool) -> set[str]:
        """Keys of the documents whose rows are damaged."""
        table, damaged = self.table, set()
        blocks = list(table.blocks(table.find(list(self.first))))[self.processes.rank :: self.processes.count]
        with tqdm(total=len(self.first), desc="Checking stored memories", disable=not show_progress, delay=2) as bar:
            for some, offsets in blocks:
                damaged |= set(table.damage(unpacked(some), offsets))
                bar.update(len(some) * self.processes.count)
        damaged = set(self.first).intersection(*[set().union(*self.processes.gather(damaged))])
        if damaged and self.processes.is_first:
            logger.warning(f"{len(damaged)} memories in {table.path} are damaged on disk and are made again")
        return damaged

    def _make_way(self, damaged: set[str]) -> int:
        """Checks what is missing and the disk, and gives stored documents their columns; returns the version."""
        table = self.table
        with table.changing():
            missing = self.missing(damaged)
            check_encodable(self.store.model, self.documents, missing.values())
            check_space(table, self.documents, missing.values())
            stored = [key for key in self.first if key not in missing]
            table.set_columns(stored, pick(self.arrays, [self.first[key] for key in stored]))
            return table.version

    def _portion(self, missing: dict[str, int], damaged: set[str]) -> Portion:
        """What is compressed: new documents, then, in batches of their own, damaged ones.

        Taken out of the middle of other batches, damaged ones would shift all that follow.
        """
        positions, keys = list(missing.values()), list(missing)
        texts = [self.documents[position] for position in positions]
        again = [row for row, key in enumerate(keys) if key in damaged]
        new = [row for row, key in enumerate(keys) if key not in damaged]
        kind, most = self.size
        if kind == "batch_size":
            batches = [batch for rows in (new, again) for batch in plan_batches(texts, rows, most)]
        else:
            processor = self.store.model.processor
            batches = [batch for rows in (new, again) for batch in plan_token_batches(processor, texts, rows, most)]
        return Portion(positions, keys, texts, pick(self.arrays, positions), damaged & set(keys), batches)

    def _take_in(self, parts: list[dict], missing: dict[str, int]) -> None:
        """Commits parts with the documents `missing`, and gives those that others stored meanwhile their columns."""
        table = self.table
        with table.parts.lock(exclusive=True):
            table.refresh()
            others = [key for key, offset in zip(missing, table.find(list(missing)), strict=True) if offset >= 0]
            if table.remote is not None:
                others = []  # these are the parts, and nobody else writes meanwhile
            table.commit(parts)
            table.set_columns(others, pick(self.arrays, [missing[key] for key in others]))
            table.deletions.note()
