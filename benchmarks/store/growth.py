"""A memory store from ten thousand to a million documents: what fitting, adding, searching and compacting cost.

    python benchmarks/store/growth.py --documents 1000000 --form fitted1 --folder FOLDER --output_file store.json
    python benchmarks/store/growth.py --search FOLDER/store --documents 1000000 --output_file search.json
    python benchmarks/store/growth.py --reads --documents 6000 --form none --output_file reads.json

They make synthetic memories of `--slots` vectors of `--hidden` values: a document is a latent vector of 192
normal values with variances that fall as 1/rank, mapped linearly to all slots, beside noise of a tenth of its power
whose variances fall likewise in each slot: the sum of two of 512 drawn noises, with random signs. A question is a
document's memory with noise in the latent vector. The first adds documents as a user does until it can fit, and fits;
the rest it codes from the latent vector and the noises, turned once into code space, which is linear: the same codes
without the 4 ms that turning each document takes at Mistral's width. Searches are measured in a process of their own
that only opens the store, as the second does.
"""

import copy
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import psutil
import torch

from clara_hf.memory_store import MemoryStore
from clara_hf.memory_store.encoding import FORMS, hadamard
from clara_hf.memory_store.fitting import documents_needed
from clara_hf.program import option, parse, run_program, write_json


LATENT = 192
NOISES = 512


@dataclass
class GrowthArguments:
    """What is measured."""

    output_file: str = option(help="JSON file for the figures.", aliases="--out")
    documents: int = 1_000_000
    slots: int = 16
    hidden: int = 4096
    form: str = option("fitted1", choices=FORMS)
    questions: int = 200
    scanned: int = option(50, "Questions that are searched exactly too.")
    reads: bool = option(False, "Measure reads of a store, not its growth.")
    search: str | None = option(None, "Only search this store, made before.")
    folder: str | None = option(None, "Where stores are made, and kept; a temporary folder by default.")
    plot: str | None = option(None, "PNG of what queries, additions and documents cost at each size.")


class SyntheticModel:
    """Makes a document's memory from the number in its text."""

    def __init__(self, slots: int, hidden: int):
        self.config = SimpleNamespace(
            num_memory_tokens=slots, hidden_size=hidden, doc_max_length=256, base_model_name_or_path=None
        )
        self.dtype, self.device = torch.bfloat16, torch.device("cpu")
        generator = torch.Generator().manual_seed(0)
        spectrum = torch.arange(1, LATENT + 1).rsqrt().unsqueeze(1)
        spread = torch.arange(1, hidden + 1).rsqrt() / torch.arange(1, hidden + 1).rsqrt().norm() * hidden**0.5
        noise = hadamard(torch.randn(NOISES, slots, hidden, generator=generator) * spread).flatten(1)
        self.directions = torch.randn(LATENT, slots * hidden, generator=generator) * spectrum / spectrum.norm()
        self.noises = 0.3 * 0.5**0.5 * noise
        self.mean = 0.5 * torch.randn(slots * hidden, generator=generator)

    def compressor_fingerprint(self) -> str:
        return "synthetic"

    def named_parameters(self) -> list:
        return []

    def compress(self, documents: list[str], batch_size: int) -> torch.Tensor:
        parts = drawn([int(document.split()[1]) for document in documents])
        return self._shaped(mixed(parts, self.directions, self.noises, self.mean)).bfloat16()

    def encode_questions(self, questions: list[str], batch_size: int) -> torch.Tensor:
        numbers = [int(question.split()[1]) for question in questions]
        latent, *noise = drawn(numbers)
        shift = np.stack([np.random.default_rng([number, 1]).standard_normal(LATENT) for number in numbers])
        parts = latent + 0.7 * torch.from_numpy(shift).float(), *noise
        return self._shaped(mixed(parts, self.directions, self.noises, self.mean))

    def _shaped(self, memories: torch.Tensor) -> torch.Tensor:
        return memories.unflatten(1, (self.config.num_memory_tokens, self.config.hidden_size))


