"""What the service answers per second, and how long a client waits, on loopback.

    PYTHONPATH=recipes/nano python benchmarks/serving.py

Two services of one model run beside each other, one that answers waiting questions together and one that takes them
one by one, and are asked in turns by 1, 8 and 32 clients, each of which waits for its answer before it asks again.
Every answer is compared with what `model.generate` gives for that question alone: `lost` and `wrong` must be 0.
"""

import asyncio
import json
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import httpx
import torch
import world

from clara_hf.memory_store import MemoryStore
from clara_hf.program import option, parse, run_program
from clara_hf.program.models import ModelSource, load_trained


ROOT = Path(__file__).resolve().parents[1]
BATCHED, SINGLE = "micro-batches", "one by one"


@dataclass
class ServingArguments:
    model: str = option(str(ROOT / "recipes/nano/pretrained/joint"), "Checkpoint.")
    clients: list[int] = option(help="Concurrent clients.", default_factory=lambda: [1, 8, 32])
    requests: int = option(6, "Requests per client and run.")
    questions: int = option(96, "Distinct questions.")
    entities: int = option(40, "Documents of each kind in the collection.")
    max_batch: int = option(32, "Answers made at once by the batching service.")
    max_tokens: int = option(16, "Per answer.")
    repeats: int = option(3, "Runs of each case, in turns.")
    output: str = option("runs/benchmarks/serving.json", "JSON file for the figures.")


def make_collection(args: ServingArguments, model, path: Path) -> dict[str, str]:
    """Builds a store of the nano world's unseen split; returns questions with the answers of `model.generate`."""
    chance = random.Random(0)
    made = world.World("test", dict.fromkeys(world.KINDS, args.entities), chance)
    questions: dict[str, str] = {}
    while len(questions) < args.questions:
        questions[world.random_question(made, chance).text] = ""
    store = MemoryStore.open(path, model)
    memories = store.get(store.add([entity.document for entity in made.entities], show_progress=False))
    for question in questions:
        found = model.generate([question], memories=memories.to(model.dtype), max_new_tokens=args.max_tokens)
        questions[question] = found.texts[0]
    return questions


@contextmanager
def service(args: ServingArguments, store: Path, max_batch: int):
    """URL of a service in a process of its own."""
    command = [sys.executable, "-m", "clara_hf.cli", "serve", "--model", args.model, "--name", "m", "--port", "0"]
    command += ["--store", str(store), "--read-only", "--max-batch", str(max_batch)]
    quiet = {"stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL, "text": True, "cwd": ROOT}
    with subprocess.Popen(command, **quiet) as program:
        try:
            line = next((line for line in program.stdout if " at http" in line), None)
            if line is None:
                raise RuntimeError(f"the service did not start: {' '.join(command)}")
            yield line.split(" at ")[1].strip()
        finally:
            program.terminate()
            program.wait(60)


async def load(url: str, clients: int, args: ServingArguments, questions: dict[str, str], seed: int) -> dict:
    """One run: latencies of all answers in seconds, the time of the whole, and what was lost or wrong."""
    seconds, lost, wrong = [], 0, 0
    chance = random.Random(seed)

    async def client(own: list[str], http: httpx.AsyncClient) -> None:
        nonlocal lost, wrong
        for question in own:
            began = time.perf_counter()
            body = {"model": "m", "messages": [{"role": "user", "content": question}], "max_tokens": args.max_tokens}
            try:
                made = (await http.post("/v1/chat/completions", json=body)).raise_for_status().json()
            except httpx.HTTPError:
                lost += 1
                continue
            seconds.append(time.perf_counter() - began)
            wrong += made["choices"][0]["message"]["content"] != questions[question]

    limits = httpx.Limits(max_connections=clients, max_keepalive_connections=clients)
    async with httpx.AsyncClient(base_url=url, timeout=300, limits=limits) as http:
        plans = [chance.choices(list(questions), k=args.requests) for _ in range(clients)]
        began = time.perf_counter()
        await asyncio.gather(*(client(plan, http) for plan in plans))
    return {"seconds": seconds, "whole": time.perf_counter() - began, "lost": lost, "wrong": wrong}


def summary(runs: list[dict]) -> dict:
    waits = sorted(wait for run in runs for wait in run["seconds"])
    quantiles = statistics.quantiles(waits, n=100, method="inclusive")
    rates = [len(run["seconds"]) / run["whole"] for run in runs]
    return {
        "answers_per_second": statistics.median(rates),
        "p50_ms": 1000 * quantiles[49],
        "p95_ms": 1000 * quantiles[94],
        "p99_ms": 1000 * quantiles[98],
        "answers": len(waits),
        "lost": sum(run["lost"] for run in runs),
        "wrong": sum(run["wrong"] for run in runs),
    }


def run(args: ServingArguments) -> dict:
    """All figures; also written to `args.output`."""
    figures: dict = {"settings": vars(args), "rows": []}
    with tempfile.TemporaryDirectory() as folder:
        questions = make_collection(args, load_trained(ModelSource(args.model)), Path(folder, "store"))
        with (
            service(args, Path(folder, "store"), args.max_batch) as batched,
            service(args, Path(folder, "store"), 1) as single,
        ):
            urls = {BATCHED: batched, SINGLE: single}
            for url in urls.values():
                asyncio.run(load(url, 2, args, questions, seed=99))
            for clients in args.clients:
                runs: dict[str, list[dict]] = {name: [] for name in urls}
                for repeat in range(args.repeats):
                    for name, url in urls.items():
                        runs[name].append(asyncio.run(load(url, clients, args, questions, seed=repeat)))
                for name in urls:
                    figures["rows"].append({"service": name, "clients": clients, **summary(runs[name])})
    rates = {(row["service"], row["clients"]): row["answers_per_second"] for row in figures["rows"]}
    figures["speed_of_batches"] = {count: rates[BATCHED, count] / rates[SINGLE, count] for count in args.clients}
    figures["machine"] = {"cores": os.cpu_count(), "load_average": os.getloadavg(), "torch": torch.__version__}
    Path(args.output).parent.mkdir(parents=True, exist_ok=True)
    Path(args.output).write_text(json.dumps(figures, indent=1))
    return figures


def table(figures: dict) -> str:
    lines = [
        "| service | clients | answers/s | p50 ms | p95 ms | p99 ms | lost | wrong |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in figures["rows"]:
        cells = [row["service"], row["clients"], f"{row['answers_per_second']:.1f}"]
        cells += [f"{row[name]:.0f}" for name in ("p50_ms", "p95_ms", "p99_ms")] + [row["lost"], row["wrong"]]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    args = parse(ServingArguments, arguments, description=__doc__)
    figures = run(args)
    print(table(figures))
    ratios = ", ".join(f"{ratio:.2f} at {count}" for count, ratio in figures["speed_of_batches"].items())
    print(f"Batches over one by one: {ratios} clients. Load {figures['machine']['load_average'][0]:.1f}.")


if __name__ == "__main__":
    run_program(main)
