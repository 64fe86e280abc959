"""How every program ends: one sentence for what the user can mend, and an exit code."""

import asyncio
import codecs
import errno
import io
import os
import re
import select
import signal
import sys
import threading
import unicodedata
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from clara_hf.program.machine import keep_freed_memory


Result = TypeVar("Result")
FAILED, USAGE, INTERRUPTED, UNREAD = 1, 2, 130, 141
# Errors whose message is written for users. Those of libraries that need not be installed are known by name.
EXPECTED = (ValueError, OSError, ImportError)
EXPECTED_NAMES = ("SafetensorError", "OperationalError", "DatabaseError", "DataLoaderWorkerError")
LANCE_LINE = re.compile(r",? /\S+\.rs:\d+:\d+")  # of its source
READABLE = {"–": "-", "—": "-", "−": "-", "±": "+/-", "…": "...", "×": "x", "→": "->", "≥": ">=", "≤": "<="}
READABLE.update({"‘": "'", "’": "'", "“": '"', "”": '"'})


class UsageError(ValueError):
    """The program cannot do what it was asked for; the message names argument, value and remedy."""


@contextmanager
def loading(argument: str, name: Any) -> Iterator[None]:
    """Turn what goes wrong in loading what `argument` names into one sentence.

    Raises:
        UsageError: names `argument`, `name` and the reason.
    """
    try:
        yield
    except (OSError, ValueError, RuntimeError, KeyError, NotImplementedError) as error:
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise UsageError(f"{argument}: {name} cannot be loaded: {reason}") from error
    except ImportError as error:
        raise UsageError(f"{argument} needs a package that is not installed: {error}") from error


def run_program(main: Callable[[], int | None], again: str = "the same command") -> None:
    """Call `main` as a program, and leave with its exit code.

    An error that the user can mend is one sentence on stderr. Exit codes: 0, or what `main` returns; 2 for a
    [`UsageError`]; 1 for another error; 130 after Ctrl-C; 141, without a word, where what reads the output has ended,
    as `head` does. Other errors are faults of ours and keep their traceback.

    Args:
        again: the command that resumes an interrupted run.

    Raises:
        SystemExit: always.
    """
    print_what_can_be_printed()
    keep_freed_memory()
    before = signal.signal(signal.SIGINT, stop_quietly_unless(os.getpid()))
    called = sys.argv[0]
    try:
        code = main()
        if sys.stdout is not None:
            sys.stdout.flush()
    except SystemExit:
        raise
    except BaseException as error:
        name = Path(sys.argv[0]).name  # here, since a command may have become part of it
        if was_interrupted(error):
            print(f"{name}: interrupted; run {again} again to resume.", file=sys.stderr)
            code = INTERRUPTED
        elif isinstance(error, BrokenPipeError) and nobody_reads():
            code = UNREAD
        elif isinstance(error, EXPECTED) or type(error).__name__ in EXPECTED_NAMES or is_full_disk(error):
            print(f"{name}: error: {one_sentence(error, again)}", file=sys.stderr)
            code = USAGE if isinstance(error, UsageError) else FAILED
        else:
            raise
    finally:
        signal.signal(signal.SIGINT, before)
        sys.argv[0] = called
        if "torch" in sys.modules:
            distributed = sys.modules["torch"].distributed
            if distributed.is_available() and distributed.is_initialized():
                distributed.destroy_process_group()
    sys.exit(code or 0)


def stop_quietly_unless(process: int) -> Callable:
    """A handler of Ctrl-C: `process` is interrupted; others that it forked, which get it too, just end."""

    def handle(number, frame):
        if os.getpid() != process:
            os._exit(128 + number)
        raise KeyboardInterrupt

    return handle


def run_async(work: Coroutine[Any, Any, Result]) -> Result:
    """`asyncio.run`, of which Ctrl-C cancels the work: raised in the midst of one of its tasks, it would be told with a
    traceback as an error that nobody asked that task for."""
    if threading.current_thread() is not threading.main_thread():
        return asyncio.run(work)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # in whose place asyncio puts its own
    try:
        return asyncio.run(work)
    finally:
        signal.signal(signal.SIGINT, before)


def nobody_reads() -> bool:
    """Whether stdout is a pipe whose reader has gone; what is still to be written to it is then dropped."""
    if not isinstance(sys.stdout, io.TextIOWrapper) or not hasattr(select, "poll"):
        return False
    watch = select.poll()
    watch.register(sys.stdout, select.POLLOUT)
    is_gone = any(event & select.POLLERR for _, event in watch.poll(0))
    if is_gone:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return is_gone


def was_interrupted(error: BaseException | None) -> bool:
    """Whether `error` is, or came while handling, Ctrl-C: libraries that are stopped may raise errors of their own."""
    seen: set[int] = set()  # an error may be raised again from one that it caused
    while error is not None and not isinstance(error, KeyboardInterrupt) and id(error) not in seen:
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return isinstance(error, KeyboardInterrupt)


def is_full_disk(error: BaseException) -> bool:
    """Whether a write found no space; `torch.save` and SQLite say so in ways of their own."""
    return any(words in str(error) for words in ("No space left", "inline_container.cc", "disk is full"))


def one_sentence(error: BaseException, again: str = "the same command") -> str:
    """An error's message in one line, with what to do where the disk is full."""
    text = str(error)
    if text.startswith("Caught ") and "Traceback" in text:  # in a data-loader worker, whose stack is in the message
        text = text.strip().splitlines()[-1].partition(": ")[2] or text
    text = " ".join(text.split()) or type(error).__name__
    if is_full_disk(error):
        return f"the disk is full ({text}): free some space and run {again} again."
    if isinstance(error, OSError) and error.errno is None and "Read-only file system" in text:  # Lance's
        return f"a read-only file system cannot be written to ({LANCE_LINE.sub('', text)}): name another place."
    if isinstance(error, OSError) and error.errno in (errno.EACCES, errno.EPERM, errno.EROFS) and error.filename:
        why = "is on a read-only file system" if error.errno == errno.EROFS else "may not be used by this user"
        return f"{error.filename} {why} ({error.strerror}): change that, or name another place."
    return text


def print_what_can_be_printed() -> None:
    """Let stdout and stderr replace what their encoding lacks, instead of raising in the middle of a table."""
    codecs.register_error("readable", readable)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and not stream.encoding.lower().startswith("utf"):
            stream.reconfigure(errors="readable")


def readable(error: UnicodeError) -> tuple[str, int]:
    """For the codecs: signs, and letters without their accents; a question mark for what has none."""
    if not isinstance(error, UnicodeEncodeError):
        raise error
    plain = []
    for letter in error.object[error.start : error.end]:
        found = unicodedata.normalize("NFKD", READABLE.get(letter, letter)).encode("ascii", "ignore").decode()
        plain.append(found or "?")
    return "".join(plain), error.end
