"""Memory stores in other places: copies in folders and in object storage, and data sets of the Hub."""

import os
import re
import shutil
from contextlib import ExitStack
from pathlib import Path
from uuid import uuid4

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, DatasetCardData, HfApi, snapshot_download

from clara_hf.program.paths import local_path

from .table.layout import FOLDERS, SIDE_FOLDER, CorruptMemoryError, is_blank
from .table.remote import Remote
from .table.table import MemoryTable


BUCKET = "s3://"
HUB = "hf://datasets/"
CARD = "README.md"
# Around the part of a card that every upload writes anew.
MARKS = "<!-- the store -->\n", "<!-- end of the store -->\n"


def locate(path: str | os.PathLike, revision: str | None = None) -> tuple[Path | str, bool]:
    """Where a store lies: a local folder or an address in object storage, and whether it is a download, to be read.

    What "hf://datasets/..." names is downloaded into the Hub's cache; without a connection, it is taken from there.

    Raises:
        ValueError: a path of another kind; a revision of what is not on the Hub.
        OSError: it cannot be downloaded.
    """
    text = os.fspath(path)
    if revision is not None and not text.startswith(HUB):
        raise ValueError(f"revision is {revision!r}, which only paths that begin with {HUB!r} have, not {text!r}")
    if text.startswith(HUB):
        return _download(text.removeprefix(HUB).rstrip("/"), revision), True
    if text.startswith(BUCKET):
        return text.rstrip("/"), False
    scheme = re.match("([a-z0-9]{2,}):/", text)
    if scheme:
        hint = f"; as a string, a pathlib.Path has lost a '/' of {text!r}" if isinstance(path, Path) else ""
        raise ValueError(f"path is {text!r}: a memory store is a local folder, or {BUCKET}... or {HUB}...{hint}")
    return local_path(path), False


def files_of(table: MemoryTable) -> list[str]:
    """The files of the version that is loaded, relative to the table's folder; the last one makes it a table.

    Raises:
        CorruptMemoryError: one is gone or damaged.
    """
    snapshot = table.snapshot()
    if snapshot.unreadable:
        raise CorruptMemoryError(
            f"files of the memory store at {table.path} are gone or cannot be read: call verify(repair=True) first"
        )
    digests = [(column or "").rpartition("_")[2] for column in (table.memory_column, table.sketch_column)]
    patterns = [f"fitted-{digests[0]}.*", f"sketch-{digests[1]}.*", f"index-{digests[1]}-*.faiss", "fit.json"]
    side = [f"{SIDE_FOLDER}/{file.name}" for pattern in patterns for file in table.side_files(pattern)]
    named = {name for piece in snapshot.pieces for name in piece.files}
    side += [f"{SIDE_FOLDER}/{copy.name}" for name, copy in table.deletions.copies() if name in named]
    # Lance numbers manifests backwards, so that the newest is the first in a listing; before, forwards.
    manifests = {f"_versions/{2**64 - 1 - snapshot.version:020}.manifest", f"_versions/{snapshot.version}.manifest"}
    if table.remote is None:
        manifests = {name for name in manifests if (table.path / name).exists()}
    else:
        manifests &= set(table.remote.names("_versions"))
    return [*(name for piece in snapshot.pieces for name in piece.files), *table.texts.files(), *side, *manifests]


def _held(table: MemoryTable, held: ExitStack) -> list[str]:
    """The files of the newest version, which stay while `held` is open."""
    if table.is_writable:
        table.bring_up()
        held.enter_context(table.parts.lock(exclusive=False))
    table.refresh()
    return files_of(table)


def copy_store(store, target: str | os.PathLike) -> None:
    """See [`MemoryStore.copy_to`]."""
    table: MemoryTable = store._table
    if os.fspath(target).startswith(HUB):
        raise ValueError(f"target is {target!r}: push_to_hub() uploads to the Hub")
    place, _ = locate(target)
    with ExitStack() as held:
        names = _held(table, held)
        if isinstance(place, Path):
            _copy_to_folder(table, names, place)
        else:
            _copy_to_remote(table, names, Remote(place))


