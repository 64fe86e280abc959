"""Errors of data synthesis; this package imports no torch, so that its process stays small."""

import sys
from importlib.util import find_spec
from pathlib import Path


LIBRARIES = ("aiohttp", "jinja2", "json_repair", "pydantic", "sentencex", "py3langid", "datasets", "tqdm")


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
