"""Search in a memory store: which stored memories are nearest to questions."""

from typing import NamedTuple

import numpy as np
import torch

from .snapshot import unpacked
from .table import CorruptMemoryError, MemoryTable


class Found(NamedTuple):
    """What a search found for B questions, k documents each, best first."""

    scores: torch.Tensor
    keys: list[list[str]]
    texts: list[list[str]]
    columns: dict[str, list[list]]


class Searcher:
    """Finds the rows of a table whose memories have the highest cosine similarity with questions."""

    def __init__(self, table: MemoryTable):
        self._table = table

    @property
    def sketch(self):
        return None

    def search(
        self, queries: torch.Tensor, top_k: int, exact: bool, condition: str | None
    ) -> tuple[torch.Tensor, list[list[str]]]:
        """Scores `[B, k]` and keys of the best rows for queries `[B, width]` of length 1."""
        offsets = None if condition is None else self._table.matching(condition)
        return self._scan(queries, top_k, offsets)

    def _scan(
        self, queries: torch.Tensor, top_k: int, offsets: np.ndarray | None
    ) -> tuple[torch.Tensor, list[list[str]]]:
        """The best of all rows, or of those at `offsets`: every memory is read and scored."""
        turned = self._table.form.turn(queries)
        best, keys = torch.empty(len(queries), 0), np.empty((len(queries), 0), self._table.snapshot().keys.dtype)
        for some, places in self._table.blocks(offsets):
            scores = torch.cat([best, self.score(turned, unpacked(some), places)], dim=1)
            rows = np.concatenate([keys, np.broadcast_to(some, (len(queries), len(some)))], axis=1)
            best, order = scores.topk(min(top_k, scores.shape[1]), dim=1)
            keys = np.take_along_axis(rows, order.numpy(), axis=1)
        return best, [unpacked(row) for row in keys]

    def score(self, turned: torch.Tensor, keys: list[str], offsets: np.ndarray) -> torch.Tensor:
        """Cosine similarities of queries, turned into the form's code space, with the memories at `offsets`.

        Raises:
            CorruptMemoryError: a memory is not what was written.
        """
        form = self._table.form
        stored = np.empty((len(keys), form.size), form.numpy_type)
        intact = self._table.read(keys, offsets, self._table.memory_column, stored)
        if not intact.all():
            raise CorruptMemoryError(
                f"the memory of key {keys[int(np.argmin(intact))]} in {self._table.path} is damaged on disk: call "
                "verify(repair=True)"
            )
        values = form.values(torch.from_numpy(stored))
        return turned @ torch.nn.functional.normalize(values, dim=1).T