def _copy_to_folder(table: MemoryTable, names: list[str], target: Path) -> None:
    if not is_blank(target) or (target.exists() and any(target.iterdir())):
        raise FileExistsError(f"target is {target}, where something is already: choose another folder")
    unfinished = target.with_name(f"{target.name}.{uuid4().hex}.unfinished")
    try:
        for name in names:
            (unfinished / name).parent.mkdir(parents=True, exist_ok=True)
            if table.remote is None:
                shutil.copyfile(table.path / name, unfinished / name)
            else:
                table.remote.download(name, unfinished / name)
        os.replace(unfinished, target)
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def _copy_to_remote(table: MemoryTable, names: list[str], target: Remote) -> None:
    if table.remote is not None:
        raise ValueError(f"the memory store at {table.path} is in object storage itself: copy it to a folder first")
    there = set(target.names())
    if any(name.startswith("_versions/") for name in there):
        raise FileExistsError(f"target is {target.url}, where a store is already: choose another address")
    for name in names:
        if name not in there or name.endswith("/fit.json"):  # others are named by what they hold, or at random
            target.upload(table.path / name, name)


# The Hub


def _download(name: str, revision: str | None) -> Path:
    try:
        folder = snapshot_download(
            name, repo_type="dataset", revision=revision, allow_patterns=[f"{folder}/*" for folder in FOLDERS]
        )
    except (OSError, ValueError) as error:
        reason = next(iter(str(error).splitlines()), "")
        which = f"{name} of revision {revision}" if revision else name
        raise OSError(f"the data set {which} cannot be downloaded from the Hub: {reason}") from error
    return Path(folder)


def push_store(store, repo_id: str, private, revision, license, token) -> str:
    """See [`MemoryStore.push_to_hub`]."""
    table: MemoryTable = store._table
    if table.remote is not None:
        raise ValueError(f"the memory store at {table.path} is in object storage: copy it to a folder first")
    api = HfApi(token=token)
    with ExitStack() as held:
        names = _held(table, held)
        repo_id = api.create_repo(repo_id, repo_type="dataset", private=private, exist_ok=True).repo_id
        if revision is not None:
            api.create_branch(repo_id, repo_type="dataset", branch=revision, exist_ok=True)
        there = api.list_repo_files(repo_id, repo_type="dataset", revision=revision)
        gone = [name for name in there if name.split("/")[0] in FOLDERS and name not in names]
        before = None
        if CARD in there:
            file = api.hf_hub_download(repo_id, CARD, repo_type="dataset", revision=revision)
            before = Path(file).read_text(encoding="utf-8")
        card = card_of(store, repo_id, license, before)
        operations = [
            *(CommitOperationAdd(name, str((table.path / name).resolve())) for name in names),
            *(CommitOperationDelete(name) for name in gone),
            CommitOperationAdd(CARD, card.encode()),
        ]
        commit = api.create_commit(
            repo_id,
            operations,
            commit_message=f"Memories of {len(store)} documents",
            repo_type="dataset",
            revision=revision,
        )
    return commit.commit_url


def card_of(store, repo_id: str, license: str | None, before: str | None = None) -> str:
    """A data set card that tells what the store holds, and how it is opened; of a card `before`, that part anew."""
    # Here, since it brings PEFT: seconds for each process that only reads.
    from modeling_clara.configuration_clara import is_hub_id

    maker, stats = store.maker, store.stats()
    facts = {
        "documents": f"{len(store):,}",
        "compressor": f"`{maker.fingerprint}`",
        "base": f"`{maker.base}`"
        if is_hub_id(maker.base)
        else f"`{Path(maker.base or 'unknown').name}`, a local model",
        "memory": f"{maker.num_memory_tokens} × {maker.hidden_size} values",
        "document length": f"at most {maker.doc_max_length} tokens",
        "form": f"`{store.form}` ({stats['dtype']}), {stats['bytes_per_memory']:,} bytes per memory",
        "sketch": f"{store.sketch_dims} dimensions" if store.sketch_dims else "none",
        "columns": ", ".join(f"`{name}`" for name in stats["columns"]),
    }
    table = "".join(f"| {name} | {value} |\n" for name, value in facts.items())
    part = (
        f"{MARKS[0]}Documents, and the memories that one CLaRa compressor made of them.\n\n| | |\n|---|---|\n{table}\n"
        "```python\nfrom clara_hf.memory_store import MemoryStore\n\n"
        f'store = MemoryStore.open("{HUB}{repo_id}", model)  # the model whose compressor is named above\n'
        'found = store.search(["A question?"], top_k=5)\n```\n\n'
        "The store is read where it was downloaded; `store.copy_to(folder)` makes one to which documents can be added."
        f"\n{MARKS[1]}"
    )
    if before is not None:
        start, _, rest = before.partition(MARKS[0])
        _, found, end = rest.partition(MARKS[1])
        return f"{start}{part}{end}" if found else before
    data = DatasetCardData(license=license, tags=["clara", "retrieval", "embeddings"])
    return f"---\n{data.to_yaml()}\n---\n\n# {repo_id.split('/')[-1]}\n\n{part}"
