"""One call of a program that asks a language model: claim the folder, fill the store, work through it, hand over."""

import asyncio
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from clara_hf.synthesis.client import ChatClient, key_from_environment
from clara_hf.synthesis.errors import UsageError
from clara_hf.synthesis.prompts import Prompts
from clara_hf.synthesis.runner import Progress, Work, work_through
from clara_hf.synthesis.settings import TeacherArguments, claim
from clara_hf.synthesis.store import STORE_FILE, RunStore
from clara_hf.synthesis.teacher import Teacher


# Writes a run's files from store, folder, settings and limit; `partial` where the run is not at its end.
WriteOutputs = Callable[..., dict[str, Any]]


def make_backend(args: TeacherArguments):
    """An async context manager that gives what completes chats; nothing is asked for where replies are replayed."""
    if args.replay:
        return nullcontext(None)
    if args.backend == "transformers":
        from clara_hf.synthesis.local_model import LocalModel

        return LocalModel(args.model, args.max_tokens, args.batch_size)
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
        self.folder = Path(args.out)
        self.prompts = Prompts(args.prompts)
        self.settings = {**args.fixed(), **inputs, "prompts": self.prompts.version}
        self._open = ExitStack()
        self._backend = None

    def __enter__(self) -> "Session":
        args, folder = self.args, self.folder
        if folder.exists() and not folder.is_dir():
            raise UsageError(f"--out {folder} is a file: name a folder.")
        holds_run = (folder / STORE_FILE).is_file()
        if not holds_run and folder.is_dir() and any(folder.iterdir()):
            raise UsageError(f"--out {folder} is not empty and holds no run: choose another folder.")
        if args.replay and not Path(args.replay, STORE_FILE).is_file():
            raise UsageError(f"--replay: {args.replay} holds no {STORE_FILE}.")
        if args.replay and Path(args.replay).resolve() == folder.resolve():
            raise UsageError("--replay and --out must be two folders.")
        folder.mkdir(parents=True, exist_ok=True)
        with self._open as opening:
            self.store = opening.enter_context(RunStore(folder))
            # Without a reply nothing is lost: what the endpoint refused may be asked for in another way.
            unasked = not self.store.has_replies() and not self.store.totals(None).items
            if holds_run and (args.overwrite or unasked and self.store.meta("settings") != self.settings):
                # Opened first: a run that another process works on is not deleted.
                self._replace_run(opening)
            claim(self.store, self.settings)
            self.replay = opening.enter_context(RunStore(args.replay, read_only=True)) if args.replay else None
            if args.retry_failed:
                self.store.forget_failed()
            self._open = opening.pop_all()
        return self

    def __exit__(self, *details) -> None:
        self._open.__exit__(*details)

    def _replace_run(self, opening: ExitStack) -> None:
        opening.pop_all().close()
        for name in (*self.outputs, STORE_FILE, f"{STORE_FILE}-wal", f"{STORE_FILE}-shm"):
            path = self.folder / name
            is_folder = path.is_dir() and not path.is_symlink()
            shutil.rmtree(path) if is_folder else path.unlink(missing_ok=True)
        self.store = opening.enter_context(RunStore(self.folder))

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
        asyncio.run(self._work(work, key, unit, kept))

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
