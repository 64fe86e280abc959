"""Files that a reader never sees half written."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from clara_hf.program.errors import UsageError


PARTIAL = ".partial"


@contextmanager
def written_beside(path: str | Path) -> Iterator[Path]:
    """A path beside `path` to write to: renamed to it at the end, removed where writing failed.

    Example:

        with written_beside("out/table.md") as beside:
            beside.write_text("| a |", encoding="utf-8")
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + PARTIAL)
    try:
        yield beside
        os.replace(beside, path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


@contextmanager
def new_folder(path: str | Path) -> Iterator[str]:
    """A folder beside `path` to write to, which becomes `path` when the block is done, and vanishes if it is not.

    Raises:
        UsageError: `path` exists and is not an empty folder.
    """
    out = os.path.abspath(path)
    if os.path.exists(out) and not (os.path.isdir(out) and not os.listdir(out)):
        raise UsageError(f"{out} exists: remove it, or name another folder.")
    beside = f"{out}{PARTIAL}-{os.getpid()}"
    os.makedirs(beside)
    try:
        yield beside
        os.replace(beside, out)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 beside, then rename."""
    with written_beside(path) as beside:
        beside.write_text(text, encoding="utf-8")


def write_json(path: str | Path, values: Any) -> None:
    """Write JSON beside, then rename."""
    write_text(path, json.dumps(values, indent=2, ensure_ascii=False) + "\n")


def read_json(path: str | Path) -> Any:
    """The content of a JSON file.

    Raises:
        UsageError: it is no JSON; the message names the file.
        OSError: it cannot be read.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{path} is no valid JSON ({error}).") from error
