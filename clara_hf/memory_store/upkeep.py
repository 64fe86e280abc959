"""What is done to a whole memory store: fitting its codes and its search, checking and mending it, counting."""

import json
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import torch
from torch.nn.functional import normalize
from tqdm.auto import tqdm
from transformers.utils import logging

from .build import compress_batch
from .encoding import FITTED, Form
from .fitting import Moments, documents_needed, fit
from .search import FEWEST_DOCUMENTS, SAMPLE_BYTES, SKETCH_SAMPLE, Sketch
from .table.layout import SIDE_FOLDER, CorruptMemoryError, code_column, form_in
from .table.rows import Rows
from .table.snapshot import unpacked


logger = logging.get_logger(__name__)

FIT_FILE = "fit.json"
GOOD_SHARE = 0.98
HELD_OUT = 200
# Of a held-out question, in the length of the memory that it is made from.
NOISE = 0.7
MOMENT_SAMPLE = 50_000
BATCH_SIZE = 64


@dataclass
class Report:
    """What [`verify`] found.

    Attributes:
        rows: how many were read.
        damaged: by key, the names of its columns that are not what was written.
        files: files that are damaged, and what that means.
        lost: rows whose files are gone or cannot be read, so that not even their keys are known.
        repaired: keys that were made anew, all columns included.
        unrepaired: keys that are damaged still, or were removed, and why.
    """

    rows: int = 0
    damaged: dict[str, list[str]] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    lost: int = 0
    repaired: list[str] = field(default_factory=list)
    unrepaired: dict[str, str] = field(default_factory=dict)

    @property
    def is_sound(self) -> bool:
        return not (self.damaged or self.files or self.lost)


