"""`clara serve`: a model and a collection of documents as a service."""

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

from clara_hf.program import UsageError, option, parse
from clara_hf.program.models import ModelSource, load_trained
from clara_hf.serving.answers import Service
from clara_hf.serving.app import build_app
from clara_hf.serving.engine import Engine, Metrics
from clara_hf.serving.guards import Guard, Keys
from clara_hf.serving.library import Library
from clara_hf.serving.vllm import VllmAnswerer
from modeling_clara import CLaRaForRetrievalGeneration


LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass
class ServeArguments:
    """All that a service is started with; `build` makes it."""

    model: ModelSource = option(help="Checkpoint: a folder, or a name on the Hub.")
    store: str = option(help="Folder of the collection; made where there is none, unless --read_only.")
    name: str | None = option(None, "Name of the model for clients (default: the last part of --model).")
    collection: str = option("documents", "Id of the collection as a vector store.")
    read_only: bool = option(False, "Serve the collection without ever writing to it.")
    api_key_file: str | None = option(
        None, "File with one key per line; without it, everybody who reaches the port may ask."
    )
    engine: list[str] = option(
        help="local, or: vllm URL, a server of the merged generator with --enable-prompt-embeds.",
        default_factory=lambda: ["local"],
    )
    vllm_dtype: str = option("float32", "The vLLM server's dtype.", choices=("float32", "bfloat16", "float16"))
    ui: bool = option(False, "Serve the page at /.")
    feedback: str | None = option(
        None, "JSONL file that thumbs on the page are appended to, as rows for joint training."
    )
    host: str = option("127.0.0.1", "Address to bind, by default loopback.")
    port: int = option(8000, "Port; 0 takes a free one.")
    max_queue: int = option(128, "Requests that may wait; more get status 429.")
    max_batch: int = option(32, "Answers made at once.")
    batch_wait_ms: float = option(3.0, "Time for which a question waits for others.")
    max_body_mb: float = option(8.0, "Largest request body.")
    body_seconds: float = option(30.0, "Time in which a body must arrive.")
    seconds: float = option(120.0, "Time limit of a request.")

    def __post_init__(self):
        self.model = ModelSource(self.model) if isinstance(self.model, str) else self.model
        self.name = self.name or Path(self.model.model_name_or_path).name
        if self.engine != ["local"] and (len(self.engine) != 2 or self.engine[0] != "vllm"):
            raise UsageError(f"--engine is {' '.join(self.engine)!r}; it must be 'local', or 'vllm' and a server's URL")
        for name in ("max_queue", "max_batch"):
            if getattr(self, name) < 1:
                raise UsageError(f"--{name} is {getattr(self, name)}; it must be at least 1")

    @property
    def vllm(self) -> str | None:
        """Address of the vLLM server, without `/v1`."""
        return self.engine[1].rstrip("/").removesuffix("/v1") if len(self.engine) == 2 else None


def build(args: ServeArguments, model: CLaRaForRetrievalGeneration | None = None) -> FastAPI:
    """The application; `model` is loaded where it is not given, and is the service's own from then on.

    Raises:
        OSError, ValueError: model, store, keys or the vLLM server are not what they must be.
    """
    keys = Keys(args.api_key_file) if args.api_key_file else None
    other = VllmAnswerer.first_model(args.vllm) if args.vllm else None
    model = load_trained(args.model) if model is None else model
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


def main(arguments: list[str] | None = None) -> None:
    """Runs `clara serve`.

    Raises:
        UsageError, OSError, ValueError: an option is wrong; as [`run`].
    """
    options = parse(ServeArguments, arguments, description=__doc__)
    logging.basicConfig(level=logging.WARNING)
    run(options)
