"""Documents compressed by the actors of a Ray cluster, which write them into a memory store that all machines share.

Each actor has the model once, for as long as the driver runs. It writes parts, as every process that adds does; the
driver plans the batches and takes the parts in, in one version. Ray starts an actor that died anew, and repeats what
it had not answered: what was written twice then counts once.
"""

import logging
import math
import os
from collections.abc import Callable
from pathlib import Path

from tqdm.auto import tqdm

from .build import Portion, write_portion


try:
    import ray
    from ray.exceptions import RayActorError, RayTaskError
    from ray.util import ActorPool
except ImportError as error:
    raise ImportError('building on Ray needs Ray: pip install "clara-hf[ray]"') from error

# So often is a portion tried, whose actor dies.
TRIES = 4
# Portions for each actor, at least: so that they end at about the same time, and little is lost with one.
SHARES = 4


class RayActors:
    """Actors of a Ray cluster that compress for [`MemoryStore.add`].

    The cluster is the one that Ray is connected to, or that `RAY_ADDRESS` names; else one is started on this machine,
    without a dashboard and without usage statistics.

    Args:
        load (`Callable`): gives the model, in the actor; it is pickled. Ray shows each actor its own GPU.
        count (`int`, *optional*): of actors; by default as many as the cluster has GPUs, or CPUs where it has none.

    Example:

    ```python
    store = MemoryStore.open("shared/memories", model)
    actors = RayActors(lambda: CLaRaForRetrievalGeneration.from_pretrained("checkpoint").cuda().eval())
    store.add(documents, actors=actors)
    ```
    """

    def __init__(self, load: Callable, count: int | None = None):
        if count is not None and count < 1:
            raise ValueError(f"count is {count}; there must be at least 1 actor")
        if not ray.is_initialized():
            os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
            ray.init(include_dashboard=False, logging_level=logging.WARNING)
        found = ray.cluster_resources()
        gpus = int(found.get("GPU", 0))
        self.count = count or gpus or int(found.get("CPU", 1))
        needs = {"num_cpus": 1, "num_gpus": min(1.0, gpus / self.count)}
        actor = ray.remote(max_restarts=-1, max_task_retries=TRIES - 1, **needs)(_Compressor)
        self._actors = [actor.remote(load) for _ in range(self.count)]

    def write(self, store, portion: Portion, description: str | None) -> tuple[list[dict], int]:
        """As `write_portion`, by all actors.

        Raises:
            RuntimeError: an actor died again and again.
            ValueError: an actor does not see the store's folder. What one raises is raised here.
        """
        row = store._table.form.size * store._table.form.numpy_type.itemsize
        count = max(SHARES * self.count, math.ceil(len(portion.keys) * row / store.write_bytes))
        size = max(1, math.ceil(len(portion.batches) / count))
        starts = range(0, len(portion.batches), size)
        portions = [portion.part(portion.batches[start : start + size]) for start in starts]
        parts, cut, pool = [], 0, ActorPool(self._actors)
        bar = tqdm(total=len(portion.keys), desc=description, unit="doc", disable=description is None)
        with bar, store._table.parts.token() as token:
            task = (store.path, store._rate, store._table.version, token, store.write_bytes, store.write_seconds)
            try:
                for made, count, some in pool.map_unordered(
                    lambda actor, part: actor.write.remote(*task, part), portions
                ):
                    parts += made
                    cut += count
                    bar.update(some)
            except RayTaskError as error:
                raise error.cause from error
            except RayActorError as error:
                raise RuntimeError(
                    f"an actor cannot be started, or died {TRIES} times over one portion of the documents ("
                    f"{str(error).strip().splitlines()[-1].strip()}); what was written to {store.path} before is kept"
                ) from error
        return parts, cut


class _Compressor:
    """An actor: it loads the model with its first portion."""

    def __init__(self, load: Callable):
        self._load, self._model, self._store = load, None, None

    def write(
        self,
        path: Path | str,
        rate: int | None,
        version: int,
        token: str,
        write_bytes: int,
        write_seconds: float,
        portion: Portion,
    ) -> tuple[list[dict], int, int]:
        from .store import MemoryStore

        if self._model is None:
            self._model = self._load()
        if self._store is None or self._store.path != path:
            self._store = MemoryStore.open(path, self._model, rate=rate)
        store = self._store
        if not store._table.parts.sees(token):
            raise ValueError(
                f"an actor does not see what the driver writes to {path}: choose a path for the memory store on a file "
                "system that all machines of the cluster share"
            )
        store.write_bytes, store.write_seconds = write_bytes, write_seconds
        store._table.load(version)
        parts, cut = write_portion(store, portion, None)
        return parts, cut, len(portion.keys)
