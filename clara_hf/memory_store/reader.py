"""What can be read of a memory store: memories and columns by key, the nearest documents to questions, counts."""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch

from .keys import Maker, key_of
from .search import Found, Searcher
from .table.layout import READ_ROWS, TORCH_TYPES, CorruptMemoryError
from .table.snapshot import Unreadable, unpacked
from .table.table import MemoryTable
from .upkeep import export, stats_of


class StoreReader:
    """The reading half of [`MemoryStore`]."""

    def __init__(self, table: MemoryTable, model=None, rate: int | None = None):
        self._table = table
        self._searcher = Searcher(table)
        self._model, self._rate = model, rate

    def __getstate__(self) -> dict:
        return {**self.__dict__, "_model": None}

    @property
    def model(self):
        """The model that makes memories and reads questions, at the store's compression rate; `None` without one."""
        return self._model if self._model is None or self._rate is None else self._model.at_rate(self._rate)

    @staticmethod
    def key_of(fingerprint: str, text: str) -> str:
        """The key of `text` compressed by the compressor with this fingerprint: 32 hexadecimal digits."""
        return key_of(fingerprint, text)

    @property
    def path(self) -> Path | str:
        """The local folder of the store, or its address in object storage."""
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

    def keys(self, documents: Sequence[str]) -> list[str]:
        """The documents' keys, in their order, whether they are stored or not.

        Raises:
            ValueError: a document is empty or not a string (its position is named).
        """
        return [self._table.key_of(document) for document in checked(documents)]

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
        hybrid: bool = False,
    ) -> Found:
        """The stored documents whose memories are nearest to questions, by cosine similarity as in `model.retrieve`.

        Args:
            questions: B texts, read by the model's `encode_questions`, or what that gave, `[B, l, H]`.
            top_k: documents for each question; fewer where there are fewer.
            exact: whether to score every stored memory. Otherwise a store that was fitted is searched by sketches, the
                best of which are scored exactly; one that was not is searched exactly.
            filter: an SQL condition over the text and the user's columns, such as "title LIKE 'A%' AND year > 1990".
            batch_size: questions per forward.
            hybrid: whether documents that share words with a question (BM25) count too: `scores` are then sums of
                1 / (60 + rank) over both rankings. It needs [`MemoryStore.index_texts`], and questions as texts.

        Returns:
            `scores` `[B, k]`, float32; `keys` and `texts`, B lists of k; `columns`, by name B lists of k.

        Raises:
            ValueError: questions that are no texts, or of another shape; a wrong filter.
            CorruptMemoryError: a memory that was scored is damaged on disk.
        """
        if hybrid and isinstance(questions, torch.Tensor):
            raise ValueError("hybrid=True compares words: give questions as texts, not as a tensor")
        queries = self._queries(questions, batch_size)
        if not isinstance(top_k, int) or top_k < 1:
            raise ValueError(f"top_k is {top_k!r}; it must be at least 1")

        def search() -> Found:
            if hybrid:
                scores, keys = self._searcher.search_hybrid(list(questions), queries, top_k, exact, filter)
            else:
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
                questions = self.model.encode_questions(listed(questions, "questions"), batch_size=batch_size)
        if questions.ndim != 3 or questions.shape[1:] != shape:
            raise ValueError(
                f"questions have shape {tuple(questions.shape)}; the store needs [any, {shape[0]}, {shape[1]}]: encode "
                "them with its model, at its compression rate"
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
        return self._searcher.needed_sketch().of_queries(self._queries(questions, batch_size))

    @property
    def sketch_dims(self) -> int | None:
        """Width of the sketches; None where [`fit`] has made none."""
        return None if self._searcher.sketch is None else self._searcher.sketch.dims

    def sketch_memories(self, memories: torch.Tensor) -> torch.Tensor:
        """Memories `[n, l, H]` as sketches, float32 `[n, dims]`, as they are stored.

        Raises:
            ValueError: the store has no sketches.
        """
        return self._searcher.needed_sketch().of_memories(memories.flatten(1)).float()


def _split(values: list, width: int, count: int) -> list[list]:
    return [values[row * width : (row + 1) * width] for row in range(count)]


def listed(texts: Sequence[str], argument: str) -> list:
    """A list of what a list, a column of a data set, a NumPy array or a pandas series holds."""
    if isinstance(texts, (str, bytes)):
        raise ValueError(f"{argument} must be a list of strings, not the single string {texts[:60]!r}")
    if isinstance(texts, Mapping) or getattr(texts, "ndim", 1) != 1:
        raise ValueError(f"{argument} must be a list of strings or one column, not {type(texts).__name__}")
    return [str(text) if isinstance(text, str) else text for text in texts]


def checked(documents: Sequence[str]) -> list[str]:
    documents = listed(documents, "documents")
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
