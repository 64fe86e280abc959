"""The arguments of the programs that ask a language model, and the state of a run, open for one call."""

import json
import shutil
import sqlite3
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import xxhash

from clara_hf.program import UsageError, option
from clara_hf.program.errors import run_async
from clara_hf.program.folders import LOCK_FILE, first_difference, release_lock, take_lock
from clara_hf.program.values import load_text
from clara_hf.synthesis.backends.client import ChatClient, key_from_environment
from clara_hf.synthesis.backends.secrets import masked
from clara_hf.synthesis.prompts import Prompts
from clara_hf.synthesis.store import STORE_FILE, RunStore
from clara_hf.synthesis.teacher import Progress, Teacher, Work, work_through


# What is written of the finished items, which an earlier version recorded as part of the run.
WRITING = ("keep_uncovered", "reconstruct", "validation_share")
# Arguments that may change between a call and the next one, which goes on with the run.
FREE = (
    *WRITING,
    "output_dir",
    # What stands at these paths is told by a digest instead.
    "corpus",
    "dataset",
    "exclude",
    "prompts",
    "questions",
    "tokenizer",
    "base_url",
    "api_key_env",
    "structured_outputs",
    "concurrency",
    "timeout",
    "max_retries",
    "tolerated_failures",
    "batch_size",
    "price_in",
    "price_out",
    "limit",
    "replay",
    "retry_failed",
    "overwrite",
    "push_to_hub",
    "public",
)


@dataclass
class TeacherArguments:
    """The language model that writes the data, and how it is asked."""

    output_dir: str = option(help="Output folder. The same command resumes the run that it holds.", aliases=["--out"])
    model: str | None = option(None, "Name of the model at the endpoint; with --backend transformers its path.")
    backend: str = option(
        "http",
        "http (an OpenAI-compatible endpoint), transformers, or cloze (rules, without a model).",
        choices=("http", "transformers", "cloze"),
    )
    gguf_file: str | None = option(None, "With --backend transformers: GGUF file of the model, dequantized on load.")
    base_url: str = option("http://localhost:8000/v1", "Address of the endpoint, up to /v1.")
    api_key_env: str = option("OPENAI_API_KEY", "Environment variable with the API key.")
    structured_outputs: str = option(
        "auto",
        "json_schema, json_object, none, or auto: the best that the endpoint takes.",
        choices=("auto", "json_schema", "json_object", "none"),
    )
    concurrency: int = option(32, "Maximum number of concurrent requests.")
    timeout: float = option(300.0, "Time limit of one request attempt, in seconds.")
    max_retries: int = option(8, "Retries after 429, 5xx, timeouts and lost connections.")
    tolerated_failures: int = option(3, "Items in a row whose requests may fail for good before the run stops.")
    temperature: float = option(0.7, "Sampling temperature for what is written; checks use 0.")
    max_tokens: int = option(2048, "Maximum number of tokens per reply.")
    # Of any type for the parser, whose message about another type shows the value: it may hold a key.
    extra_body: Any = option(None, "Further fields of each request, JSON; null leaves a field out.")
    batch_size: int = option(8, "Requests per batch with --backend transformers.")
    seed: int = option(0, "Every request's seed follows from it.")
    prompts: str | None = option(None, "Folder; its files replace the prompts of that name.")
    replay: str | None = option(None, "Output folder of a run whose replies are taken.")
    price_in: float | None = option(None, "Price of a million prompt tokens.")
    price_out: float | None = option(None, "Price of a million completion tokens.")
    limit: int | None = option(None, "Stop after this many; a later call may go further.")
    retry_failed: bool = option(False, "Try again what failed requests have set aside.")
    overwrite: bool = option(False, "Delete the run that the output folder holds.")

    def __post_init__(self):
        self.extra_body = mapping("extra_body", self.extra_body)
        if self.extra_body and self.backend != "http":
            raise UsageError(f"--extra_body is sent to an endpoint; --backend {self.backend} has none.")
        if self.gguf_file and self.backend != "transformers":
            raise UsageError(f"--gguf_file is for --backend transformers, but it is {self.backend}.")
        if (self.model is None) != (self.backend == "cloze"):
            wrong = "--model must name a model" if self.model is None else "leave --model out: rules ask no model"
            raise UsageError(f"--backend {self.backend}: {wrong}.")
        self.at_least(1, "concurrency", "batch_size", "max_tokens", "limit")
        self.at_least(0, "max_retries", "tolerated_failures", "temperature", "price_in", "price_out")
        if self.timeout <= 0:
            raise UsageError(f"--timeout must be more than 0 seconds, but is {self.timeout}.")
        if (self.price_in is None) != (self.price_out is None):
            raise UsageError("--price_in and --price_out are given together or not at all.")

    def at_least(self, low: int, *names: str) -> None:
        for name in names:
            value = getattr(self, name)
            if value is not None and value < low:
                raise UsageError(f"--{name} must be at least {low}, but is {value}.")

    @property
    def prices(self) -> tuple[float, float] | None:
        return None if self.price_in is None or self.price_out is None else (self.price_in, self.price_out)

    @property
    def model_name(self) -> str:
        """The model's name in requests and files; of a folder its name only."""
        if self.backend == "cloze":
            return "cloze"
        is_folder = self.backend == "transformers" and Path(self.model).is_dir()
        return Path(self.model).resolve().name if is_folder else self.model

    def fixed(self) -> dict[str, Any]:
        """The arguments that make the run what it is; no value is a path of this machine."""
        values = {name: value for name, value in asdict(self).items() if name not in FREE}
        values["model"] = self.model_name
        if self.backend == "transformers":
            values["model_files"] = path_identity(self.model)
        return json.loads(json.dumps({**values, "extra_body": masked(self.extra_body)}))


