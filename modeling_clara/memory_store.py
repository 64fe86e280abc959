"""Documents and their memories on disk: each document is compressed once, ever, and read by key from then on."""

import errno
import math
import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers.utils import logging

from .memory_table import KEY_LENGTH, NUMPY_TYPES, CorruptMemoryError, Maker, MemoryTable, is_blank, key_of, pick


logger = logging.get_logger(__name__)

TORCH_TYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
READ_ROWS = 512


class MemoryStore:
    """Documents, their memories, and columns of the user's: one row per distinct text. Made by [`MemoryStore.open`].

    The folder is a Lance dataset with the columns `key` (hash of the text and of the compressor that made the memory),
    `text`, `memory` (fixed-size list of `num_memory_tokens * hidden_size` values; bfloat16 as its bits in uint16),
    `checksum` (CRC-32 of key and memory), and any others given to [`MemoryStore.add`]. Each write is a new version of
    the dataset: a crash or a full disk costs at most what was not appended yet, and readers of an older version go on.

    Data-loader workers may be forked or spawned. A pickled store holds its path, not its rows nor the model: the copy
    reads, and cannot add.

    Example:

    ```python
    store = MemoryStore.open("runs/memories", model)
    keys = store.add(["A first document.", "A second one."], columns={"title": ["first", "second"]})
    memories = store.get(keys)  # [2, num_memory_tokens, hidden_size]
    titles = store.columns(keys, ["title"])["title"]  # ["first", "second"]
    ```
    """

    write_bytes = 64 * 2**20  # an append is due at this many bytes of memories ...
    write_seconds = 30.0  # ... or after this time, which is then what a kill can cost

    def __init__(self, table: MemoryTable, model=None):
        self._table = table
        self.model = model

    @classmethod
    def open(cls, path: str | os.PathLike, model=None, dtype: str = "auto") -> "MemoryStore":
        """Opens the store at `path`, or creates it there when a model is given.

        Args:
            path: a local folder.
            model: the model whose compressor makes the memories; without one, an existing store is opened to read.
            dtype: of the stored memories, "float16", "bfloat16", "float32", or "auto": an existing store's own; for a
                new one bfloat16 if the model is in bfloat16, else float16.

        Raises:
            FileNotFoundError: nothing is at `path` and no model is given.
            ValueError: `path` holds something else; the store was made by another compressor, rate, width or document
                length (both makers are named), or holds another dtype.
        """
        if dtype != "auto" and dtype not in TORCH_TYPES:
            raise ValueError(f"dtype is {dtype!r}; it must be 'auto', 'float16', 'bfloat16' or 'float32'")
        path = Path(path).expanduser().absolute()
        maker = None if model is None else Maker.of(model)
        if is_blank(path):
            if maker is None:
                raise FileNotFoundError(
                    f"no memory store at {path}: open it with a model to create it, or mend the path"
                )
            auto = "bfloat16" if model.dtype == torch.bfloat16 else "float16"
            MemoryTable.create(path, maker, auto if dtype == "auto" else dtype)
        table = MemoryTable.open(path)
        if maker is not None and not maker.makes_the_same_as(table.maker):
            raise ValueError(
                f"the memories in {path} were made by {table.maker}; the model given is {maker}: open the store with "
                "the model that made it, or choose another path"
            )
        if dtype not in ("auto", table.dtype):
            raise ValueError(f"the store at {path} holds {table.dtype}, not {dtype}: choose another path, or 'auto'")
        return cls(table, model)

    @staticmethod
    def key_of(fingerprint: str, text: str) -> str:
        """The key of `text` compressed by the compressor with this fingerprint: 32 hexadecimal digits."""
        return key_of(fingerprint, text)

    @property
    def path(self) -> Path:
        return self._table.path

    @property
    def maker(self) -> Maker:
        """Which compressor made the memories."""
        return self._table.maker

    @property
    def dtype(self) -> torch.dtype:
        return TORCH_TYPES[self._table.dtype]

    def __len__(self) -> int:
        return len(self._table)

    def __contains__(self, key: str) -> bool:
        return bool(self._table.find([key])[0] >= 0)

    def __repr__(self) -> str:
        return f"MemoryStore({str(self.path)!r}: {len(self)} documents, {self._table.dtype}, made by {self.maker})"

    def __getstate__(self) -> dict:
        return {**self.__dict__, "model": None}

    def keys(self, documents: Sequence[str]) -> list[str]:
        """The documents' keys, in their order, whether they are stored or not.

        Raises:
            ValueError: a document is empty or not a string (its position is named).
        """
        return [self._table.key_of(document) for document in _checked(documents)]

    def get(self, keys: Sequence[str]) -> torch.Tensor:
        """Memories of `keys`, in their order, repeated keys included.

        Returns:
            `[len(keys), num_memory_tokens, hidden_size]` in the store's dtype, on the CPU.

        Raises:
            KeyError: names the first key that is not stored.
            CorruptMemoryError: names the first key whose memory is damaged on disk.
        """
        keys, offsets = self._locate(keys)
        memories = np.empty((len(keys), self.maker.width), NUMPY_TYPES[self._table.dtype])
        for start in range(0, len(keys), READ_ROWS):
            rows = slice(start, start + READ_ROWS)
            intact = self._table.read(keys[rows], offsets[rows], memories[rows])
            if not intact.all():
                raise CorruptMemoryError(
                    f"the memory of key {keys[start + int(np.argmin(intact))]} in {self.path} is damaged on disk: "
                    "call add() with its document again, which makes it anew"
                )
        memories = torch.from_numpy(memories).view(self.dtype)
        return memories.view(len(keys), self.maker.num_memory_tokens, self.maker.hidden_size)

    def columns(self, keys: Sequence[str], names: Sequence[str] | None = None) -> dict[str, list]:
        """The texts (column `text`) and the user's columns of `keys`, in their order: those in `names`, or all.

        Raises:
            KeyError: names the first key that is not stored, or a column that the store does not have.
            CorruptMemoryError: a text or column is damaged on disk.
        """
        keys, offsets = self._locate(keys)
        known = self._table.column_names
        for name in names or []:
            if name not in known:
                raise KeyError(f"the memory store at {self.path} has no column {name!r}; it has {known}")
        return self._table.columns(keys, offsets, known if names is None else list(names))

    def _locate(self, keys: Sequence[str]) -> tuple[list[str], np.ndarray]:
        if isinstance(keys, str):
            raise ValueError(f"keys must be a list of keys, not the single string {keys!r}")
        keys = list(keys)
        offsets = self._table.find(keys)
        if (offsets < 0).any():
            key = keys[int(np.argmax(offsets < 0))]
            raise KeyError(f"key {key!r} is not in the memory store at {self.path}: add() its document first")
        return keys, offsets

    def add(
        self,
        documents: Sequence[str],
        columns: dict[str, Sequence] | None = None,
        batch_size: int = 64,
        show_progress: bool = True,
    ) -> list[str]:
        """Stores `documents`; compresses those that are not stored yet, each distinct text once, longest first.

        Those stored are read once, and made again if they are damaged on disk. Rows are appended on the way, so that
        after an interruption the same call compresses only the rest.

        Args:
            documents: non-empty strings.
            columns: values to keep beside each document, by column name, one for each document. They replace those of
                documents already stored; a text that occurs several times in `documents` keeps the first one's. A new
                column is None for the other documents stored before.
            batch_size: documents per forward.
            show_progress: whether to show a bar.

        Returns:
            The documents' keys, in their order.

        Raises:
            ValueError: the store was opened without a model, or the model's compressor changed since; a bad document
                (its position is named) or column; a memory that is not finite, or too large for float16.
            OSError: the disk is full, or too small for what is missing; what was appended before is kept.
        """
        self._check_model()
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
        documents = _checked(documents)
        keys = self.keys(documents)
        first: dict[str, int] = {}
        for position, key in enumerate(keys):
            first.setdefault(key, position)
        try:
            self._table.forget()  # another process may have added since
            arrays = self._table.arrays(columns or {}, len(documents))
            self._table.remove_unreadable()
            damaged = self._damaged(list(first), show_progress)
            if damaged:
                logger.warning(f"{len(damaged)} memories in {self.path} are damaged on disk and are made again")
                self._table.remove(damaged)
            offsets = self._table.find(list(first))
            stored = [key for key, offset in zip(first, offsets, strict=True) if offset >= 0]
            missing = [position for position, offset in zip(first.values(), offsets, strict=True) if offset < 0]
            self._check_space(missing, documents)
            self._table.set_columns(stored, pick(arrays, [first[key] for key in stored]))
            self._compress(missing, keys, documents, arrays, batch_size, show_progress)
        finally:
            self._table.forget()
        self._table.find([])  # loads the index here, so that workers forked later share it
        return keys

    def _check_model(self) -> None:
        if self.model is None:
            raise ValueError(
                f"the memory store at {self.path} is open to read: add through MemoryStore.open(path, model)"
            )
        maker = Maker.of(self.model)
        if not maker.makes_the_same_as(self.maker):
            raise ValueError(
                f"the model's compressor has changed since the memory store at {self.path} was opened, from "
                f"{self.maker} to {maker}: open a store at another path for it"
            )

    def _damaged(self, keys: list[str], show_progress: bool) -> list[str]:
        offsets = self._table.find(keys)
        order = np.argsort(offsets)[int((offsets < 0).sum()) :]
        scratch = np.empty((min(READ_ROWS, len(order)), self.maker.width), NUMPY_TYPES[self._table.dtype])
        damaged = []
        with tqdm(total=len(order), desc="Checking stored memories", disable=not show_progress, delay=2) as bar:
            for start in range(0, len(order), READ_ROWS):
                rows = order[start : start + READ_ROWS]
                some = [keys[row] for row in rows]
                intact = self._table.read(some, offsets[rows], scratch[: len(rows)], whole=True)
                damaged += [key for key, good in zip(some, intact, strict=True) if not good]
                bar.update(len(rows))
        return damaged

    def _check_space(self, missing: list[int], documents: Sequence[str]) -> None:
        row = self.maker.width * self.dtype.itemsize + 2 * KEY_LENGTH
        needed = len(missing) * row + sum(len(documents[position]) for position in missing)
        free = shutil.disk_usage(self.path).free
        if missing:
            logger.info(f"{len(missing)} documents to compress: {needed / 2**20:,.1f} MiB in {self.path}")
        if needed > free:
            raise OSError(
                errno.ENOSPC,
                f"{len(missing)} documents need {needed / 2**20:,.1f} MiB in {self.path}, and the disk has "
                f"{free / 2**20:,.1f} MiB: make room, or choose a path on another disk",
            )

    def _compress(self, missing, keys, documents, arrays, batch_size: int, show_progress: bool) -> None:
        order = sorted(missing, key=lambda position: -len(documents[position]))
        waiting: list[tuple[list[int], np.ndarray]] = []

        def append() -> None:
            rows = [position for batch, _ in waiting for position in batch]
            memories = [part for _, part in waiting]
            waiting.clear()  # first: rows that cannot be written must not be tried again on the way out
            if rows:
                texts = [documents[row] for row in rows]
                self._table.append([keys[row] for row in rows], texts, np.concatenate(memories), pick(arrays, rows))

        since = time.monotonic()
        disable = not (show_progress and missing)
        with tqdm(total=len(order), desc="Compressing documents", unit="doc", disable=disable) as bar:
            try:
                for start in range(0, len(order), batch_size):
                    batch = order[start : start + batch_size]
                    waiting.append((batch, self._memories(batch, documents)))
                    bar.update(len(batch))
                    size = sum(part.nbytes for _, part in waiting)
                    if size >= self.write_bytes or time.monotonic() - since >= self.write_seconds:
                        append()
                        since = time.monotonic()
            finally:
                append()

    def _memories(self, batch: list[int], documents: Sequence[str]) -> np.ndarray:
        """Compresses the documents at the positions `batch`: `[len(batch), width]` as they are stored."""
        memories = self.model.compress([documents[position] for position in batch], batch_size=len(batch))
        expected = (len(batch), self.maker.num_memory_tokens, self.maker.hidden_size)
        if memories.shape != expected:
            raise ValueError(f"the model gave memories of shape {tuple(memories.shape)}; the store needs {expected}")
        memories = memories.detach().cpu().flatten(1)
        stored = memories.to(self.dtype)
        bad = torch.nonzero(~torch.isfinite(stored).all(1)).flatten().tolist()
        if bad:
            document = documents[batch[bad[0]]]
            which = f"the memory of documents[{batch[bad[0]]}] ({document[:60]!r})"
            largest = memories[bad[0]].abs().max().item()
            if not math.isfinite(largest):
                raise ValueError(f"{which} is not finite: check the compressor's weights and the dtype it runs in")
            raise ValueError(
                f"{which} reaches {largest:.4g}, too large for {self._table.dtype}: use a new store, opened with "
                "dtype='bfloat16'"
            )
        return stored.view(torch.uint16).numpy() if self.dtype == torch.bfloat16 else stored.numpy()


def _checked(documents: Sequence[str]) -> list[str]:
    if isinstance(documents, str):
        raise ValueError(f"documents must be a list of strings, not the single string {documents[:60]!r}")
    documents = list(documents)
    for position, document in enumerate(documents):
        if not isinstance(document, str):
            raise ValueError(f"documents[{position}] is {document!r}; it must be a string")
        if not document.strip():
            raise ValueError(f"documents[{position}] is empty")
        try:
            document.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"documents[{position}] is not valid Unicode: {error}") from error
    return documents
