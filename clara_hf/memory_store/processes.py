"""The processes that fill a memory store together: those of a torch.distributed job, or this one alone."""

from collections.abc import Callable
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import TypeVar
from uuid import uuid4

import torch.distributed as dist


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
        values = [None] * self.count
        dist.all_gather_object(values, value, group=self._group)
        return values

    def from_first(self, make: Callable[[], Value]) -> Value:
        """What `make` gives in the first process; what it raises there is raised in all."""
        if self._group is None:
            return make()
        outcome = [None, None]
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

    def check_shared(self, folder: Path) -> None:
        """Raises `ValueError` in all processes unless all of them see the first one's files in `folder`."""
        if self._group is None:
            return
        name = f"{uuid4().hex}.token"
        # Sent along, so that no process looks before the first one has written.
        folder.mkdir(exist_ok=True)
        if self.is_first:
            (folder / name).touch()
        name = self.from_first(lambda: name)
        seen = self.gather((folder / name).exists())
        if self.is_first:
            (folder / name).unlink()
        if not all(seen):
            raise ValueError(
                f"process {seen.index(False)} does not see what process 0 writes to {folder.parent}: choose a path for "
                "the memory store on a file system that all machines of the job share"
            )
