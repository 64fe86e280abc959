"""Replicas of the service behind Ray Serve's proxy, over one collection that none of them writes to.

    pip install "clara-hf[serve]" "ray[serve]"
    python examples/ray_serve.py --model recipes/nano/pretrained/joint --store notes.clara --replicas 2

Each replica is the application that `clara serve --read-only` runs, with a model of its own; a client sees one service.
"""

import argparse
import os
import time
from pathlib import Path

import ray
from fastapi import FastAPI
from ray import serve

from clara_hf.serving.serve import ServeArguments, build


def deployment(args: ServeArguments, replicas: int, cpus: float = 1, gpus: float = 0) -> serve.Application:
    """What `serve.run` takes.

    Args:
        args: as for one service; `read_only` must be set.
        replicas: how many.
        cpus, gpus: of each replica; a fraction of a GPU puts several on one.

    Raises:
        ValueError: `args` would let every replica write.
    """
    if not args.read_only:
        raise ValueError("read_only is False; replicas share one collection, so it must be True")

    def application() -> FastAPI:  # called in each replica
        return build(args)

    return serve.deployment(
        serve.ingress(application)(),
        name="clara",
        num_replicas=replicas,
        max_ongoing_requests=args.max_queue,
        ray_actor_options={"num_cpus": cpus, "num_gpus": gpus},
    ).bind()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--store", required=True)
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--cpus", type=float, default=1, help="Of each replica.")
    parser.add_argument("--gpus", type=float, default=0, help="Of each replica.")
    parser.add_argument("--port", type=int, default=8000)
    options = parser.parse_args(arguments)
    store = str(Path(options.store).resolve())  # replicas have another working directory
    model = str(Path(options.model).resolve()) if Path(options.model).exists() else options.model
    args = ServeArguments(model, store, Path(options.model).name, read_only=True)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray would report its use elsewhere
    ray.init(include_dashboard=False)  # `RAY_ADDRESS` names a cluster; without it, one starts here
    serve.start(http_options={"host": "127.0.0.1", "port": options.port})
    serve.run(deployment(args, options.replicas, options.cpus, options.gpus), name="clara")
    print(f"Serving {args.name} at http://127.0.0.1:{options.port}", flush=True)
    while True:
        time.sleep(3600)


if __name__ == "__main__":
    main()
