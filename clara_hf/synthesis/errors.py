"""Errors of data synthesis; this package imports no torch, so that its process stays small."""

import sqlite3
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path


LIBRARIES = ("aiohttp", "jinja2", "json_repair", "pydantic", "sentencex", "py3langid", "datasets", "tqdm")


class UsageError(ValueError):
    """The run cannot be carried out, or not go on, as it was asked for; the message says how to mend it."""


class RequestFailed(Exception):
    """One request has no usable reply, whatever is tried; the message is the reason that goes into the data."""


def check_installed() -> None:
    """See whether the libraries of the extra `synthesis` are there, before they are imported.

    Raises:
        SystemExit: one is not; the message has the command that installs it.
    """
    missing = [name for name in LIBRARIES if find_spec(name) is None]
    if missing:
        sys.exit(f'{Path(sys.argv[0]).name}: {", ".join(missing)} not found: run `pip install ".[synthesis]"`.')


def run_program(main: Callable[[list[str] | None], None]) -> None:
    """Run a recipe as a program: what the user can mend is one sentence on stderr and a non-zero exit code."""
    name = Path(sys.argv[0]).name
    try:
        main(None)
    except KeyboardInterrupt:
        sys.exit(f"{name}: interrupted; the same command goes on where it stopped.")
    except (ValueError, OSError, sqlite3.Error) as error:
        text = " ".join(str(error).split()) or type(error).__name__
        if "No space left" in text or "disk is full" in text:
            text = f"the disk is full ({text}): free some space and run the same command again."
        sys.exit(f"{name}: {text}")
