"""`clara store`: a memory store built, fitted, searched and looked after from the command line."""

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path

from clara_hf.data.sources import read_rows
from clara_hf.program.errors import UsageError
from clara_hf.program.models import ModelSource, load_clara

from .copies import locate
from .encoding import FORMS
from .store import MemoryStore


CHUNK = 50_000


def parser() -> argparse.ArgumentParser:
    """All commands and their options."""
    made = argparse.ArgumentParser(prog="clara store", description=__doc__)
    commands = made.add_subparsers(dest="command", required=True)

    def command(name: str, told: str, needs_model: bool | None = None) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=told, description=told)
        added.add_argument("store", help="Folder or s3://... of the store; to read, also hf://datasets/...")
        if needs_model is not None:
            added.add_argument("--model", required=needs_model, help="CLaRa checkpoint: folder or Hub id.")
            added.add_argument("--device", help="Such as cuda:0; the accelerator if there is one, by default.")
        return added

    build = command("build", "Compress the documents that a store lacks; run it again to resume.", True)
    build.add_argument("--documents", required=True, help="JSONL, JSON, CSV, Parquet, text, or a Hub data set.")
    build.add_argument("--text", default="text", help="Field with the document (default: text).")
    build.add_argument("--columns", nargs="*", default=[], help="Fields that are kept beside each document.")
    build.add_argument("--form", default="auto", choices=("auto", *FORMS), help="In which memories are stored.")
    build.add_argument("--batch_size", type=int, default=64, help="Documents per forward pass.")
    build.add_argument("--limit", type=int, help="Only the first so many documents.")
    build.add_argument(
        "--chunk_size", type=int, default=CHUNK, help=f"Documents taken in at a time (default: {CHUNK})."
    )
    build.add_argument(
        "--engine", default="local", choices=("local", "ray"), help="Who compresses: this process, or a Ray cluster."
    )
    build.add_argument("--actors", type=int, help="With ray: how many; one for each GPU, or each CPU, by default.")
    fit = command("fit", "Fit search, and a fitted form, to what is stored.")
    fit.add_argument(
        "--form", default="auto", choices=("auto", *FORMS), help="Store memories in this form from then on."
    )
    fit.add_argument("--seed", type=int, default=0, help="Of the samples.")
    fit.add_argument("--texts", action="store_true", help="Only make an index of the texts, for `search --hybrid`.")
    search = command("search", "Find documents; one JSON object per question.", True)
    search.add_argument("questions", nargs="+", metavar="QUESTION")
    search.add_argument("--top_k", type=int, default=5, help="Documents for each question (default: 5).")
    search.add_argument("--filter", help="SQL condition over columns, such as \"title LIKE 'A%%'\".")
    search.add_argument("--exact", action="store_true", help="Score every stored memory.")
    search.add_argument("--hybrid", action="store_true", help="Let BM25 over the texts count too (fit --texts first).")
    command("compact", "Join small files and remove old versions.")
    command("unlock", "Let others write to a store in object storage whose writer was killed.")
    command("stats", "Print counts and sizes as JSON.")
    verify = command("verify", "Read everything and compare it with what was written.", False)
    verify.add_argument("--repair", action="store_true", help="Make anew what is damaged; memories need --model.")
    return made


def main(arguments: list[str] | None = None) -> int:
    """The command line; returns the exit code, 1 where `verify` leaves damage.

    Raises:
        UsageError, ValueError, OSError: one sentence each for the user.
    """
    options = parser().parse_args(arguments)
    on_ray = options.command == "build" and options.engine == "ray"
    # With Ray, this process has the model to tell whose store it is, and its tokenizer to check documents.
    device = "cpu" if on_ray else options.device if "device" in options else None
    model = _load(options.model, device) if "model" in options and options.model else None
    place, _ = locate(options.store)
    if options.command != "build" and isinstance(place, Path) and not place.is_dir():
        raise UsageError(f"there is no memory store at {options.store}: build it with `clara store build`.")
    store = MemoryStore.open(options.store, model, form=options.form if options.command == "build" else "auto")
    return COMMANDS[options.command](store, options) or 0


def _load(name: str, device: str | None):
    import torch

    model = load_clara(ModelSource(name)).eval()
    chosen = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return model.to(device or chosen or "cpu")


def _build(store: MemoryStore, options: argparse.Namespace) -> None:
    for name in ("batch_size", "chunk_size", "actors"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise UsageError(f"--{name} {value}: it must be at least 1.")
    actors = None
    if options.engine == "ray":
        try:
            from .actors import RayActors
        except ImportError as error:
            raise UsageError(f"--engine ray: {error}.") from error
        actors = RayActors(partial(_load, options.model, options.device), options.actors)
    elif options.actors is not None:
        raise UsageError(f"--actors {options.actors}: only --engine ray has actors.")
    count = 0
    rows = _documents(options)
    while part := list(islice(rows, options.chunk_size)):
        columns = {name: [row.get(name) for row in part] for name in options.columns}
        for name, values in columns.items():
            if all(value is None for value in values):
                raise UsageError(f"--columns {name}: no document from {count} on has it; they have {sorted(part[0])}.")
        try:
            store.add([row[options.text] for row in part], columns, options.batch_size, actors=actors)
        except ValueError as error:
            raise UsageError(f"--documents {options.documents}, from document {count} on: {error}") from error
        count += len(part)
    print(f"{store.path}: {len(store)} documents, {count} given.")


def _documents(options: argparse.Namespace) -> Iterator[dict]:
    for number, row in islice(read_rows(options.documents), options.limit):
        if options.text not in row:
            raise UsageError(
                f"--text {options.text}: row {number} of {options.documents} has no such field, it has {sorted(row)}."
            )
        yield row


def _fit(store: MemoryStore, options: argparse.Namespace) -> None:
    if options.texts:
        store.index_texts()
        return
    print(json.dumps(store.fit(options.form, options.seed), indent=2))


def _search(store: MemoryStore, options: argparse.Namespace) -> None:
    found = store.search(options.questions, options.top_k, options.exact, options.filter, hybrid=options.hybrid)
    for row, question in enumerate(options.questions):
        names = {"key": found.keys, "score": found.scores.tolist(), "text": found.texts, **found.columns}
        hits = [
            dict(zip(names, values, strict=True))
            for values in zip(*(each[row] for each in names.values()), strict=True)
        ]
        print(json.dumps({"question": question, "documents": hits}, ensure_ascii=False, default=str))


def _compact(store: MemoryStore, options: argparse.Namespace) -> None:
    store.compact()
    _stats(store, options)


def _unlock(store: MemoryStore, options: argparse.Namespace) -> None:
    store.unlock()


def _stats(store: MemoryStore, options: argparse.Namespace) -> None:
    print(json.dumps(store.stats(), indent=2))


def _verify(store: MemoryStore, options: argparse.Namespace) -> int:
    report = store.verify(options.repair)
    json.dump(dataclasses.asdict(report), sys.stdout, indent=2, ensure_ascii=False)
    print()
    if options.repair and not report.is_sound:
        return 1 if report.unrepaired or report.lost or not store.verify().is_sound else 0
    return 0 if report.is_sound else 1


COMMANDS = {
    "build": _build,
    "fit": _fit,
    "search": _search,
    "compact": _compact,
    "unlock": _unlock,
    "stats": _stats,
    "verify": _verify,
}