def mapping(name: str, value: Any) -> dict[str, Any]:
    """A mapping given as YAML, JSON or nothing."""
    value = load_text(value, f"--{name}") if isinstance(value, str) else value or {}
    if not isinstance(value, dict):
        raise UsageError(f"--{name} must be a mapping, in YAML or JSON, but is of type {type(value).__name__}.")
    return value


def claim(store: RunStore, settings: dict[str, Any]) -> None:
    """Record the settings of the run in its store, or see that they are the recorded ones.

    Raises:
        UsageError: the store holds a run with other settings.
    """
    before = store.meta("settings")
    if before is None:
        store.set_meta(settings=settings)
        store.commit()
        return
    before = {name: value for name, value in before.items() if name not in WRITING}
    if difference := first_difference(before, settings):
        raise UsageError(f"--output_dir holds a run with {difference}")


def files_identity(files: Iterable[tuple[Path, str]]) -> dict[str, Any]:
    """What files are, wherever they lie: their number, bytes in sum, and one digest over names and contents."""
    digest, count, size = xxhash.xxh3_128(), 0, 0
    for path, name in files:
        count, before = count + 1, size
        digest.update(f"{name}\0".encode("utf-8", "surrogateescape"))
        with open(path, "rb") as file:
            while block := file.read(1 << 20):
                size += len(block)
                digest.update(block)
        digest.update(f"\0{size - before}\0".encode())
    return {"files": count, "bytes": size, "digest": digest.hexdigest()}


def path_identity(name: str | None) -> dict[str, Any] | str | None:
    """What a file or folder is; a name that is no path, one of the Hub, stands for itself."""
    path = Path(name) if name else None
    if path is None or not path.exists():
        return name
    found = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    return files_identity((file, file.relative_to(path).as_posix() if path.is_dir() else "") for file in found)


# Writes a run's files from store, folder, settings and limit; `partial` where the run is not at its end.
WriteOutputs = Callable[..., dict[str, Any]]


def make_backend(args: TeacherArguments):
    """An async context manager that gives what completes chats; nothing is asked for where replies are replayed."""
    if args.replay or args.backend == "cloze":
        return nullcontext(None)
    if args.backend == "transformers":
        from clara_hf.synthesis.backends.local_model import LocalModel

        return LocalModel(args.model, args.max_tokens, args.batch_size, args.gguf_file)
    return ChatClient(
        args.base_url,
        args.model,
        key_from_environment(args.api_key_env),
        concurrency=args.concurrency,
        timeout=args.timeout,
        max_retries=args.max_retries,
        structured_outputs=args.structured_outputs,
        max_tokens=args.max_tokens,
        extra_body=args.extra_body,
    )


