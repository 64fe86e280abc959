"""A run's output folder: who works in it, which run it holds, and whether a call may go on with it."""

import json
import os
import shutil
import socket
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from clara_hf.program.errors import UsageError
from clara_hf.program.files import PARTIAL, read_json, write_json
from clara_hf.program.values import shown


try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

RUN_FILE = "run.json"
LOCK_FILE = ".lock"
_locks: dict[Path, int] = {}


class RunFolder:
    """A folder for one run, known by its settings.

    A second process is refused while the first works in the folder, and told which one that is. The lock goes with its
    process, however that ends. A folder that holds nothing but a lock, half-written files or `kept` is free.

    Args:
        folder: where the run is, or will be.
        settings: what makes the run what it is, as JSON values.
        overwrite: replace the run that the folder holds.
        resume: go on with a run of equal settings; else any run is refused.
        kept: names that outlive a run and that no call needs to be told about, such as memories.
        described: the sentence that says what differs, from the recorded settings and these; by default the first
            setting that does.

    Example:

        with RunFolder("runs/x", {"seed": 0}).claimed() as run:
            if run.record is None:
                run.begin()
            ...
    """

    def __init__(
        self,
        folder: str | Path,
        settings: Mapping[str, Any],
        overwrite: bool = False,
        resume: bool = True,
        kept: tuple[str, ...] = (),
        described: Callable[[dict, dict], str | None] | None = None,
    ):
        self.path = Path(folder)
        self.settings = json.loads(json.dumps(settings, default=str))
        self.overwrite, self.resume, self.kept = overwrite, resume, kept
        self._described = described or first_difference

    @property
    def record(self) -> dict[str, Any] | None:
        """The settings of the run that the folder holds."""
        path = self.path / RUN_FILE
        return read_json(path) if path.is_file() else None

    def holds_work(self) -> bool:
        """Whether there is more than a record, a lock and what is kept."""
        return bool(self._names() - {RUN_FILE, *self.kept})

    def check(self) -> None:
        """See whether the folder may be used for this run; nothing is changed.

        Raises:
            UsageError: it holds something else, another run, or one that may not be resumed.
        """
        if self.path.exists() and not self.path.is_dir():
            raise UsageError(f"output_dir {self.path} is a file: name a folder.")
        if not self._names() - set(self.kept):
            return
        before = self.record
        if before is None:
            raise UsageError(f"output_dir {self.path} is not empty and holds no run: choose another folder.")
        if self.overwrite or not self.holds_work():
            return
        if not self.resume:
            raise UsageError(
                f"output_dir {self.path} holds a run: pass --resume true to go on with it, or --overwrite true."
            )
        difference = self._described(before, self.settings)
        if difference is not None:
            raise UsageError(f"output_dir {self.path} holds a run with {difference}")

    @contextmanager
    def claimed(self) -> Iterator["RunFolder"]:
        """Keep other processes out, and check the folder; if nothing comes of it, it is as it was before.

        Raises:
            UsageError: as [`check`]; or another process works in the folder.
        """
        self.check()
        lock = take_lock(self.path)
        try:
            self.check()  # again: another process may have been in between
            yield self
        finally:
            if not self.holds_work():
                self._remove({RUN_FILE, *self._leftovers()})
            release_lock(self.path, lock)

    def begin(self, keep: tuple[str, ...] | None = None) -> None:
        """Record this run, after deleting the one that it overwrites, but for `keep` (default: what is kept)."""
        if self.overwrite and self.record is not None:
            self._remove(self._names() - set(self.kept if keep is None else keep) - {RUN_FILE})
        write_json(self.path / RUN_FILE, self.settings)

    def _names(self) -> set[str]:
        if not self.path.is_dir():
            return set()
        return {path.name for path in self.path.iterdir()} - {LOCK_FILE} - self._leftovers()

    def _leftovers(self) -> set[str]:
        """What a kill while the record was written has left."""
        beside = self.path / (RUN_FILE + PARTIAL)
        return {beside.name} if beside.is_file() else set()

    def _remove(self, names: set[str]) -> None:
        for name in names:
            path = self.path / name
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def first_difference(before: dict, now: dict) -> str | None:
    """The end of the sentence about a run with other settings; `None` where they are equal."""
    changed = sorted(name for name in {*before, *now} if before.get(name) != now.get(name))
    if not changed:
        return None
    name = changed[0]
    return (
        f"other arguments ({name}: {shown(before.get(name))} there, {shown(now.get(name))} now): pass --overwrite true "
        "to replace it, or another output_dir."
    )


def take_lock(folder: Path) -> int | None:
    """Make `folder` and hold its lock, which ends with this process; the file names the holder.

    Raises:
        UsageError: another process holds it.
    """
    if fcntl is None:
        folder.mkdir(parents=True, exist_ok=True)
        return None
    if folder.resolve() in _locks:
        raise UsageError(f"{folder} is in use by this process already.")
    path = folder / LOCK_FILE
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            # Unlike flock's, such a lock is not inherited by workers that outlive a killed process.
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            holder = os.read(lock, 4096).decode("utf-8", "replace").strip() or "another process"
            os.close(lock)
            raise UsageError(f"output_dir {folder} is in use by {holder}: wait for it, or stop it.") from error
        except OSError:
            pass  # a file system without locks: nothing can be known there
        if path.exists() and os.stat(path).st_ino == os.fstat(lock).st_ino:
            break
        os.close(lock)  # its last holder has just removed it
    os.ftruncate(lock, 0)
    os.write(lock, f"process {os.getpid()} on {socket.gethostname()} ({' '.join(sys.argv[:1])})".encode())
    _locks[folder.resolve()] = lock
    return lock


def release_lock(folder: Path, lock: int | None) -> None:
    """Let go of the lock, and of the folder where nothing is in it."""
    (folder / LOCK_FILE).unlink(missing_ok=True)
    _locks.pop(folder.resolve(), None)
    if lock is not None:
        os.close(lock)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()
