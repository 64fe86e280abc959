"""Documents and their memories on disk: each document is compressed once, ever, and read by key from then on."""

import hashlib
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers.utils import logging

from .build import (
    TORCH_TYPES,
    bytes_needed,
    check_encodable,
    check_space,
    compress_batch,
    count_cut,
    fill,
    plan_batches,
    report_cut,
    size_text,
)
from .journal import Signature
from .keys import Maker, key_of
from .processes import Processes
from .table import NUMPY_TYPES, READ_ROWS, CorruptMemoryError, MemoryTable, is_blank, pick


logger = logging.get_logger(__name__)


class MemoryStore:
    """Documents, their memories, and columns of the user's: one row per distinct text. Made by [`MemoryStore.open`].

    The folder is a Lance dataset with the columns `key` (hash of the text and of the compressor that made the memory),
    `text`, `memory` (fixed-size list of `num_memory_tokens * hidden_size` values; bfloat16 as its bits in uint16),
    `checksum` (CRC-32 of key and memory), and any others given to [`MemoryStore.add`]. Each write is a new version of
    the dataset: a crash or a full disk costs at most what was not written yet, and readers of an older version go on.

    What is guaranteed: `get` checks every memory that it reads against its checksum and key, and `columns` every text;
    damage is an error there, never a value. `add` looks for damage to repair: it reads files whole that changed since
    they were written or last found sound, by size and time of change, and with `verify="all"` all of them, so that what
    a disk forgot silently is found too.

    A pickled store holds its path, not its rows nor the model: the copy reads, and cannot add. Data-loader workers get
    such copies where they are started by "forkserver" or "spawn" (`multiprocessing_context` of a DataLoader); forked
    ones, in which Lance can hang, are refused.

    Example:

    ```python
    store = MemoryStore.open("runs/memories", model)
    keys = store.add(["A first document.", "A second one."], columns={"title": ["first", "second"]})
    memories = store.get(keys)  # [2, num_memory_tokens, hidden_size]
    titles = store.columns(keys, ["title"])["title"]  # ["first", "second"]
    ```
    """

    write_bytes = 256 * 2**20  # a part is written at this many bytes of memories ...
    write_seconds = 30.0  # ... or after this time, which is then what a kill can cost a process

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

    def __iter__(self) -> Iterator[str]:
        """The keys of all documents, in the order of their digits."""
        return iter(self._table.all_keys())

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
        # Each row once and in the order on disk: several hundred take half as long so.
        distinct, first, place = np.unique(offsets, return_index=True, return_inverse=True)
        memories = np.empty((len(distinct), self.maker.width), NUMPY_TYPES[self._table.dtype])
        damaged = []
        for start in range(0, len(distinct), READ_ROWS):
            rows = slice(start, start + READ_ROWS)
            intact = self._table.read([keys[position] for position in first[rows]], distinct[rows], memories[rows])
            damaged += first[rows][~intact].tolist()
        if damaged:
            raise CorruptMemoryError(
                f"the memory of key {keys[min(damaged)]} in {self.path} is damaged on disk: call add() with its "
                "document again and verify='all', which makes it anew"
            )
        if not np.array_equal(place, np.arange(len(keys))):
            memories = memories[place]
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
        verify: str = "changed",
        distributed: bool = False,
    ) -> list[str]:
        """Stores `documents`; compresses those that are not stored yet, each distinct text once, longest first.

        Finished parts are safe on disk at once and go into the store together at the end. After an interruption, a kill
        included, the same call compresses only the rest, in the batches of the uninterrupted call: on like devices all
        memories equal its memories bit for bit, whatever the number of processes. Memories made again because single
        rows were damaged get other neighbours in their batch, on which the last bits depend.

        Before anything is compressed, all missing documents are checked, and one warning tells how many will be cut.

        Args:
            documents: non-empty strings without tokens that the model reserves.
            columns: values to keep beside each document, by column name, one for each document. They replace those of
                documents already stored; a text that occurs several times in `documents` keeps the first one's. A new
                column is None for the other documents stored before.
            batch_size: documents per forward.
            show_progress: whether to show a bar (of several processes, in the first).
            verify: which stored memories of `documents` are read, and made again if they are not what was written:
                "changed", those in files whose size or time of change differs from when they were last found sound,
                or "all". `get` verifies what it reads, always.
            distributed: whether all processes of the running torch.distributed job call this together, with the same
                arguments: each compresses its share, and all return when everything is stored. The path must be on a
                file system that they share. Without such a job it means nothing.

        Returns:
            The documents' keys, in their order.

        Raises:
            ValueError: the store was opened without a model, or the model's compressor changed since; a bad document
                (its position is named) or column; a memory that is not finite, or too large for float16; processes
                with different arguments or without a shared file system.
            OSError: the disk is full, or too small for what is missing; what was written before is kept.
        """
        self._check_model()
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
        if verify not in ("changed", "all"):
            raise ValueError(f"verify is {verify!r}; it must be 'changed' or 'all'")
        documents = _checked(documents)
        keys = self.keys(documents)
        first: dict[str, int] = {}
        for position, key in enumerate(keys):
            first.setdefault(key, position)
        with Processes.of(distributed) as processes:
            show_progress = show_progress and processes.is_first
            try:
                processes.check_same(
                    (_digest(keys), batch_size, sorted(columns or {})), "documents, batch_size or columns"
                )
                processes.check_shared(self._table.parts.folder)
                self._table.load(processes.from_first(self._bring_up))
                arrays = self._table.arrays(columns or {}, len(documents))
                damaged = self._find_damaged(list(first), verify, processes, show_progress)
                self._table.load(processes.from_first(lambda: self._make_way(damaged, first, arrays, documents)))
                missing = self._missing(first)
                again = [position for key, position in missing.items() if key in damaged]
                new = [position for key, position in missing.items() if key not in damaged]
                # Apart: taken out of the middle of other batches, damaged ones would shift all that follow.
                batches = [batch for some in (new, again) for batch in plan_batches(documents, some, batch_size)]
                size = size_text(bytes_needed(self._table, documents, missing.values()))
                description = f"Compressing documents ({size})" if show_progress else None
                share = batches[processes.rank :: processes.count]
                cut = sum(processes.gather(count_cut(self.model, documents, share, show_progress)))
                if processes.is_first:
                    report_cut(self._table, cut, len(missing))
                parts = processes.gather(self._compress(share, keys, documents, arrays, description))
                processes.from_first(lambda: self._table.commit([part for each in parts for part in each]))
            except BaseException:
                if processes.is_first:
                    self._table.commit()
                raise
            finally:
                self._table.forget()
            version = processes.from_first(lambda: self._table.version)
        self._table.load(version)
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

    def _bring_up(self) -> int:
        """Takes in what an interrupted call left, drops what cannot be read; returns the version."""
        self._table.forget()  # another process may have added since
        self._table.commit()
        self._table.remove_unreadable()
        return self._table.version

    def _find_damaged(self, keys: list[str], verify: str, processes: Processes, show_progress: bool) -> set[str]:
        """Those of `keys` whose rows are damaged, in pieces of the table that are not known to be sound."""
        pieces = processes.from_first(lambda: self._table.doubtful(keys, everything=verify == "all"))
        pieces = pieces[processes.rank :: processes.count]
        damaged: list[str] = []
        sound: dict[str, Signature] = {}
        total = sum(piece.stop - piece.start for piece in pieces)
        with tqdm(total=total, desc="Checking stored memories", disable=not show_progress, delay=2) as bar:
            for piece in pieces:
                before = len(damaged)
                for count, found in self._table.damaged(piece):
                    damaged += found
                    bar.update(count)
                if len(damaged) == before:
                    sound |= piece.files
        results = processes.gather((damaged, sound))
        if processes.is_first:
            files = {name: signature for _, found in results for name, signature in found.items()}
            self._table.trust(files)
        return set(keys).intersection(key for found, _ in results for key in found)

    def _missing(self, first: dict[str, int]) -> dict[str, int]:
        """Those of `first`, keys with their positions, that are not stored."""
        offsets = self._table.find(list(first))
        return {key: position for (key, position), offset in zip(first.items(), offsets, strict=True) if offset < 0}

    def _make_way(self, damaged: set[str], first: dict[str, int], arrays: dict, documents: Sequence[str]) -> int:
        """Removes damaged rows, checks what is missing and the disk, and gives stored documents their columns.

        Returns the version.
        """
        if damaged:
            logger.warning(f"{len(damaged)} memories in {self.path} are damaged on disk and are made again")
            self._table.remove(sorted(damaged))
        missing = self._missing(first)
        check_encodable(self.model, documents, missing.values())
        check_space(self._table, documents, missing.values())
        stored = [key for key in first if key not in missing]
        self._table.set_columns(stored, pick(arrays, [first[key] for key in stored]))
        return self._table.version

    def _compress(self, batches, keys, documents, arrays, description: str | None) -> list[dict]:
        def write(rows: list[int], memories: np.ndarray) -> dict:
            texts = [documents[row] for row in rows]
            return self._table.write_part([keys[row] for row in rows], texts, memories, pick(arrays, rows))

        def compress(batch: list[int]) -> np.ndarray:
            return compress_batch(self.model, self._table, documents, batch)

        return fill(batches, compress, write, self.write_bytes, self.write_seconds, description)


def _digest(keys: list[str]) -> str:
    return hashlib.sha256("".join(keys).encode()).hexdigest()


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
