"""Shows what memory large data take: rows beyond 2 GiB of text are read, checked and mapped in pieces, then trained on.

    python tests/torture/memory.py --gigabytes 2.2
    python tests/torture/memory.py --gigabytes 10 --limit 4 --train_rows 20

Writes rows of 2 MB to the temporary folder (twice their size is needed there: the file and its mapped form), reads them
as a joint run does, and trains on the first `--train_rows` of them; all of them would be tokenized first, which takes
ten minutes for 1 GiB. Prints the most memory that each process had for itself (anonymous; pages of mapped files can be
taken back at any time). With `--limit`, a process that allocates more than so many GiB (RLIMIT_DATA) ends.
"""

import argparse
import json
import os
import resource
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parent))

from common import arguments, forked, prepare  # noqa: E402

from clara_hf import cli  # noqa: E402
from clara_hf.data.mapped import distinct_texts, training_rows  # noqa: E402


GIB = 1024**3
DOCUMENTS, DOCUMENT = 20, 100_000  # characters


def write_rows(path: Path, size: float) -> int:
    """Write about `size` bytes of questions with long documents; returns how many rows."""
    with path.open("w", encoding="utf-8") as file:
        number = 0
        while file.tell() < size:
            docs = [f"{number} {place} " + "word " * (DOCUMENT // 5) for place in range(DOCUMENTS)]
            row = {"question": f"What is {number}?", "answers": ["a word"], "docs": docs, "pos_index": [0]}
            file.write(json.dumps(row) + "\n")
            number += 1
    return number


def read(path: Path) -> None:
    """Every row and every text of it, as a run reads them before it trains."""
    rows = training_rows(path)
    texts = sum(len(text) for _, fresh in distinct_texts(rows, "docs") for text in fresh)
    print(f"{len(rows)} rows, {texts} characters")


def measured(work: Callable[[], None], peak: Path, limit: float | None) -> None:
    """Call `work`, and write to `peak` the most bytes that were this process's alone."""
    if limit is not None:
        resource.setrlimit(resource.RLIMIT_DATA, (int(limit * GIB),) * 2)
    peak.write_text("0\n")

    def watch():
        with peak.open("a") as file:
            while True:
                lines = Path("/proc/self/status").read_text().splitlines()
                kilobytes = next(line.split()[1] for line in lines if line.startswith("RssAnon"))
                print(1024 * int(kilobytes), file=file, flush=True)
                time.sleep(0.1)

    threading.Thread(target=watch, daemon=True).start()
    work()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=2.2, help="GiB of rows.")
    parser.add_argument("--train_rows", type=int, default=10)
    parser.add_argument("--limit", type=float, help="GiB that a process may allocate.")
    given = parser.parse_args()
    if shutil.disk_usage(tempfile.gettempdir()).free < 2.5 * given.gigabytes * GIB:
        print(f"{tempfile.gettempdir()} has no room for twice {given.gigabytes} GiB: set TMPDIR.", file=sys.stderr)
        return 2
    with tempfile.TemporaryDirectory(prefix="clara-memory-") as name:
        os.environ["HF_DATASETS_CACHE"] = os.path.join(name, "rows")
        os.chdir(name)
        folder, log, peak = Path(name), Path(name, "log"), Path(name, "peak")
        prepare(folder)
        rows = write_rows(folder / "questions.jsonl", given.gigabytes * GIB)
        print(f"{given.gigabytes} GiB in {rows} rows are written", flush=True)
        some = ["--train_limit", str(given.train_rows), "--save_strategy", "no"]
        train = partial(cli.main, [*arguments("joint", folder, folder / "run"), *some])
        for what, work in (("read", partial(read, folder / "questions.jsonl")), ("trained on", train)):
            began = time.monotonic()
            if forked(partial(measured, work, peak, given.limit), log):
                print(log.read_text(errors="replace")[-3000:], file=sys.stderr)
                return 1
            most, took = max(map(int, peak.read_text().splitlines())) / GIB, time.monotonic() - began
            print(f"{what}: {most:.2f} GiB of memory at most, {took:.0f} s", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
