"""The processes that fill a memory store together: those of a torch.distributed job, or this one alone."""

from collections.abc import Callable
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from .table.journal import Parts


Value = TypeVar("Value")


class Processes:
    """This process' place among those that work together, and how they exchange small objects.

    One process may wait for hours for another that still compresses, or for the first one that checks what is stored:
    longer than collectives of a training job may take. So they have a gloo group of their own.
    """

    def __init__(self, group=None):
        self._group = group
        self.rank = 0 if group is None else dist.get_rank(group)
        self.count = 1 if group is None else dist.get_world_size(group)

    @classmethod
    @contextmanager
    def of(cls, distributed: bool):
        """Those of the running torch.distributed job if `distributed`, else this one; a job of one is this one."""
        if not (distributed and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
            yield cls()
            return
        group = dist.new_group(backend="gloo", timeout=timedelta(days=30))
        try:
            yield cls(group)
        finally:
            dist.destroy_process_group(group)

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def gather(self, value: Value) -> list[Value]:
        """Every process' value, by rank."""
        if self._group is None:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value, group=self._group)
        return values

    def from_first(self, make: Callable[[], Value]) -> Value:
        """What `make` gives in the first process; what it raises there is raised in all."""
        if self._group is None:
            return make()
        outcome: list[Any] = [None, None]
        if self.is_first:
            try:
                outcome[0] = make()
            except Exception as error:
                outcome[1] = error
        dist.broadcast_object_list(outcome, src=0, group=self._group)
        if outcome[1] is not None:
            raise outcome[1]
        return outcome[0]

    def check_same(self, value, what: str) -> None:
        """Raises `ValueError` in all processes unless `value` is the same in all."""
        values = self.gather(value)
        other = next((rank for rank, theirs in enumerate(values) if theirs != values[0]), None)
        if other is not None:
            raise ValueError(f"processes 0 and {other} were given different {what}: give every process the same")

    def check_shared(self, parts: Parts) -> None:
        """Raises `ValueError` in all processes unless all of them see what the first one writes there."""
        if self._group is None:
            return
        with parts.token() if self.is_first else nullcontext("") as name:
            # Sent along, so that no process looks before the first one has written.
            seen = self.gather(parts.sees(self.from_first(lambda: name)))
        if not all(seen):
            raise ValueError(
                f"process {seen.index(False)} does not see what process 0 writes to {parts.path}: choose a path for "
                "the memory store on a file system that all machines of the job share"
            )
