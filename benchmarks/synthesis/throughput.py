"""Throughput and memory of SCP synthesis where the language model costs nothing.

    python benchmarks/synthesis/throughput.py --passages 10000
    python benchmarks/synthesis/throughput.py --passages 1000 --http true

A scripted teacher replies at once: in the process, or with --http behind a server on loopback (another process, which
shares the processors). Everything else is what `recipes/synthesize.py` does: cutting, checks, log, files. Memory is
the resident set, sampled while it runs; a flat one has the same peak in the second half as in the first.
"""

import json
import multiprocessing
import os
import tempfile
import threading
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import psutil
from scripted_teacher import FactTeacher, fact_document

from clara_hf.program import option, parse, run_program, write_json
from clara_hf.synthesis import session, synthesize


@dataclass
class BenchmarkArguments:
    """What is measured."""

    passages: int = option(10000, "Passages, each a document of its own.")
    http: bool = option(False, "Put the teacher behind HTTP on loopback.")
    concurrency: int = option(64, "Requests under way at once.")
    output: str = option("runs/benchmarks/synthesis.json", "JSON file for the figures.")


class Memory:
    """The resident set of this process in MB, sampled in a thread."""

    def __init__(self):
        self.samples: list[float] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, daemon=True)

    def _sample(self) -> None:
        process = psutil.Process()
        while not self._stop.wait(0.25):
            self.samples.append(process.memory_info().rss / 1e6)

    def __enter__(self) -> "Memory":
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._stop.set()
        self._thread.join()


def write_corpus(path: Path, passages: int) -> None:
    with open(path, "w", encoding="utf-8") as file:
        for number in range(passages):
            file.write(json.dumps({"id": str(number), "text": fact_document(number, 5 + number % 2)}) + "\n")


def serve(port: multiprocessing.Queue) -> None:
    """The teacher as an OpenAI-compatible server, until the process ends."""
    import asyncio

    from aiohttp import web

    from clara_hf.synthesis.backends.client import ChatRequest

    teacher = FactTeacher(first=0.8)

    async def answer(request: web.Request) -> web.Response:
        body = await request.json()
        reply = await teacher.complete(ChatRequest(body["messages"], "", {}, 0.0, 0))
        usage = {"prompt_tokens": reply.prompt_tokens, "completion_tokens": reply.completion_tokens}
        return web.json_response({"choices": [{"message": {"content": reply.text}}], "usage": usage})

    async def forever() -> None:
        app = web.Application()
        app.router.add_post("/v1/chat/completions", answer)
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        port.put(runner.addresses[0][1])
        await asyncio.Event().wait()

    asyncio.run(forever())


def measure(args: BenchmarkArguments, folder: Path, url: str) -> dict:
    write_corpus(folder / "docs.jsonl", args.passages)
    options = ["--corpus", str(folder / "docs.jsonl"), "--out", str(folder / "scp"), "--model", "scripted"]
    options += ["--base_url", url, "--concurrency", str(args.concurrency)]
    with Memory() as memory:
        began, used = time.perf_counter(), time.process_time()
        synthesize.main(options)
        seconds, cpu = time.perf_counter() - began, time.process_time() - used
    stats = json.loads((folder / "scp" / "stats.json").read_text(encoding="utf-8"))
    half = len(memory.samples) // 2
    sizes = {path.name: path.stat().st_size / args.passages for path in (folder / "scp").iterdir()}
    return {
        "passages_per_second": args.passages / seconds,
        "passages_per_cpu_second": args.passages / cpu,
        "requests_per_second": stats["requests"] / seconds,
        "requests_per_passage": stats["requests"] / args.passages,
        "seconds": seconds,
        "peak_rss_mb": max(memory.samples),
        "peak_rss_mb_by_half": [max(memory.samples[:half] or [0]), max(memory.samples[half:])],
        "open_files": psutil.Process().num_fds(),
        "bytes_per_passage": {name: round(size) for name, size in sorted(sizes.items())},
        "load_average": os.getloadavg()[0],
        "settings": {"passages": args.passages, "http": args.http, "concurrency": args.concurrency},
    }


def main(arguments: list[str] | None = None) -> None:
    args = parse(BenchmarkArguments, arguments, description=__doc__)
    server, url = None, "http://127.0.0.1:1/v1"
    if args.http:
        context = multiprocessing.get_context("spawn")
        port = context.Queue()
        server = context.Process(target=serve, args=(port,), daemon=True)
        server.start()
        url = f"http://127.0.0.1:{port.get(timeout=120)}/v1"
    else:
        session.make_backend = lambda _: nullcontext(FactTeacher(first=0.8))
    try:
        with tempfile.TemporaryDirectory() as folder:
            figures = measure(args, Path(folder), url)
    finally:
        if server is not None:
            server.terminate()
    first, second = figures["peak_rss_mb_by_half"]
    print(
        f"{args.passages} passages of {figures['requests_per_passage']:.1f} requests in {figures['seconds']:.1f} s: "
        f"{figures['passages_per_second']:.0f} per second ({figures['passages_per_cpu_second']:.0f} per second of "
        f"processor time), peak {figures['peak_rss_mb']:.0f} MB (halves: {first:.0f}, {second:.0f})."
    )
    write_json(args.output, figures)
    print(f"Figures in {args.output}.")


if __name__ == "__main__":
    run_program(main)
