"""Search in a memory store: sketches find candidates, the candidates' stored memories are scored exactly.

A sketch is a memory of length 1 in its first 256 or fewer principal dimensions (uncentred, fitted on a sample): narrow
enough for an index in memory. The index is a file beside the table that names its rows by their keys: it cannot be
wrong about a row that was moved, deleted or added, and rows that it lacks are compared one by one.
"""

import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.nn.functional import normalize
from transformers.utils import logging

from .table.journal import sync
from .table.layout import SIDE_FOLDER
from .table.rows import Rows
from .table.snapshot import numbers_of, unpacked


try:
    import faiss
except ImportError:  # then sketches are compared one by one
    faiss = None

logger = logging.get_logger(__name__)

SKETCH_DIMS = 256
SKETCH_SAMPLE = 8192
FEWEST_DOCUMENTS = 1000  # for a sketch
SAMPLE_BYTES = 2**30
CANDIDATES = 128  # of a question, scored exactly
RANK_OFFSET = 60  # of ranks that are fused
FEW_QUERIES = 32  # too few for threads of FAISS to share: they would wait for one another
MOST_LOOSE = 20_000  # rows that are compared one by one, before they go into an index
IVF_ROWS = 3_000_000  # from here on, an index has cells
TRAINING_ROWS = 200_000
BLOCK_ROWS = 65_536
COMPARED_ROWS = 4096  # one by one: as many stay in a processor's cache


class Found(NamedTuple):
    """What a search found for B questions, k documents each, best first."""

    scores: torch.Tensor
    keys: list[list[str]]
    texts: list[list[str]]
    columns: dict[str, list[list]]


class Sketch:
    """Principal dimensions of memories of length 1: `basis` `[width, dims]`, orthonormal columns."""

    def __init__(self, basis: torch.Tensor):
        # Lying by dimension: a product with one question is then five times as fast.
        self.basis = basis.float().T.contiguous().T

    @classmethod
    def fit(cls, memories: torch.Tensor) -> "Sketch":
        """From a sample `[n, width]`."""
        dims = min(SKETCH_DIMS, memories.shape[1]) // 2 * 2
        with torch.random.fork_rng():
            torch.manual_seed(0)
            found = torch.svd_lowrank(normalize(memories.float(), dim=1), q=min(dims + 32, *memories.shape), niter=3)
        return cls(found[2][:, :dims].contiguous())

    @property
    def dims(self) -> int:
        return self.basis.shape[1]

    def of_memories(self, memories: torch.Tensor) -> torch.Tensor:
        """Float16 `[n, dims]`."""
        return (normalize(memories.float(), dim=1) @ self.basis.to(memories.device)).half()

    def of_queries(self, queries: torch.Tensor) -> torch.Tensor:
        return queries @ self.basis