def fit_store(store, form: str, seed: int, show_progress: bool, asked: torch.Tensor | None = None) -> dict:
    """See [`MemoryStore.fit`]; `asked` are questions `[B, width]` of length 1."""
    table, searcher = store._table, store._searcher
    count = len(table)
    if count < FEWEST_DOCUMENTS:
        raise ValueError(
            f"a sketch needs at least {FEWEST_DOCUMENTS} documents, and the store at {table.path} has {count}: it is "
            "searched exactly, which takes no time at this size"
        )
    needed = documents_needed(store.maker.hidden_size)
    if form in FITTED and store.form == "none" and count < needed:
        raise ValueError(
            f"form {form!r} needs at least {needed} documents at hidden size {store.maker.hidden_size}, and the store "
            f"at {table.path} has {count}: add more, or use a rotated form, which needs none"
        )
    rng = np.random.default_rng(seed)
    most = max(FEWEST_DOCUMENTS, SAMPLE_BYTES // (4 * store.maker.width))
    sketch = Sketch.fit(_sample(store, min(SKETCH_SAMPLE, most), rng))
    kind, questions = ("memories with noise", _held_out(store, rng)) if asked is None else ("given", asked)
    recodes = form != store.form
    before = searcher.search(questions, 5, True, None)[1] if recodes else None
    digest = table.write_basis("sketch", {"basis": sketch.basis.contiguous()})
    with table.changing():
        if table.sketch_column != f"sketch_{digest}":
            table.add_sketches(digest, sketch.dims, lambda stored: _sketches(sketch, table.form, stored))
    if recodes and form in FITTED:
        _fit_form(store, form, rng, show_progress)
    elif recodes:
        store.recode(form)
    with table.changing():
        searcher.bring_index_up(least=1)
    found, truth = (searcher.search(questions, 5, exact, None)[1] for exact in (False, True))
    share = _share(found, truth)
    measured = {"documents": count, "form": store.form, "questions": len(questions), "kind": kind}
    measured["share_of_exact_top_5"] = share
    if before is not None:
        measured["share_of_exact_top_5_before_recoding"] = _share(found, before)
    table.write_side_file(FIT_FILE, json.dumps({"sketch": digest, **measured}).encode())
    if share < GOOD_SHARE:
        logger.warning(
            f"search finds {share:.3f} of the exact top 5 in {table.path} ({len(questions)} questions, {kind}; "
            f"{GOOD_SHARE} and more is usual): search with exact=True where that matters"
        )
    return measured


def _sample(store, most: int, rng: np.random.Generator) -> torch.Tensor:
    """Memories `[n, width]` of rows drawn evenly."""
    snapshot = store._table.snapshot()
    rows = np.sort(rng.permutation(len(snapshot.keys))[:most])
    rows = rows[np.argsort(snapshot.offsets[rows])]
    return store._read(unpacked(snapshot.keys[rows]), snapshot.offsets[rows])


def _sketches(sketch: Sketch, form: Form, stored: np.ndarray) -> np.ndarray:
    return sketch.of_memories(form.decode(torch.from_numpy(stored.copy()))).numpy()


def _share(found: list[list[str]], truth: list[list[str]]) -> float:
    """The mean share of `truth` that was found."""
    return sum(len(set(keys) & set(right)) / len(right) for keys, right in zip(found, truth, strict=True)) / len(found)


def _held_out(store, rng: np.random.Generator) -> torch.Tensor:
    """Memories with noise, of length 1, as questions."""
    memories = normalize(_sample(store, HELD_OUT, rng).float(), dim=1)
    noise = torch.from_numpy(rng.standard_normal(memories.shape, dtype=np.float32))
    # In the directions that memories have, as a question's: white noise is orthogonal to all of them.
    others = memories[torch.from_numpy(rng.permutation(len(memories)))]
    return normalize(memories + NOISE * normalize(others + 0.3 * normalize(noise, dim=1), dim=1), dim=1)


def _fit_form(store, form: str, rng: np.random.Generator, show_progress: bool) -> None:
    table, maker = store._table, store.maker
    device = "cpu" if store.model is None else store.model.device
    moments = Moments(maker.num_memory_tokens, maker.hidden_size, device)
    snapshot = table.snapshot()
    rows = rng.permutation(len(snapshot.keys))[:MOMENT_SAMPLE]
    offsets = snapshot.offsets[rows]
    with tqdm(total=len(rows), desc="Gathering moments", unit="doc", disable=not show_progress, delay=2) as bar:
        for keys, places in table.blocks(offsets):
            memories = store._read(unpacked(keys), places).to(device)
            moments.add(memories.unflatten(1, (maker.num_memory_tokens, maker.hidden_size)))
            bar.update(len(keys))
    digest = table.write_basis("fitted", fit(moments, FITTED[form]))
    store._recode(code_column(form, digest))


def verify_store(store, repair: bool, show_progress: bool) -> Report:
    """See [`MemoryStore.verify`]."""
    table, report = store._table, Report()
    report.files |= dict.fromkeys(table.deletions.damaged(again=True), "which rows are deleted: a copy is kept")
    if report.files and not repair:
        return report  # what else is read would be other rows
    if report.files:
        store._check_writable("to repair")
        with table.parts.lock(exclusive=True):
            table.deletions.mend()
    table.refresh()
    for piece in table.snapshot().unreadable:
        report.lost += piece.stop - piece.start
        report.files |= dict.fromkeys(filter(None, piece.files), "its rows cannot be read: add their documents again")
    _check_side_files(store, report)
    is_decodable = not any(Path(name).name.startswith("fitted-") for name in report.files)
    if not is_decodable and repair and store.model is not None:
        store._check_writable("to repair")
        _compress_all_anew(store, report, show_progress)
        is_decodable = True
    if is_decodable:
        with tqdm(total=len(table), desc="Reading", unit="doc", disable=not show_progress, delay=2) as bar:
            for keys, offsets in table.blocks():
                report.damaged |= table.damage(unpacked(keys), offsets)
                report.rows += len(keys)
                bar.update(len(keys))
    if repair and not report.is_sound:
        store._check_writable("to repair")
        _repair(store, report)
    return report


def _check_side_files(store, report: Report) -> None:
    table = store._table
    for column in (table.memory_column, table.sketch_column):
        kind, _, digest = (column or "").rpartition("_")
        name = f"{'sketch' if kind == 'sketch' else 'fitted'}-{digest}.safetensors"
        if digest and (kind == "sketch" or kind.startswith("code_fitted")):
            try:
                table.read_side_file(name, digest)
            except CorruptMemoryError as error:
                report.files[f"{SIDE_FOLDER}/{name}"] = str(error)
    for path in table.deletions.damaged_copies():
        report.files[f"{SIDE_FOLDER}/{path.name}"] = "a copy of which rows are deleted: it can be made anew"
    for path in store._searcher.damaged_indexes():
        report.files[f"{SIDE_FOLDER}/{path.name}"] = "the search index: it can be made anew"
    for name in table.texts.damaged(again=True):
        report.files[name] = "the full-text index: it can be made anew"


def _repair(store, report: Report) -> None:
    """Makes anew what is damaged, where the text is there; rows without a text are removed, and named."""
    table = store._table
    # With its basis, sketches and index are gone: search is exact until fit().
    broken = [name for name in report.files if Path(name).name.startswith("sketch-")]
    without_text = [key for key, names in report.damaged.items() if "text" in names]
    with table.changing():
        if broken:
            table.drop_sketches(table.sketch_columns)
        store._searcher.remove_damaged_indexes()
        for path in table.deletions.damaged_copies():
            path.unlink()
        if table.texts.damaged():
            table.texts.make()
        table.remove(without_text)
        whole = {key: names for key, names in report.damaged.items() if key in store}
        texts, columns = _intact_values(store, list(whole), whole)
    store._searcher.forget()
    report.unrepaired = dict.fromkeys(without_text, "its text is damaged: it was removed; add its document again")
    if store.model is None:
        report.unrepaired |= dict.fromkeys(whole, "a model is needed: open the store with the model that made it")
    elif whole:
        store.add(texts, columns, show_progress=False, verify="all")
        for key, names in whole.items():
            gone = [name for name in names if name in columns]
            if gone:
                report.unrepaired[key] = f"its {', '.join(gone)} were damaged and are None now: give them again"
            else:
                report.repaired.append(key)
    with table.changing():
        store._searcher.bring_index_up()


def _compress_all_anew(store, report: Report, show_progress: bool) -> None:
    """Without the bases of a fitted form, no code can be read: all memories are made from their texts, and fitted."""
    table = store._table
    form, keys = form_in(table.memory_column)[0], list(store)
    plain = table.form_of("memory")

    def encode(keys: list[str], offsets: np.ndarray) -> np.ndarray:
        texts = table.columns(keys, offsets, ["text"])["text"]
        made = []
        for start in range(0, len(texts), BATCH_SIZE):
            part = slice(start, start + BATCH_SIZE)
            made.append(plain.encode(compress_batch(store.model, table, texts[part], offsets[part])[0]).cpu())
        return torch.cat(made).numpy()

    with table.changing():
        table.recode("memory", encode)
    fit_store(store, form, 0, show_progress)
    report.repaired += keys


def _intact_values(store, keys: list[str], damaged: dict[str, list[str]]) -> tuple[list[str], dict[str, list]]:
    """Texts and columns of rows; None for values that are damaged."""
    table = store._table
    columns: dict[str, list] = {name: [] for name in table.column_names}
    for key in keys:
        offsets = table.find([key])
        for name, values in columns.items():
            values += [None] if name in damaged[key] else table.columns([key], offsets, [name])[name]
    return columns.pop("text"), columns


def stats_of(store) -> dict:
    """See [`MemoryStore.stats`]."""
    table = store._table
    snapshot = table.snapshot()
    sizes: Counter = Counter()
    for path in table.path.rglob("*") if table.remote is None else ():
        if path.is_file() and (table.frozen or not path.is_symlink()):
            sizes[path.relative_to(table.path).parts[0]] += path.stat().st_size
    count, searcher = len(table), store._searcher
    index = searcher.index()
    return {
        "documents": count,
        "form": store.form,
        "dtype": table.dtype,
        "format": table.format,
        "version": snapshot.version,
        "files": sum(len(piece.files) for piece in snapshot.pieces),
        "bytes": dict(sizes),
        "bytes_per_document": sum(sizes.values()) / count if count and sizes else None,
        "bytes_per_memory": table.form.size * table.form.numpy_type.itemsize,
        "sketch_dims": None if searcher.sketch is None else searcher.sketch.dims,
        "indexed": 0 if index is None else int((index.offsets(index.ids, table) >= 0).sum()),
        "waiting_parts": table.parts.are_waiting(),
        "texts_indexed": bool(table.texts.indexes()),
        "columns": table.column_names,
        "fit": _read_fit(table),
        "maker": str(store.maker),
    }


def _read_fit(table: Rows) -> dict | None:
    try:
        (file,) = table.side_files(FIT_FILE)
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def export(store, path: Path) -> int:
    """See [`MemoryStore.export_sketch`]."""
    table, sketch = store._table, store._searcher.needed_sketch()
    schema, writer, count = None, None, 0
    try:
        for some, offsets in table.blocks():
            keys = unpacked(some)
            rows = table.verified(keys, offsets, table.sketch_column).astype(np.float32)
            columns = table.columns(keys, offsets, table.column_names)
            vectors = pa.FixedSizeListArray.from_arrays(pa.array(rows.reshape(-1)), sketch.dims)
            types = table.snapshot().dataset.schema
            others = {name: pa.array(values, types.field(name).type) for name, values in columns.items()}
            part = pa.table({"key": pa.array(keys), "sketch": vectors, **others})
            if writer is None:
                schema = part.schema
                writer = pyarrow.parquet.ParquetWriter(str(path), schema)
            writer.write_table(part)
            count += len(keys)
    finally:
        if writer is not None:
            writer.close()
    return count
