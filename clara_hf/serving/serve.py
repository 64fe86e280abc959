"""`clara serve`: a model and a collection of documents as a service."""

import argparse
import asyncio
import logging
import signal
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import uvicorn
from fastapi import FastAPI
from starlette.middleware.trustedhost import TrustedHostMiddleware

from clara_hf.program import UsageError
from clara_hf.serving.answers import Service
from clara_hf.serving.app import build_app
from clara_hf.serving.engine import Engine, Metrics
from clara_hf.serving.guards import Guard, Keys
from clara_hf.serving.library import Library
from clara_hf.serving.vllm import VllmAnswerer
from modeling_clara import CLaRaForRetrievalGeneration


LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True)
class ServeArguments:
    """All that a service is started with; `build` makes it."""

    model: str
    store: str
    name: str
    collection: str = "documents"
    read_only: bool = False
    api_key_file: str | None = None
    vllm: str | None = None
    vllm_dtype: str = "float32"
    ui: bool = False
    feedback: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    max_queue: int = 128
    max_batch: int = 32
    batch_wait_ms: float = 3.0
    max_body_mb: float = 8.0
    body_seconds: float = 30.0
    seconds: float = 120.0


def load_model(name: str) -> CLaRaForRetrievalGeneration:
    """A model of a folder or the Hub, on the accelerator if there is one.

    Raises:
        OSError, ValueError: there is none.
    """
    model = CLaRaForRetrievalGeneration.from_pretrained(name)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else "cpu"
    return model.to(device).eval()


def build(args: ServeArguments, model: CLaRaForRetrievalGeneration | None = None) -> FastAPI:
    """The application; `model` is loaded where it is not given, and is the service's own from then on.

    Raises:
        OSError, ValueError: model, store, keys or the vLLM server are not what they must be.
    """
    keys = Keys(args.api_key_file) if args.api_key_file else None
    other = VllmAnswerer.first_model(args.vllm) if args.vllm else None
    model = load_model(args.model) if model is None else model
    library = Library.open(args.store, model, args.read_only)
    metrics = Metrics()
    metrics.passages.set(len(library))
    engine = Engine(library, args.max_queue, args.max_batch, args.batch_wait_ms / 1000, metrics)
    answerer = engine
    if other:
        answerer = VllmAnswerer(engine, args.vllm, other, getattr(torch, args.vllm_dtype), args.seconds)
    feedback = Path(args.feedback) if args.feedback else None
    app = build_app(Service(args.name, args.collection, engine, answerer, feedback, int(time.time())), args.ui)
    if args.host in LOOPBACK:  # a page elsewhere whose name is made to point here must not get in
        app.add_middleware(TrustedHostMiddleware, allowed_hosts=[*LOOPBACK, "[::1]"])
    app.add_middleware(
        Guard,
        keys=keys,
        max_body=int(args.max_body_mb * 2**20),
        body_seconds=args.body_seconds,
        seconds=args.seconds,
        metrics=metrics,
    )
    return app


def server_config(app: FastAPI, seconds: float) -> uvicorn.Config:
    """How uvicorn serves the application; what runs at its end has `seconds` to finish.

    By h11, whatever else is installed: httptools refuses a method that it does not know in its own words, not in ours.
    """
    return uvicorn.Config(
        app,
        http="h11",
        log_config=None,
        access_log=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=int(seconds),
        h11_max_incomplete_event_size=64 * 2**10,
    )


def run(args: ServeArguments) -> None:
    """Serves until SIGTERM or SIGINT; what runs then is finished first.

    Raises:
        OSError, ValueError: as [`build`]; or the address cannot be bound.
        SystemExit: of code 0, after SIGTERM.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # uvicorn raises the signal again once it has shut down
    family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
    with socket.socket(family) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind((args.host, args.port))
        except OSError as error:
            raise OSError(f"--host {args.host} --port {args.port} cannot be bound: {error.strerror}") from error
        app = build(args)
        config = server_config(app, args.seconds)
        listener.listen(512)
        shown = f"[{args.host}]" if ":" in args.host else args.host
        print(f"Serving {args.name} at http://{shown}:{listener.getsockname()[1]}", flush=True)
        asyncio.run(uvicorn.Server(config).serve(sockets=[listener]))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--model", required=True, help="Checkpoint: a folder, or a name on the Hub.")
    add("--store", required=True, help="Folder of the collection; made where there is none, unless --read-only.")
    add("--name", help="Name of the model for clients (default: the last part of --model).")
    add("--collection", default="documents", help="Id of the collection as a vector store (default: documents).")
    add("--read-only", action="store_true", help="Serve the collection without ever writing to it.")
    add("--api-key-file", help="File with one key per line; without it, everybody who reaches the port may ask.")
    add(
        "--engine",
        nargs="+",
        default=["local"],
        metavar="ENGINE",
        help="local, or: vllm URL, a server of the merged generator with --enable-prompt-embeds.",
    )
    add("--vllm-dtype", default="float32", choices=["float32", "bfloat16", "float16"], help="The vLLM server's dtype.")
    add("--ui", action="store_true", help="Serve the page at /.")
    add("--feedback", help="JSONL file that thumbs on the page are appended to, as rows for joint training.")
    add("--host", default="127.0.0.1", help="Address to bind (default: loopback).")
    add("--port", type=int, default=8000, help="Port; 0 takes a free one.")
    add("--max-queue", type=int, default=128, help="Requests that may wait; more get status 429 (default: 128).")
    add("--max-batch", type=int, default=32, help="Answers made at once (default: 32).")
    add("--batch-wait-ms", type=float, default=3.0, help="Time for which a question waits for others (default: 3).")
    add("--max-body-mb", type=float, default=8.0, help="Largest request body (default: 8).")
    add("--body-seconds", type=float, default=30.0, help="Time in which a body must arrive (default: 30).")
    add("--seconds", type=float, default=120.0, help="Time limit of a request (default: 120).")


def main(arguments: list[str] | None = None) -> None:
    """Runs `clara serve`.

    Raises:
        UsageError, OSError, ValueError: an option is wrong; as [`run`].
    """
    parser = argparse.ArgumentParser(prog="clara serve", description=__doc__)
    add_arguments(parser)
    values = vars(parser.parse_args(arguments))
    engine = values.pop("engine")
    if engine != ["local"]:
        if len(engine) != 2 or engine[0] != "vllm":
            raise UsageError(f"--engine is {' '.join(engine)!r}; it must be 'local', or 'vllm' and the server's URL")
        values["vllm"] = engine[1].rstrip("/").removesuffix("/v1")
    for name in ("max_queue", "max_batch"):
        if values[name] < 1:
            raise UsageError(f"--{name.replace('_', '-')} is {values[name]}; it must be at least 1")
    values["name"] = values["name"] or Path(values["model"]).name
    logging.basicConfig(level=logging.WARNING)
    run(ServeArguments(**values))