class Searcher:
    """Finds the rows of a table whose memories have the highest cosine similarity with questions."""

    def __init__(self, table: Rows):
        self._table = table
        self.forget()

    def forget(self) -> None:
        self._sketches: dict[str, Sketch] = {}
        self._index: _Index | None = None
        self._loose: _Loose | None = None

    def __getstate__(self) -> dict:
        return {"_table": self._table}

    def __setstate__(self, state: dict) -> None:
        self._table = state["_table"]
        self.forget()

    @property
    def sketch(self) -> Sketch | None:
        """What sketches of the table are made with; None where it has none."""
        column = self._table.sketch_column
        if column is None:
            return None
        if column not in self._sketches:
            digest = column.removeprefix("sketch_")
            tensors = self._table.read_side_file(f"sketch-{digest}.safetensors", digest)
            self._sketches = {column: Sketch(tensors["basis"])}
        return self._sketches[column]

    def needed_sketch(self) -> Sketch:
        """As `sketch`; raises `ValueError` where the table has none."""
        if self.sketch is None:
            raise ValueError(f"the memory store at {self._table.path} has no sketches: call fit() first")
        return self.sketch

    def search(
        self, queries: torch.Tensor, top_k: int, exact: bool, condition: str | None
    ) -> tuple[torch.Tensor, list[list[str]]]:
        """Scores `[B, k]` and keys of the best rows for queries `[B, width]` of length 1."""
        offsets = None if condition is None else self._table.matching(condition)
        count = len(self._table) if offsets is None else len(np.unique(offsets))
        candidates = max(CANDIDATES, 4 * top_k)
        if exact or self.sketch is None or count <= candidates:
            return self._scan(queries, top_k, offsets)
        with ThreadPoolExecutor(1) as beside:  # both take a while, and neither holds the interpreter
            turning = beside.submit(self._table.form.turn, queries)
            found = self._candidates(queries, candidates, offsets)
            turned = turning.result()
        best = [self._best(turned[row : row + 1], keys, top_k) for row, keys in enumerate(found)]
        return torch.stack([scores for scores, _ in best]), [keys for _, keys in best]

    def search_hybrid(
        self, questions: list[str], queries: torch.Tensor, top_k: int, exact: bool, condition: str | None
    ) -> tuple[torch.Tensor, list[list[str]]]:
        """As `search`, of what is nearest and what BM25 finds, fused by reciprocal rank (Cormack et al., 2009)."""
        depth = max(CANDIDATES, top_k)
        _, nearest = self.search(queries, depth, exact, condition)
        best = []
        for question, by_memory in zip(questions, nearest, strict=True):
            by_words = unpacked(self._table.texts.search(question, depth, condition))
            scores: dict[str, float] = {}
            for keys in (by_memory, by_words):
                for rank, key in enumerate(keys, start=1):
                    scores[key] = scores.get(key, 0.0) + 1 / (RANK_OFFSET + rank)
            best.append(sorted(scores.items(), key=lambda item: -item[1])[:top_k])
        scores = torch.tensor([[score for _, score in some] for some in best])
        return scores.view(len(best), -1), [[key for key, _ in some] for some in best]

    def _scan(
        self, queries: torch.Tensor, top_k: int, offsets: np.ndarray | None
    ) -> tuple[torch.Tensor, list[list[str]]]:
        """The best of all rows, or of those at `offsets`: every memory is read and scored."""
        turned = self._table.form.turn(queries)
        best, keys = torch.empty(len(queries), 0), np.empty((len(queries), 0), self._table.snapshot().keys.dtype)
        for some, places in self._table.blocks(offsets):
            scores = torch.cat([best, self._score(turned, unpacked(some), places)], dim=1)
            rows = np.concatenate([keys, np.broadcast_to(some, (len(queries), len(some)))], axis=1)
            best, order = scores.topk(min(top_k, scores.shape[1]), dim=1)
            keys = np.take_along_axis(rows, order.numpy(), axis=1)
        return best, [unpacked(row) for row in keys]

    def _score(self, turned: torch.Tensor, keys: list[str], offsets: np.ndarray) -> torch.Tensor:
        """Cosine similarities of queries, turned into the form's code space, with the memories at `offsets`.

        Raises:
            CorruptMemoryError: a memory is not what was written.
        """
        table = self._table
        return table.form.cosines(turned, torch.from_numpy(table.verified(keys, offsets, table.memory_column)))

    def _best(self, turned: torch.Tensor, candidates: np.ndarray, top_k: int) -> tuple[torch.Tensor, list[str]]:
        keys, offsets = unpacked(candidates), self._table.find_packed(candidates)
        order = np.argsort(offsets)
        scores = self._score(turned, [keys[place] for place in order], offsets[order])[0]
        best = scores.topk(min(top_k, len(keys)))
        return best.values, [keys[order[place]] for place in best.indices.tolist()]

    # Candidates

    def _candidates(self, queries: torch.Tensor, count: int, offsets: np.ndarray | None) -> list[np.ndarray]:
        """For each query, packed keys of the rows whose sketches are nearest."""
        queries = self.sketch.of_queries(queries)
        if offsets is not None:
            return self._read_sketches(offsets).nearest(queries, count)[1]
        index, loose = self.index(), self.loose()
        if index is None:
            return loose.nearest(queries, count)[1]
        found = index.nearest(queries, count, self._table)
        for row, (scores, keys) in enumerate(zip(*loose.nearest(queries, count), strict=True)):
            joined = torch.cat([found[row][0], scores])
            best = joined.topk(min(count, len(joined))).indices.numpy()
            found[row] = joined[best], np.concatenate([found[row][1], keys])[best]
        return [keys for _, keys in found]

    def _read_sketches(self, offsets: np.ndarray | None) -> "_Loose":
        column, keys, sketches = self._table.sketch_column, [], []
        for some, places in self._table.blocks(offsets):
            keys.append(some)
            sketches.append(self._table.verified(unpacked(some), places, column))
        dims = self.sketch.dims
        return _Loose(
            self._table.version,
            np.concatenate([*keys, np.empty(0, self._table.snapshot().keys.dtype)]),
            torch.from_numpy(np.concatenate([*sketches, np.empty((0, dims), np.float16)])),
        )

    def index(self) -> "_Index | None":
        """The index of the table's sketches, if there is one that is whole."""
        if faiss is None or self._table.sketch_column is None:
            return None
        digest = self._table.sketch_column.removeprefix("sketch_")
        if self._index is None or self._index.sketch != digest or not self._index.path.exists():
            self._index, self._loose = _Index.load(self._table.side_files(f"index-{digest}-*.faiss"), digest), None
        return self._index

    def loose(self) -> "_Loose":
        """Rows that the index lacks, with their sketches."""
        if self._loose is None or self._loose.version != self._table.version:
            index, snapshot = self.index(), self._table.snapshot()
            lacks = np.ones(len(snapshot.keys), bool) if index is None else ~np.isin(snapshot.numbers, index.ids)
            wanted, known = snapshot.keys[lacks], self._loose
            if known is None:
                self._loose = self._read_sketches(snapshot.offsets[lacks])
            else:
                kept = np.isin(known.keys, wanted)
                new = self._read_sketches(snapshot.offsets[lacks][~np.isin(wanted, known.keys)])
                sketches = torch.cat([known.sketches[torch.from_numpy(kept)], new.sketches])
                self._loose = _Loose(new.version, np.concatenate([known.keys[kept], new.keys]), sketches)
        return self._loose

    def needs_index(self) -> bool:
        """Whether so many rows were added since the last index that they should go into it."""
        if faiss is None or self._table.sketch_column is None:
            return False
        known = 0 if self.index() is None else len(self._index.ids)
        return len(self._table) - known >= max(MOST_LOOSE, known // 10)

    def bring_index_up(self, least: int = MOST_LOOSE) -> None:
        """Takes rows into the index if it lacks `least` or more, or makes it anew where much of it is gone.

        Under the store's exclusive lock. Without FAISS there is no index.
        """
        if faiss is None or self.sketch is None:
            return
        index, rows = self.index(), len(self._table)
        gone = 0 if index is None else int((index.offsets(index.ids, self._table) < 0).sum())
        if index is not None and gone > len(index.ids) // 5:
            index = None
        lacking = rows if index is None else rows - (len(index.ids) - gone)
        if lacking < max(least, rows // 10 if index is not None else 0) or rows < MOST_LOOSE:
            return
        digest = self._table.sketch_column.removeprefix("sketch_")
        loose = self.loose() if index is not None else self._read_sketches(None)
        made = _Index.save(self._table.folder / SIDE_FOLDER, digest, index, loose)
        self._table.keep_side_file(made.path.name, replaces="index-*.faiss")
        self._index, self._loose = made, None

    def damaged_indexes(self) -> list[Path]:
        """Index files of the table whose content is not what was written."""
        return [path for path in self._table.side_files("index-*.faiss") if not _is_whole(path)]

    def remove_damaged_indexes(self) -> None:
        for path in self.damaged_indexes():
            self._table.remove_side_file(path.name)


class _Loose(NamedTuple):
    """Rows in memory: packed keys, and sketches float16 `[n, dims]`."""

    version: int
    keys: np.ndarray
    sketches: torch.Tensor

    def nearest(self, queries: torch.Tensor, count: int) -> tuple[list[torch.Tensor], list[np.ndarray]]:
        """For each query, the `count` highest products and the keys of their rows."""
        best, rows = torch.empty(len(queries), 0), torch.empty(len(queries), 0, dtype=torch.int64)
        for start in range(0, len(self.keys), COMPARED_ROWS):
            scores = queries @ self.sketches[start : start + COMPARED_ROWS].float().T
            numbers = torch.arange(start, start + scores.shape[1]).expand(len(queries), -1)
            joined, numbers = torch.cat([best, scores], 1), torch.cat([rows, numbers], 1)
            best, order = joined.topk(min(count, joined.shape[1]), dim=1)
            rows = numbers.gather(1, order)
        return list(best), [self.keys[some.numpy()] for some in rows]


class _Index:
    """A FAISS index of sketches in a file that is named by their basis and by its own content."""

    def __init__(self, path: Path, sketch: str, index):
        self.path = path
        self.sketch = sketch
        self._faiss = index
        self.ids = faiss.vector_to_array(index.id_map)
        inner = faiss.downcast_index(index.index)
        inner.k_factor = 20
        base = faiss.downcast_index(inner.base_index)
        if isinstance(base, faiss.IndexIVF):
            base.nprobe = max(16, base.nlist // 64)

    @classmethod
    def load(cls, found: list[Path], sketch: str) -> "_Index | None":
        """The largest whole index of a sketch; damaged ones are passed over and told."""
        for path in sorted(found, key=lambda path: path.lstat().st_size, reverse=True):
            if _is_whole(path):
                return cls(path, sketch, faiss.read_index(str(path)))
            logger.warning(f"{path} is damaged: sketches are compared one by one until fit() or verify(repair=True)")
        return None

    @classmethod
    def save(cls, folder: Path, sketch: str, before: "_Index | None", rows: _Loose) -> "_Index":
        """Writes an index with `rows` beside those of `before`."""
        dims = rows.sketches.shape[1]
        if before is None:
            cells = f"IVF{4 * int(len(rows.keys) ** 0.5)}," if len(rows.keys) >= IVF_ROWS else ""
            inner = faiss.index_factory(dims, f"{cells}PQ{dims // 2}x4fs,Refine(SQ8)", faiss.METRIC_INNER_PRODUCT)
            chosen = np.random.default_rng(0).permutation(len(rows.keys))[:TRAINING_ROWS]
            inner.train(rows.sketches[torch.from_numpy(chosen)].float().numpy())
            index = faiss.IndexIDMap(inner)
        else:
            index = before._faiss
        ids = numbers_of(rows.keys)
        for start in range(0, len(ids), BLOCK_ROWS):
            part = slice(start, start + BLOCK_ROWS)
            index.add_with_ids(rows.sketches[part].float().numpy(), ids[part])
        unfinished = folder / "index.unfinished"
        faiss.write_index(index, str(unfinished))
        sync(unfinished)
        path = folder / f"index-{sketch}-{_digest(unfinished)}.faiss"
        unfinished.replace(path)
        return cls(path, sketch, index)

    def offsets(self, ids: np.ndarray, table: Rows) -> np.ndarray:
        """Offsets of the rows with these numbers; -1 for rows that are gone."""
        snapshot = table.snapshot()
        if not len(snapshot.keys):
            return np.full(len(ids), -1)
        numbers = snapshot.numbers
        places = np.searchsorted(numbers, ids).clip(max=len(numbers) - 1)
        return np.where(numbers[places] == ids, snapshot.offsets[places], -1)

    def nearest(self, queries: torch.Tensor, count: int, table: Rows) -> list[tuple[torch.Tensor, np.ndarray]]:
        """For each query, scores and packed keys of the nearest rows that are still there."""
        snapshot = table.snapshot()
        numbers = snapshot.numbers
        with one_faiss_thread() if len(queries) < FEW_QUERIES else nullcontext():
            scores, ids = self._faiss.search(queries.contiguous().numpy(), count)
        found = []
        for row_scores, row_ids in zip(scores, ids, strict=True):
            places = np.searchsorted(numbers, row_ids).clip(max=len(numbers) - 1)
            there = (numbers[places] == row_ids) & (row_ids >= 0)
            found.append((torch.from_numpy(row_scores[there]), snapshot.keys[places[there]]))
        return found


@contextmanager
def one_faiss_thread() -> Iterator[None]:
    """Let FAISS compute in one thread in the block, where this thread calls it."""
    before = faiss.omp_get_max_threads()
    faiss.omp_set_num_threads(1)
    try:
        yield
    finally:
        faiss.omp_set_num_threads(before)


def _digest(path: Path) -> str:
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while block := file.read(2**22):
            digest.update(block)
    return digest.hexdigest()


def _is_whole(path: Path) -> bool:
    return path.is_file() and _digest(path) == path.stem.rpartition("-")[2]