class Session:
    """The state of a run, open for one call; a context manager.

    Args:
        args: of the program.
        inputs: what besides the arguments makes the run: sizes and digests of files.
        outputs: names of the files that the run writes.

    Raises:
        UsageError: the folder holds other things, a run with other settings, or one that another process works on.
    """

    def __init__(self, args: TeacherArguments, inputs: dict[str, Any], outputs: tuple[str, ...]):
        self.args, self.outputs = args, outputs
        self.folder = Path(args.output_dir)
        self.prompts = Prompts(args.prompts)
        self.settings = {**args.fixed(), **inputs, "prompts": self.prompts.version}
        self._open = ExitStack()
        self._backend = None

    def __enter__(self) -> "Session":
        args, folder = self.args, self.folder
        if folder.exists() and not folder.is_dir():
            raise UsageError(f"--output_dir {folder} is a file: name a folder.")
        if args.replay and not Path(args.replay, STORE_FILE).is_file():
            raise UsageError(f"--replay: {args.replay} holds no {STORE_FILE}.")
        if args.replay and Path(args.replay).resolve() == folder.resolve():
            raise UsageError("--replay and --output_dir must be two folders.")
        with self._open as opening:
            opening.callback(release_lock, folder, take_lock(folder))
            holds_run = (folder / STORE_FILE).is_file()
            if not holds_run and any(path.name != LOCK_FILE for path in folder.iterdir()):
                raise UsageError(f"--output_dir {folder} is not empty and holds no run: choose another folder.")
            self.store = opening.enter_context(RunStore(folder))
            # Without a reply nothing is lost: what the endpoint refused may be asked for in another way.
            unasked = not self.store.has_replies() and not self.store.totals(None).items
            if holds_run and (args.overwrite or unasked and self.store.meta("settings") != self.settings):
                self.store.close()
                self._delete_run()
                self.store = opening.enter_context(RunStore(folder))
            claim(self.store, self.settings)
            self.replay = opening.enter_context(RunStore(args.replay, read_only=True)) if args.replay else None
            if args.retry_failed:
                self.store.forget_failed()
            self._open = opening.pop_all()
        return self

    def __exit__(self, *details) -> None:
        self._open.__exit__(*details)

    def _delete_run(self) -> None:
        # The store goes last: a folder that has it is known to hold a run, also after a kill.
        for name in (*self.outputs, f"{STORE_FILE}-wal", f"{STORE_FILE}-shm", STORE_FILE):
            path = self.folder / name
            is_folder = path.is_dir() and not path.is_symlink()
            shutil.rmtree(path) if is_folder else path.unlink(missing_ok=True)

    def prepare(self) -> None:
        """Make the backend, where there is work left: what is wrong with it is found before documents are read."""
        if self._work_left():
            self._backend = make_backend(self.args)

    def _work_left(self) -> bool:
        store, limit = self.store, self.args.limit
        count = store.count(limit)
        all_known = store.meta("complete", False) or limit is not None and count >= limit
        return not all_known or store.totals(limit).items < count

    def work(self, work: Work, key: str, unit: str, kept: str) -> None:
        """Finish all items that are not finished; the progress bar counts `unit`, and what they give as `kept`."""
        run_async(self._work(work, key, unit, kept))

    @contextmanager
    def partial_files(self, write: WriteOutputs) -> Iterator[None]:
        """Within it, whatever stops the work leaves the files of what is finished, marked as partial."""
        try:
            yield
        except BaseException:
            if self.store.totals(self.args.limit).items:
                with suppress(OSError, sqlite3.Error):
                    write(self.store, self.folder, self.settings, self.args.limit, partial=True)
            raise

    async def _work(self, work: Work, key: str, unit: str, kept: str) -> None:
        args, store = self.args, self.store
        limits = args.concurrency, args.limit
        total = store.count(args.limit)
        done = store.totals(args.limit)
        if done.items == total:
            return
        progress = Progress(total, done, unit, kept, args.prices)
        model = self.settings["model"]
        try:
            async with self._backend or make_backend(args) as backend:
                teacher = Teacher(backend, store, self.prompts, model, args.seed, args.temperature, self.replay)
                await work_through(store, teacher, work, key, *limits, progress, args.tolerated_failures)
        finally:
            progress.close()
