"""Documents and their memories on disk: each document is compressed once, ever, read by key and found by questions."""

import errno
import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from torch.distributed.tensor import DTensor
from tqdm.auto import tqdm
from transformers.utils import logging

from .build import (
    bytes_needed,
    check_encodable,
    check_space,
    compress_batch,
    fill,
    plan_batches,
    report_cut,
    size_text,
)
from .columns import check_columns
from .encoding import FITTED, FORMS
from .keys import Maker, key_of
from .processes import Processes
from .search import Found, Searcher
from .snapshot import Unreadable, unpacked
from .table import READ_ROWS, TORCH_TYPES, CorruptMemoryError, MemoryTable, code_column, is_blank, pick
from .upkeep import Report, export, fit_store, stats_of, verify_store


logger = logging.get_logger(__name__)

# So many files make every read slow: an addition that leaves more joins them.
MOST_PIECES = 64
# Files that older versions alone have are kept so long after an addition, for those that still read them.
KEPT = timedelta(minutes=10)


class MemoryStore:
    """Documents, their memories, and columns of the user's: one row per distinct text. Made by [`MemoryStore.open`].

    The folder is a Lance dataset with the columns `key` (hash of the text and of the compressor that made the memory),
    `text`, `memory` (or its codes, where the store has another form than "none"), any others given to
    [`MemoryStore.add`], and a checksum for every value. Each write is a new version of the dataset: a crash or a full
    disk costs at most what was not written yet, and readers of an older version go on.

    What is guaranteed: `get` checks every memory that it reads against its checksum and key, `columns` every value
    (those of stores of format 1 have no checksums, of texts apart), `search` every memory that it scores; damage is an
    error there, never a value. `add` makes anew what is lost with a file; [`MemoryStore.verify`] reads everything.

    A pickled store holds its path, not its rows nor the model: the copy reads, and cannot add. Data-loader workers get
    such copies where they are started by "forkserver" or "spawn" (`multiprocessing_context` of a DataLoader); forked
    ones, in which Lance can hang, are refused.

    Example:

    ```python
    store = MemoryStore.open("runs/memories", model)
    keys = store.add(["A first document.", "A second one."], columns={"title": ["first", "second"]})
    memories = store.get(keys)  # [2, num_memory_tokens, hidden_size]
    titles = store.columns(keys, ["title"])["title"]  # ["first", "second"]
    found = store.search(["Which is first?"], top_k=1)  # found.scores, found.keys, found.texts, found.columns
    ```
    """

    write_bytes = 256 * 2**20  # a part is written at this many bytes of memories ...
    write_seconds = 30.0  # ... or after this time, which is then what a kill can cost a process

    def __init__(self, table: MemoryTable, model=None):
        self._table = table
        self._searcher = Searcher(table)
        self.model = model
        self._seen = None if model is None else _state_of(model)

    @classmethod
    def open(cls, path: str | os.PathLike, model=None, dtype: str = "auto", form: str = "auto") -> "MemoryStore":
        """Opens the store at `path`, or creates it there when a model is given.

        Args:
            path: a local folder.
            model: the model whose compressor makes the memories; without one, an existing store is opened to read.
            dtype: of the memories, "float16", "bfloat16", "float32", or "auto": an existing store's own; for a new one
                bfloat16 if the model is in bfloat16, else float16.
            form: in which memories are stored: "none" (as they are), "rotated8", "rotated4", "rotated2", "fitted2",
                "fitted1.5" or "fitted1" (the number is bits per value), or "auto": an existing store's own, "none" for
                a new one. A store of a fitted form keeps memories as they are until [`MemoryStore.fit`].

        Raises:
            FileNotFoundError: nothing is at `path` and no model is given.
            ValueError: `path` holds something else; the store was made by another compressor, rate, width or document
                length (both makers are named), or holds another dtype or form.
        """
        if dtype != "auto" and dtype not in TORCH_TYPES:
            raise ValueError(f"dtype is {dtype!r}; it must be 'auto', 'float16', 'bfloat16' or 'float32'")
        if form not in ("auto", *FORMS):
            raise ValueError(f"form is {form!r}; it must be 'auto' or one of {FORMS}")
        path = Path(path).expanduser().absolute()
        maker = None if model is None else Maker.of(model)
        if is_blank(path):
            if maker is None:
                raise FileNotFoundError(
                    f"no memory store at {path}: open it with a model to create it, or mend the path"
                )
            auto = "bfloat16" if model.dtype == torch.bfloat16 else "float16"
            MemoryTable.create(path, maker, auto if dtype == "auto" else dtype, "none" if form == "auto" else form)
        table = MemoryTable.open(path)
        if maker is not None and not maker.makes_the_same_as(table.maker):
            raise ValueError(
                f"the memories in {path} were made by {table.maker}; the model given is {maker}: open the store with "
                "the model that made it, or choose another path"
            )
        if dtype not in ("auto", table.dtype):
            raise ValueError(
                f"dtype is {dtype!r}, and the store at {path} holds {table.dtype}, not {dtype}: choose another path, "
                "or dtype='auto'"
            )
        if form not in ("auto", table.wanted_form):
            raise ValueError(
                f"form is {form!r}, and the store at {path} has form {table.wanted_form!r}: open it with form='auto' "
                f"and call recode({form!r}), or choose another path"
            )
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

    @property
    def form(self) -> str:
        """In which the memories are stored now."""
        return self._table.form.name

    @property
    def stored_as(self) -> str:
        """Tells apart all that memories can be stored as: their form, and the hash of what was fitted for it."""
        return self._table.memory_column

    def __len__(self) -> int:
        return len(self._table)

    def __iter__(self) -> Iterator[str]:
        """The keys of all documents, in the order of their digits."""
        return iter(unpacked(self._table.snapshot().keys))

    def __contains__(self, key: str) -> bool:
        return bool(self._table.find([key])[0] >= 0)

    def __repr__(self) -> str:
        kind = self._table.dtype if self.form == "none" else f"{self._table.dtype} as {self.form}"
        return f"MemoryStore({str(self.path)!r}: {len(self)} documents, {kind}, made by {self.maker})"

    def __getstate__(self) -> dict:
        return {**self.__dict__, "model": None, "_seen": None}

    def keys(self, documents: Sequence[str]) -> list[str]:
        """The documents' keys, in their order, whether they are stored or not.

        Raises:
            ValueError: a document is empty or not a string (its position is named).
        """
        return [self._table.key_of(document) for document in _checked(documents)]

    # Reading

    def get(self, keys: Sequence[str] | Sequence[Sequence[str]]) -> torch.Tensor | list[torch.Tensor]:
        """Memories of `keys`, in their order, repeated keys included.

        Args:
            keys: a list of keys, or one list for each question, such as `search` gives.

        Returns:
            `[len(keys), num_memory_tokens, hidden_size]` in the store's dtype, on the CPU; of a list of lists, a list.

        Raises:
            KeyError: names the first key that is not stored.
            CorruptMemoryError: names the first key whose memory is damaged on disk.
        """
        if not isinstance(keys, str) and len(keys) and not isinstance(keys[0], str):
            counts = [len(some) for some in keys]
            return list(self.get([key for some in keys for key in some]).split(counts))
        return self._newest_if_gone(lambda: self._get(keys))

    def _get(self, keys: Sequence[str]) -> torch.Tensor:
        keys, offsets = self._locate(keys)
        # Each row once and in the order on disk: several hundred take half as long so.
        distinct, first, place = np.unique(offsets, return_index=True, return_inverse=True)
        stored = self._read([keys[position] for position in first], distinct, first)
        memories = stored.view(len(distinct), self.maker.num_memory_tokens, self.maker.hidden_size)
        return memories if np.array_equal(place, np.arange(len(keys))) else memories[torch.from_numpy(place)]

    def _read(self, keys: list[str], offsets: np.ndarray, order: np.ndarray | None = None) -> torch.Tensor:
        """Verified memories `[n, width]` in the store's dtype; of damaged ones, that first in `order` is named."""
        stored = torch.from_numpy(self._table.verified(keys, offsets, self._table.memory_column, order))
        if self.form == "none":
            return self._table.form.decode(stored)
        memories = torch.empty(len(keys), self.maker.width, dtype=self.dtype)
        for start in range(0, len(keys), READ_ROWS):
            part = slice(start, start + READ_ROWS)
            memories[part] = self._table.form.decode(stored[part]).to(self.dtype)
        return memories

    def columns(self, keys: Sequence[str], names: Sequence[str] | None = None) -> dict[str, list]:
        """The texts (column `text`) and the user's columns of `keys`, in their order: those in `names`, or all.

        Raises:
            KeyError: names the first key that is not stored, or a column that the store does not have.
            CorruptMemoryError: a text or column is damaged on disk.
        """
        return self._newest_if_gone(lambda: self._columns(keys, names))

    def _columns(self, keys: Sequence[str], names: Sequence[str] | None) -> dict[str, list]:
        keys, offsets = self._locate(keys)
        known = self._table.column_names
        for name in names or []:
            if name not in known:
                raise KeyError(f"the memory store at {self.path} has no column {name!r}; it has {known}")
        return self._table.columns(keys, offsets, known if names is None else list(names))

    def search(
        self,
        questions: Sequence[str] | torch.Tensor,
        top_k: int = 5,
        exact: bool = False,
        filter: str | None = None,
        batch_size: int = 32,
    ) -> Found:
        """The stored documents whose memories are nearest to questions, by cosine similarity as in `model.retrieve`.

        Args:
            questions: B texts, read by the model's `encode_questions`, or what that gave, `[B, l, H]`.
            top_k: documents for each question; fewer where there are fewer.
            exact: whether to score every stored memory. Otherwise a store that was fitted is searched by sketches, the
                best of which are scored exactly; one that was not is searched exactly.
            filter: an SQL condition over the text and the user's columns, such as "title LIKE 'A%' AND year > 1990".
            batch_size: questions per forward.

        Returns:
            `scores` `[B, k]`, float32; `keys` and `texts`, B lists of k; `columns`, by name B lists of k.

        Raises:
            ValueError: questions that are no texts, or of another shape; a wrong filter.
            CorruptMemoryError: a memory that was scored is damaged on disk.
        """
        queries = self._queries(questions, batch_size)
        if not isinstance(top_k, int) or top_k < 1:
            raise ValueError(f"top_k is {top_k!r}; it must be at least 1")

        def search() -> Found:
            scores, keys = self._searcher.search(queries, top_k, exact, filter)
            flat = [key for some in keys for key in some]
            columns = self._columns(flat, None)
            rows = {name: _split(values, scores.shape[1], len(keys)) for name, values in columns.items()}
            return Found(scores, keys, rows.pop("text"), rows)

        return self._newest_if_gone(search)

    def _queries(self, questions: Sequence[str] | torch.Tensor, batch_size: int) -> torch.Tensor:
        shape = (self.maker.num_memory_tokens, self.maker.hidden_size)
        if not isinstance(questions, torch.Tensor):
            if self.model is None:
                raise ValueError(
                    f"the memory store at {self.path} was opened without a model: give questions as "
                    "model.encode_questions(questions), or open it with the model"
                )
            with torch.no_grad():
                questions = self.model.encode_questions(_listed(questions, "questions"), batch_size=batch_size)
        if questions.ndim != 3 or questions.shape[1:] != shape:
            raise ValueError(
                f"questions have shape {tuple(questions.shape)}; the store needs [any, {shape[0]}, {shape[1]}]"
            )
        queries = questions.detach().float().cpu().flatten(1)
        if not torch.isfinite(queries).all():
            raise ValueError("questions hold values that are not finite")
        return torch.nn.functional.normalize(queries, dim=1)

    def _locate(self, keys: Sequence[str]) -> tuple[list[str], np.ndarray]:
        if isinstance(keys, str):
            raise ValueError(f"keys must be a list of keys, not the single string {keys!r}")
        keys = [str(key) for key in keys]
        offsets = self._table.find(keys)
        if (offsets < 0).any():
            key = keys[int(np.argmax(offsets < 0))]
            raise KeyError(f"key {key!r} is not in the memory store at {self.path}: add() its document first")
        return keys, offsets

    def _newest_if_gone(self, read):
        """What `read` gives; where it fails since another process changed the store, of what is there now."""
        while True:
            try:
                return read()
            except (CorruptMemoryError, Unreadable) as error:
                if self._table.refresh():
                    continue
                if isinstance(error, Unreadable):
                    raise CorruptMemoryError(f"the memory store at {self.path} cannot be read ({error})") from error
                raise

    # Adding

    def add(
        self,
        documents: Sequence[str],
        columns: Mapping[str, Sequence] | None = None,
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

        Before anything is compressed, all missing documents are checked; how many were cut is told at the end. A call
        that finds everything stored writes nothing, so that it works where the store cannot be written to.

        Args:
            documents: non-empty strings without tokens that the model reserves: a list, a column of a data set, a NumPy
                array or a pandas series.
            columns: values to keep beside each document, by column name, one for each document. They replace those of
                documents already stored; a text that occurs several times in `documents` keeps the first one's. A new
                column is None for the other documents stored before. What could not come back as it is is refused.
            batch_size: documents per forward.
            show_progress: whether to show a bar (of several processes, in the first).
            verify: which stored memories of `documents` are made again: "changed", those in files that are gone or
                cannot be read, or "all", which reads them, also those that are not what was written. `get` verifies
                what it reads, always.
            distributed: whether all processes of the running torch.distributed job call this together, with the same
                arguments: each compresses its share, and all return when everything is stored. The path must be on a
                file system that they share. Without such a job it means nothing.

        Returns:
            The documents' keys, in their order.

        Raises:
            ValueError: the store was opened without a model, or the model's compressor changed since; a bad document
                (its position is named) or column; a memory that is not finite, or too large for float16; processes
                with different arguments or without a shared file system.
            OSError: the disk is full, too small for what is missing, or read-only; what was written before is kept.
        """
        self._check_model()
        if batch_size < 1:
            raise ValueError(f"batch_size is {batch_size}; it must be at least 1")
        if verify not in ("changed", "all"):
            raise ValueError(f"verify is {verify!r}; it must be 'changed' or 'all'")
        documents = _checked(documents)
        check_columns(columns, len(documents))
        keys = [self._table.key_of(document) for document in documents]
        first: dict[str, int] = {}
        for position, key in enumerate(keys):
            first.setdefault(key, position)
        with Processes.of(distributed) as processes:
            processes.check_same((_digest(keys), batch_size, sorted(columns or {})), "documents, batch_size or columns")
            self._table.load(processes.from_first(self._newest))
            arrays = self._table.arrays(columns)
            if processes.from_first(lambda: verify == "changed" and self._has_all(first, arrays)):
                return keys
            processes.from_first(lambda: self._check_writable(f"to add {len(self._missing(first))} documents"))
            processes.check_shared(self._table.parts.folder)
            try:
                self._fill(documents, keys, first, arrays, batch_size, verify, processes, show_progress)
            except BaseException:
                if processes.is_first:
                    self._bring_up()
                raise
            processes.from_first(self._tidy)
            self._table.load(processes.from_first(self._newest))
        return keys

    def _fill(self, documents, keys, first, arrays, batch_size, verify, processes, show_progress) -> None:
        table = self._table
        show_progress = show_progress and processes.is_first
        with ExitStack() as held:
            table.load(processes.from_first(self._bring_up))
            damaged = self._find_damaged(list(first), processes, show_progress) if verify == "all" else set()
            while True:
                version = processes.from_first(lambda: self._make_way(damaged, first, arrays, documents))
                if processes.is_first:
                    # Shared: nothing may give the table another layout until these parts are in.
                    held.enter_context(table.parts.lock(exclusive=False))
                table.load(processes.from_first(self._newest))
                if table.version == version:
                    break
                held.close()  # another process changed the table between the two locks
            missing = {**self._missing(first), **{key: first[key] for key in damaged}}
            again = [position for key, position in missing.items() if key in damaged]
            new = [position for key, position in missing.items() if key not in damaged]
            # Apart: taken out of the middle of other batches, damaged ones would shift all that follow.
            batches = [batch for some in (new, again) for batch in plan_batches(documents, some, batch_size)]
            size = size_text(bytes_needed(table, documents, missing.values()))
            description = f"Compressing documents ({size})" if show_progress else None
            share = batches[processes.rank :: processes.count]
            parts, cut = self._compress(share, keys, documents, arrays, damaged, description)
            parts, cut = processes.gather(parts), sum(processes.gather(cut))
            if processes.is_first:
                report_cut(table, cut, len(missing))
        processes.from_first(lambda: self._take_in([part for each in parts for part in each], missing, arrays))

    def _check_model(self) -> None:
        if self.model is None:
            raise ValueError(
                f"the memory store at {self.path} is open to read: add through MemoryStore.open(path, model)"
            )
        # The fingerprint reads all weights: only where something of them is not as it was.
        seen = _state_of(self.model)
        if seen == self._seen:
            return
        maker = Maker.of(self.model)
        if not maker.makes_the_same_as(self.maker):
            raise ValueError(
                f"the model's compressor has changed since the memory store at {self.path} was opened, from "
                f"{self.maker} to {maker}: open a store at another path for it"
            )
        self._seen = seen

    def _check_writable(self, what: str) -> None:
        if not os.access(self.path, os.W_OK):
            raise OSError(
                errno.EROFS,
                f"the memory store at {self.path} is read-only here, so that it can be read and searched, and nothing "
                f"can be written ({what}): copy it to where you can write",
            )

    def _newest(self) -> int:
        self._table.refresh()
        return self._table.version

    def _has_all(self, first: dict[str, int], arrays: dict) -> bool:
        """Whether everything is stored already, and nothing waits to be taken in."""
        table = self._table
        if self._missing(first) or table.snapshot().unreadable or not set(arrays) <= set(table.names):
            return False
        if table.parts.are_waiting() and os.access(self.path, os.W_OK):
            return False
        return not table.changed_rows(list(first), pick(arrays, list(first.values())))

    def _bring_up(self) -> int:
        """Takes in what an interrupted call left, drops what cannot be read; returns the version."""
        with self._table.changing():
            return self._table.version

    def _take_in(self, parts: list[dict], missing: dict[str, int], arrays: dict) -> None:
        """Commits parts with the documents `missing`, and gives those that others stored meanwhile their columns."""
        table = self._table
        with table.parts.lock(exclusive=True):
            table.refresh()
            others = {key: position for key, position in missing.items() if key in self}
            table.commit(parts)
            table.set_columns(list(others), pick(arrays, list(others.values())))

    def _tidy(self) -> None:
        """Joins small files once there are many, unless another process writes just now."""
        many = len(self._table.snapshot().pieces) > MOST_PIECES
        if many or self._searcher.needs_index():
            with self._table.changing(wait=False) as got:
                if got and many:
                    self._table.compact(KEPT)
                if got:
                    self._searcher.bring_index_up()

    def _find_damaged(self, keys: list[str], processes: Processes, show_progress: bool) -> set[str]:
        """Those of `keys` whose rows are damaged."""
        table, damaged = self._table, set()
        blocks = list(table.blocks(table.find(keys)))[processes.rank :: processes.count]
        with tqdm(total=len(keys), desc="Checking stored memories", disable=not show_progress, delay=2) as bar:
            for some, offsets in blocks:
                damaged |= set(table.damage(unpacked(some), offsets))
                bar.update(len(some) * processes.count)
        damaged = set(keys).intersection(*[set().union(*processes.gather(damaged))])
        if damaged and processes.is_first:
            logger.warning(f"{len(damaged)} memories in {self.path} are damaged on disk and are made again")
        return damaged

    def _missing(self, first: dict[str, int]) -> dict[str, int]:
        """Those of `first`, keys with their positions, that are not stored."""
        offsets = self._table.find(list(first))
        return {key: position for (key, position), offset in zip(first.items(), offsets, strict=True) if offset < 0}

    def _make_way(self, damaged: set[str], first: dict[str, int], arrays: dict, documents: Sequence[str]) -> int:
        """Checks what is missing and the disk, and gives stored documents their columns; returns the version."""
        table = self._table
        with table.changing():
            missing = {**self._missing(first), **{key: first[key] for key in damaged}}
            check_encodable(self.model, documents, missing.values())
            check_space(table, documents, missing.values())
            stored = [key for key in first if key not in missing]
            table.set_columns(stored, pick(arrays, [first[key] for key in stored]))
            return table.version

    def _compress(self, batches, keys, documents, arrays, damaged, description) -> tuple[list[dict], int]:
        total = 0

        def write(rows: list[int], made: list[np.ndarray]) -> dict:
            some, texts = [keys[row] for row in rows], [documents[row] for row in rows]
            replaced = [key for key in some if key in damaged]
            return self._table.write_part(some, texts, made, pick(arrays, rows), replaced)

        def compress(batch: list[int]) -> tuple[np.ndarray, ...]:
            nonlocal total
            memories, cut = compress_batch(self.model, self._table, documents, batch)
            total += cut
            return self._encoded(memories)

        return fill(batches, compress, write, self.write_bytes, self.write_seconds, description), total

    def _encoded(self, memories: torch.Tensor) -> tuple[np.ndarray, ...]:
        """What is stored of memories `[n, width]`: themselves or their codes, and their sketches if there are some."""
        stored = self._table.form.encode(memories).cpu().numpy()
        sketch = self._searcher.sketch
        return (stored,) if sketch is None else (stored, sketch.of_memories(memories).cpu().numpy())

    # Changing

    def delete(self, keys: Sequence[str]) -> None:
        """Removes the documents of `keys`.

        Raises:
            KeyError: names the first key that is not stored; nothing is removed.
        """
        self._check_writable("to delete")
        with self._table.changing():
            keys, _ = self._locate(keys)
            self._table.remove(sorted(set(keys)))

    def update(
        self,
        keys: Sequence[str],
        documents: Sequence[str] | None = None,
        columns: Mapping[str, Sequence] | None = None,
        **options,
    ) -> list[str]:
        """Gives stored documents other texts, other values of columns, or both.

        A document with another text is another one: it is compressed, keeps the columns that are not given, and gets
        another key. The old ones are removed when the new ones are stored.

        Args:
            keys: of stored documents, each once.
            documents: their new texts, in the order of `keys`.
            columns: new values by column name, in the order of `keys`.
            options: of [`MemoryStore.add`].

        Returns:
            The documents' keys, in the order of `keys`.
        """
        keys, _ = self._locate(keys)
        if len(set(keys)) < len(keys):
            raise ValueError("keys holds one key twice: give each document once")
        before = self.columns(keys)
        texts = before.pop("text")
        documents = texts if documents is None else _checked(documents)
        if len(documents) != len(keys):
            raise ValueError(f"documents has {len(documents)} texts for {len(keys)} keys")
        check_columns(columns, len(keys))
        new = self.add(documents, {**before, **(columns or {})}, **options)
        gone = [key for key in keys if key not in set(new)]
        if gone:
            self.delete(gone)
        return new

    def compact(self, keep: timedelta = timedelta(0)) -> None:
        """Joins small files, and removes files that only versions older than `keep` have.

        Other processes that read such a version go on with the newest one.
        """
        self._check_writable("to compact")
        with self._table.changing():
            self._table.compact(keep)
            self._searcher.bring_index_up()

    def fit(self, form: str = "auto", seed: int = 0, show_progress: bool = True) -> dict:
        """Fits the search to what is stored, and a form to its memories; then stores them in it.

        Sketches are made for all rows, and an index of them; documents that are added later get theirs as they are
        stored. A fitted form takes one eigendecomposition per memory token. Fit once there is a good sample of the
        documents; again when others have come in. The share of the exact top 5 that search finds is measured on
        memories with noise, and kept in `stats()`.

        Args:
            form: the store's own by default; another one than "none" recodes a store of form "none".
            seed: of the samples.
            show_progress: whether to show bars.

        Returns:
            What was measured: `documents`, `form`, `questions` and `share_of_exact_top_5`.

        Raises:
            ValueError: there are too few documents, which are counted.
        """
        if form not in ("auto", *FORMS):
            raise ValueError(f"form is {form!r}; it must be 'auto' or one of {FORMS}")
        self._check_writable("to fit")
        self._bring_up()
        form = self._table.wanted_form if form == "auto" else form
        self._check_recodable(form)
        return fit_store(self, form, seed, show_progress)

    def verify(self, repair: bool = False, show_progress: bool = True) -> Report:
        """Reads every value and every file of the store, and compares it with what was written.

        Args:
            repair: whether to make anew what is damaged, from the texts: memories and sketches by the model, the search
                index from the sketches. Values of the user's columns that are damaged become None; rows whose text is
                damaged are removed. Both are named in the report.
            show_progress: whether to show a bar.
        """
        return verify_store(self, repair, show_progress)

    def stats(self) -> dict:
        """Counts and sizes: documents, files, bytes (in all by folder, per document, per memory), form, search."""
        return stats_of(self)

    def export_sketch(self, path: str | os.PathLike) -> int:
        """Writes keys, sketches (float32), texts and columns to a Parquet file, for a vector database.

        A database finds candidates by inner product with sketches of questions, `sketch_questions`; `get` and
        `model.retrieve` score them exactly.

        Returns:
            The number of rows.
        """
        return export(self, Path(path))

    def sketch_questions(self, questions: Sequence[str] | torch.Tensor, batch_size: int = 32) -> torch.Tensor:
        """Questions in the space of the sketches, float32 `[B, dims]`."""
        if self._searcher.sketch is None:
            raise ValueError(f"the memory store at {self.path} has no sketches: call fit() first")
        return self._searcher.sketch.of_queries(self._queries(questions, batch_size))

    @property
    def sketch_dims(self) -> int | None:
        """Width of the sketches; None where [`fit`] has made none."""
        return None if self._searcher.sketch is None else self._searcher.sketch.dims

    def sketch_memories(self, memories: torch.Tensor) -> torch.Tensor:
        """Memories `[n, l, H]` as sketches, float32 `[n, dims]`, as they are stored.

        Raises:
            ValueError: the store has no sketches.
        """
        if self._searcher.sketch is None:
            raise ValueError(f"the memory store at {self.path} has no sketches: call fit() first")
        return self._searcher.sketch.of_memories(memories.flatten(1)).float()

    def recode(self, form: str) -> None:
        """Stores all memories in another form, made from how they are stored now; nothing is compressed again.

        One new version of the store: after a kill it is as before. A fitted form needs [`MemoryStore.fit`].

        Raises:
            ValueError: `form` is none; or has more bits than the memories are stored with now.
        """
        if form in FITTED:
            raise ValueError(f"form {form!r} is fitted to the memories: call fit(form={form!r})")
        if form not in FORMS:
            raise ValueError(f"form is {form!r}; it must be one of {FORMS}")
        self._recode("memory" if form == "none" else code_column(form))

    def _check_recodable(self, form: str) -> None:
        if self.form not in ("none", form):
            raise ValueError(
                f"the store at {self.path} holds codes of form {self.form!r}: codes made from these would be worse "
                f"than form {form!r} is; add the documents to a new store"
            )

    def _recode(self, column: str) -> None:
        self._check_writable("to recode")
        form = self._table.form_of(column)
        with self._table.changing():
            if column == self._table.memory_column:
                return
            self._check_recodable(form.name)
            self._table.recode(column, lambda keys, offsets: form.encode(self._read(keys, offsets)).numpy())


def _state_of(model) -> tuple:
    """What changes with a model's weights and geometry, at the cost of a look at its adapters.

    Versions count changes in place; changes beside them are seen in the sums of what is trained.
    """
    config = model.config
    geometry = config.num_memory_tokens, config.hidden_size, config.doc_max_length
    parameters = list(model.named_parameters())
    versions = hash(tuple((name, value.data_ptr(), value._version) for name, value in parameters))
    small = [
        value.detach()
        for name, value in parameters
        if (".lora_" in name or "memory_embeddings" in name) and not isinstance(value, DTensor) and not value.is_meta
    ]
    return (*geometry, versions, float(sum(value.double().sum().cpu() for value in small)))


def _split(values: list, width: int, count: int) -> list[list]:
    return [values[row * width : (row + 1) * width] for row in range(count)]


def _digest(keys: list[str]) -> str:
    return hashlib.sha256("".join(keys).encode()).hexdigest()


def _listed(texts: Sequence[str], argument: str) -> list:
    """A list of what a list, a column of a data set, a NumPy array or a pandas series holds."""
    if isinstance(texts, (str, bytes)):
        raise ValueError(f"{argument} must be a list of strings, not the single string {texts[:60]!r}")
    if isinstance(texts, Mapping) or getattr(texts, "ndim", 1) != 1:
        raise ValueError(f"{argument} must be a list of strings or one column, not {type(texts).__name__}")
    return [str(text) if isinstance(text, str) else text for text in texts]


def _checked(documents: Sequence[str]) -> list[str]:
    documents = _listed(documents, "documents")
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
