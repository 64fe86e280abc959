"""Rows of Parquet and Arrow files, and of data sets that the `datasets` library loads."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from clara_hf.data.files import DataError


HUB = "hf://datasets/"
SAVED = ("state.json", "dataset_dict.json")  # what `save_to_disk` writes
WORKER = Path(__file__).with_name("table_worker.py")


def read_table(path: str | Path, columns: tuple[str, ...] = ()) -> Iterator[dict[str, Any]]:
    """Rows of a Parquet or Arrow file, decoded and checked in a process of their own, a few in memory at a time.

    Args:
        path: taken literally.
        columns: those to read, where the file has any of them; default: all.

    Raises:
        DataError: the file cannot be read, or is damaged; also where decoding it ends the process.
    """
    # Imported here: reading text does not need it.
    import pyarrow

    number, worker = 0, None
    try:
        open(path, "rb").close()
        command = [sys.executable, str(WORKER), os.path.abspath(path), *columns]
        worker = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        for batch in _received(worker):
            for row in batch.to_pylist():
                number += 1
                yield row
        if worker.wait():
            said = (worker.stderr.read() if worker.stderr else b"").decode(errors="replace").strip().splitlines()
            ended = f"decoding it ended the process by signal {-worker.returncode}"
            raise DataError(_damaged(path, number, ended if worker.returncode < 0 else " ".join(said[-1:])))
    except (pyarrow.ArrowException, ValueError, OverflowError, OSError) as error:
        if isinstance(error, DataError):
            raise
        if isinstance(error, OSError) and error.errno is not None:
            raise DataError(f"{path}: the file cannot be read ({error.strerror}).") from error
        raise DataError(_damaged(path, number, _reason(error))) from error
    finally:
        if worker is not None:
            with worker:  # waits for its end, and closes its pipes
                worker.kill()


def _received(worker):
    import pyarrow

    try:
        yield from pyarrow.ipc.open_stream(worker.stdout)
    except (pyarrow.ArrowException, OSError):
        # Half a batch, or none at all: why is in the worker's exit.
        if not worker.wait():
            raise


def _damaged(path, number, reason):
    return f"{path}, after row {number}: the file is damaged, or no table ({reason.rstrip('.')})."


def read_saved(source: str, place: str, split: str | None) -> Iterator[dict[str, Any]]:
    """Rows of a data set that `save_to_disk` wrote to the folder `place`."""
    with _plain(place) as plain:
        with told(source):
            found = _datasets().load_from_disk(plain)
        yield from _rows(source, _chosen(source, found, split))


def read_hub(source: str, place: str, config: str | None, split: str | None) -> Iterator[dict[str, Any]]:
    """Rows of a data set on the Hub, streamed."""
    name, _, revision = place.removeprefix(HUB).partition("@")
    with told(source):
        found = _datasets().load_dataset(name, config, revision=revision or None, streaming=True)
    yield from _rows(source, _chosen(source, found, split))


def hub_commit(source: str, place: str) -> str:
    """`"commit:"` and the commit of a data set on the Hub."""
    from huggingface_hub import dataset_info

    name, _, revision = place.removeprefix(HUB).partition("@")
    with told(source):
        return f"commit:{dataset_info(name, revision=revision or None).sha}"


@contextmanager
def folder_files(source: str, place: str, config: str | None, split: str | None) -> Iterator[tuple[str, list[str]]]:
    """The data files of a split in a folder laid out like a repository of the Hub, with the folder they are in."""
    with _plain(place) as plain:
        with told(source):
            found = _datasets().load_dataset_builder(plain, config).config.data_files
        yield plain, [str(path) for path in _chosen(source, dict(found), split)]


@contextmanager
def _plain(place: str) -> Iterator[str]:
    """The folder under a path that `datasets` takes for nothing but a path: through links, should its own have signs of
    patterns or of addresses.
    """
    place = os.path.abspath(place)
    if not any(sign in place for sign in ("*", "?", "[", "]", "{", "}", "::", "://")):
        yield place
        return
    with tempfile.TemporaryDirectory() as scratch:
        for folder, _, names in os.walk(place):
            beside = os.path.join(scratch, os.path.relpath(folder, place))
            os.makedirs(beside, exist_ok=True)
            for name in names:
                os.symlink(os.path.join(folder, name), os.path.join(beside, name))
        yield scratch


def _datasets():
    # Imported here: reading a JSONL file does not need it.
    import datasets

    return datasets


@contextmanager
def told(source: str) -> Iterator[None]:
    """Whatever `datasets` raises, down to errors of its file systems, as one sentence."""
    try:
        yield
    except Exception as error:
        raise DataError(f"{source}: the data set cannot be loaded ({_reason(error)}).") from error


def _chosen(source, found, split):
    if isinstance(found, dict):
        splits = ", ".join(map(str, found))
        if split is None and len(found) > 1:
            raise DataError(f"{source}: it has the splits {splits}: add #SPLIT to its name.")
        if split is not None and split not in found:
            raise DataError(f"{source}: there is no split {split!r}, it has {splits}.")
        return found[split or next(iter(found))]
    if split is not None:
        raise DataError(f"{source}: it was saved without splits: leave #{split} out.")
    return found


def _rows(source, found):
    number, rows = 0, iter(found)
    while True:
        try:
            row = next(rows)
        except StopIteration:
            return
        except Exception as error:
            raise DataError(f"{source}, after row {number}: it cannot be read ({_reason(error)}).") from error
        number += 1
        yield row


def _reason(error):
    cause = error.__cause__ or error
    # The second line of some names what there is to choose from.
    lines = [line.strip() for line in str(cause).strip().splitlines()[:2]]
    return " ".join(lines).rstrip(".") or type(cause).__name__