def drawn(numbers: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Latent vectors `[n, LATENT]` of documents, and the numbers and signs of their two noises, both `[n, 2]`."""
    rngs = [np.random.default_rng(number) for number in numbers]
    latent = np.stack([rng.standard_normal(LATENT, dtype=np.float32) for rng in rngs])
    noise = np.stack([rng.integers(0, 2 * NOISES, 2) for rng in rngs])
    return torch.from_numpy(latent), torch.from_numpy(noise // 2), torch.from_numpy(2.0 * (noise % 2) - 1).float()


def mixed(parts: tuple, directions: torch.Tensor, noises: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """Memories, or what a linear map makes of them if it was applied to the other arguments."""
    latent, rows, signs = parts
    made = torch.addmm(mean, latent, directions)
    for place in (0, 1):
        made.addcmul_(noises[rows[:, place]], signs[:, place : place + 1])
    return made


class Shortcut:
    """Adds documents to a fitted store of synthetic memories without their way through memory space."""

    def __init__(self, store: MemoryStore):
        self._table, model = store._table, store.model
        self._form, basis = copy.copy(self._table.form), store._searcher.sketch.basis
        given = (model.directions, model.noises, model.mean.unsqueeze(0))
        turn = self._table.form.turn
        turned = [torch.cat([turn(some) for some in matrix.split(64)]) for matrix in given]
        self._form.turn = lambda parts: mixed(parts, *turned)
        self._sketched = [matrix @ basis for matrix in given]
        every = torch.cat(given)
        self._products = every @ every.T
        probe = list(range(64))
        values = [
            self._table.form.values(codes)
            for codes in (
                self._form.encode(Parts(drawn(probe))),
                self._table.form.encode(model.compress([f"document {number}" for number in probe], 64).flatten(1)),
            )
        ]
        nearness = torch.nn.functional.cosine_similarity(*values).min()
        assert nearness > 0.995, f"the shortcut's codes are only {nearness:.4f} near those of the form"

    def add(self, texts: list[str]) -> None:
        parts = []
        for start in range(0, len(texts), 16_384):
            some, codes, sketches = texts[start : start + 16_384], [], []
            for first in range(0, len(some), 512):
                part = Parts(drawn([int(text.split()[1]) for text in some[first : first + 512]]))
                codes.append(self._form.encode(part))
                sketches.append((mixed(part, *self._sketched) / self._lengths(part)).half())
            keys = [self._table.key_of(text) for text in some]
            made = [torch.cat(codes).numpy(), torch.cat(sketches).numpy()]
            parts += self._table.write_part(keys, some, made, {}, [])
        with self._table.parts.lock(exclusive=True):
            self._table.refresh()
            self._table.commit(parts)

    def _lengths(self, parts: tuple) -> torch.Tensor:
        latent, rows, signs = parts
        weights = torch.cat([latent, torch.zeros(len(latent), NOISES), torch.ones(len(latent), 1)], dim=1)
        weights.scatter_add_(1, LATENT + rows, signs)
        return ((weights @ self._products) * weights).sum(1, keepdim=True).sqrt()


class Parts(tuple):
    """What `drawn` gives, in the place of memories."""

    device = torch.device("cpu")


def grow(args: GrowthArguments, folder: Path) -> list[dict]:
    """Adds documents up to each size, and measures there; searches in a process of their own."""
    model = SyntheticModel(args.slots, args.hidden)
    store = MemoryStore.open(folder / "store", model, form=args.form)
    sizes = [size for size in (10_000, 100_000, 1_000_000, 10_000_000) if size < args.documents] + [args.documents]
    fitted = folder / "fitted.json"
    if not fitted.exists():
        texts = [f"document {number}" for number in range(max(sizes[0], documents_needed(args.hidden)))]
        start = time.perf_counter()
        keys = store.add(texts, batch_size=512, show_progress=False)
        figures = {"fitted_on": len(texts), "first_add_seconds": time.perf_counter() - start}
        start = time.perf_counter()
        figures["fit"] = store.fit(show_progress=False)
        figures["fit_seconds"] = time.perf_counter() - start
        if len(keys) > sizes[0]:
            store.delete(keys[sizes[0] :])
        fitted.write_text(json.dumps(figures))
    row = json.loads(fitted.read_text())
    print(json.dumps(row), flush=True)
    store._table.bring_up()
    shortcut, rows, added = Shortcut(store), [], len(store)
    for size in sizes:
        kept = folder / f"growth-{size}.json"
        if kept.exists():
            rows.append(json.loads(kept.read_text()))
            continue
        start = time.perf_counter()
        for first in range(added, size, 100_000):
            shortcut.add([f"document {number}" for number in range(first, min(first + 100_000, size))])
            store._tidy()
        row |= {"documents": size, "add_seconds": time.perf_counter() - start, "added": size - added}
        added = size
        start = time.perf_counter()
        store.compact()
        row["compact_seconds"] = time.perf_counter() - start
        command = [sys.executable, __file__, "--search", str(folder / "store"), "--documents", str(size)]
        settings = ["--slots", str(args.slots), "--hidden", str(args.hidden), "--questions", str(args.questions)]
        out = folder / f"search-{size}.json"
        subprocess.run([*command, *settings, "--output_file", str(out)], check=True)
        rows.append(row | json.loads(out.read_text()))
        kept.write_text(json.dumps(rows[-1]))
        print(json.dumps(rows[-1]), flush=True)
        row = {}
    return rows


def read_costs(args: GrowthArguments, folder: Path) -> dict:
    """Seconds of reading a batch's memories, 32 questions with 20 candidates each, and of adding what is stored."""
    store = MemoryStore.open(folder / "store", SyntheticModel(args.slots, args.hidden), form=args.form)
    texts = [f"document {number}" for number in range(args.documents)]
    keys = store.add(texts, batch_size=256, show_progress=False)
    rng = np.random.default_rng(0)

    def timed(call) -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    batches = [[keys[row] for row in rng.permutation(len(keys))[:640]] for _ in range(10)]
    figures = {
        "get_640": sorted(timed(lambda batch=batch: store.get(batch)) for batch in batches),
        "add_stored": timed(lambda: store.add(texts, show_progress=False)),
        "add_stored_verified": timed(lambda: store.add(texts, show_progress=False, verify="all")),
        "bytes_per_document": store.stats()["bytes_per_document"],
    }
    print(json.dumps(figures))
    return figures


def search_costs(args: GrowthArguments) -> dict:
    """Times, recall and resident memory of a process that opens a store and searches it."""
    model = SyntheticModel(args.slots, args.hidden)
    numbers = np.random.default_rng(1).integers(0, args.documents, args.questions)
    queries = torch.cat([model.encode_questions([f"question {number}"], batch_size=1) for number in numbers])
    before = psutil.Process().memory_info().rss
    start = time.perf_counter()
    store = MemoryStore.open(args.search, model)
    store.search(queries[:1])  # loads the index
    opened = time.perf_counter() - start
    seconds, cpu, found = [], [], []
    for query in queries:
        start, begun = time.perf_counter(), time.process_time()
        found += store.search(query.unsqueeze(0), top_k=5).keys
        seconds.append(time.perf_counter() - start)
        cpu.append(time.process_time() - begun)
    resident = psutil.Process().memory_info().rss - before
    some = queries[: args.scanned]
    start = time.perf_counter()
    exact = store.search(some, top_k=5, exact=True).keys if args.scanned else []
    scan = time.perf_counter() - start
    gold = [store.keys([f"document {number}"])[0] for number in numbers]
    stats = store.stats()
    return {
        "open_seconds": opened,
        "search_p50_ms": 1e3 * statistics.median(seconds),
        "search_p95_ms": 1e3 * float(np.quantile(seconds, 0.95)),
        "search_cpu_p50_ms": 1e3 * statistics.median(cpu),
        "search_cpu_p95_ms": 1e3 * float(np.quantile(cpu, 0.95)),
        "resident_mib_beside": resident / 2**20,
        "share_of_exact_top_5": float(
            np.mean([len(set(one) & set(other)) / 5 for one, other in zip(found, exact, strict=False)] or [np.nan])
        ),
        "own_document_in_top_5": float(np.mean([key in keys for key, keys in zip(gold, found, strict=True)])),
        f"exact_seconds_for_{args.scanned}": scan,
        "bytes_per_document": stats["bytes_per_document"],
        "bytes_per_memory": stats["bytes_per_memory"],
        "indexed": stats["indexed"],
    }


def plot_growth(rows: list[dict], path: str) -> None:
    """Draws what a query, an added document and a stored one cost at each size."""
    from matplotlib.figure import Figure

    lines = {
        "ms per query": {"median": "search_p50_ms", "95th percentile": "search_p95_ms"},
        "ms per added document": {"": "add_ms"},
        "bytes per document": {"": "bytes_per_document"},
    }
    rows = [row | {"add_ms": 1e3 * row["add_seconds"] / row["added"] if row["added"] else float("nan")} for row in rows]
    figure = Figure(figsize=(8, 2.4), layout="constrained")
    for axes, (title, series) in zip(figure.subplots(1, 3), lines.items(), strict=True):
        for label, name in series.items():
            axes.plot([row["documents"] for row in rows], [row[name] for row in rows], "o-", label=label)
        axes.set(
            xscale="log",
            xlabel="documents",
            title=title,
            ylim=(0, 1.1 * max(np.nanmax(line.get_ydata()) for line in axes.lines)),
        )
        if len(series) > 1:
            axes.legend(frameon=False)
    figure.savefig(path, dpi=110)


def main(arguments: list[str] | None = None) -> None:
    args = parse(GrowthArguments, arguments, description=__doc__)
    measure = read_costs if args.reads else grow
    if args.search:
        figures = search_costs(args)
    elif args.folder:
        figures = measure(args, Path(args.folder))
    else:
        with tempfile.TemporaryDirectory() as folder:
            figures = measure(args, Path(folder))
    if args.plot and measure is grow:
        plot_growth(figures, args.plot)
    write_json(args.output_file, figures)


if __name__ == "__main__":
    run_program(main)
