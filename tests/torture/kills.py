"""Kills programs at random file operations, runs them again, and compares what comes out with an uninterrupted run.

    python tests/torture/kills.py --kills 100
    python tests/torture/kills.py --kills 20 --programs joint,store --seed 1

A file operation is whatever Python opens for writing, makes, renames or removes in the output folder, and each call of
the native writers (safetensors, torch.save, Lance), before and after. Prints a line for each program; exit code 1 where
any run did not come out equal.
"""

import argparse
import hashlib
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from functools import partial
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parent))

import lance  # noqa: E402
import safetensors.torch  # noqa: E402
import torch  # noqa: E402
from common import PROGRAMS, arguments, forked, prepare, serve_teacher  # noqa: E402
from safetensors.torch import load_file  # noqa: E402

from clara_hf import cli  # noqa: E402
from clara_hf.memory_store import MemoryStore  # noqa: E402
from clara_hf.program import read_json  # noqa: E402


CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.link", "os.symlink", "shutil.rmtree")
NATIVE = ((safetensors.torch, "save_file"), (torch, "save"), (lance, "write_dataset"), (lance.LanceDataset, "commit"))


def run(program: str, folder: Path, out: Path, url: str, kill_at: int | None = None, counted: Path | None = None):
    """A program that kills itself before its n-th file operation, or writes to `counted` how many it has."""
    count = 0

    def step():
        nonlocal count
        count += 1
        if count == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def watch(event, given):
        if event == "open":
            path, _, flags = given
            if not isinstance(path, str) or not flags or not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                return
        elif event not in CHANGES:
            return
        if str(given[0]).startswith(str(out)):
            step()

    def between(original, *given, **options):
        step()
        result = original(*given, **options)
        step()
        return result

    for owner, name in NATIVE:
        setattr(owner, name, partial(between, getattr(owner, name)))
    sys.addaudithook(watch)
    try:
        cli.main(arguments(program, folder, out, url))
    finally:
        if counted is not None:
            counted.write_text(str(count))


def outcome(program: str, folder: Path, out: Path) -> dict:
    """What of a finished run must not depend on how it came about."""
    if program == "store":
        store = MemoryStore.open(out)
        keys = sorted(store)
        assert store.verify(show_progress=False).is_sound
        return {"keys": keys, "text": store.columns(keys, ["text"])["text"], "memories": digest(store.get(keys))}
    if program in ("eval", "synthesize", "pools"):
        names = {"eval": "table.*", "synthesize": "*.jsonl*", "pools": "pools*"}[program]
        files = [*out.glob(names), *out.glob("predictions/*")]
        return {path.name: path.read_bytes().replace(os.fsencode(out), b"") for path in files if path.is_file()}
    log = [row for row in read_json(out / "trainer_state.json")["log_history"] if "loss" in row]
    tensors = [
        (path.name, load_file(path))
        for path in sorted(out.glob("**/*.safetensors"))
        if "checkpoint" not in str(path.relative_to(out))
    ]
    weights = {(file, name): digest(value) for file, found in tensors for name, value in found.items()}
    assert weights, f"{out} holds no weights"
    steps = [(row["step"], row["loss"], row["grad_norm"]) for row in log]
    folders = sorted(path.name for path in out.glob("checkpoint*"))
    return {"weights": weights, "steps": steps, "folders": folders}


def digest(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.contiguous().float().numpy().tobytes()).hexdigest()


def compare(program: str, folder: Path, whole: Path, out: Path) -> int:
    expected, found = outcome(program, folder, whole), outcome(program, folder, out)
    wrong = [name for name in expected.keys() | found.keys() if expected.get(name) != found.get(name)]
    for name in wrong:
        print(f"different: {name}: {str(expected.get(name))[:600]} before, {str(found.get(name))[:600]} now")
    return 3 if wrong or not expected else 0


def torture(program: str, folder: Path, url: str, kills: int, draw: random.Random) -> tuple[int, list[str]]:
    """How many file operations a whole run has, and a sentence for each kill that did not end well."""
    whole, log, counted = folder / f"{program}-whole", folder / "log", folder / "count"
    code = forked(partial(run, program, folder, whole, url, counted=counted), log)
    if code != 0:
        return 0, [f"uninterrupted: exit code {code}\n{log.read_text()[-2000:]}"]
    total, faults = int(counted.read_text()), []
    for kill in range(kills):
        out, place = folder / f"{program}-{kill}", draw.randint(1, total)
        killed = forked(partial(run, program, folder, out, url, kill_at=place), log)
        again = forked(partial(run, program, folder, out, url), log)
        told = log.read_text()[-1500:]
        equal = forked(partial(compare, program, folder, whole, out), log) if again == 0 else again
        if killed != -signal.SIGKILL or again != 0 or equal != 0:
            told = told if again else log.read_text()[-1500:]
            faults.append(f"at operation {place} of {total}: killed {killed}, again {again}, equal {equal}\n{told}")
        shutil.rmtree(out, ignore_errors=True)
    return total, faults


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=100, help="Of all programs together.")
    parser.add_argument("--programs", default=",".join(PROGRAMS))
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    programs, draw, failed = given.programs.split(","), random.Random(given.seed), 0
    with tempfile.TemporaryDirectory(prefix="clara-kills-") as name:
        os.environ["HF_DATASETS_CACHE"] = os.path.join(name, "rows")
        os.chdir(name)  # where no recipe is found
        prepare(Path(name))
        teacher, url = serve_teacher()
        try:
            for number, program in enumerate(programs):
                kills = given.kills // len(programs) + (number < given.kills % len(programs))
                began = time.monotonic()
                total, faults = torture(program, Path(name), url, kills, draw)
                failed += len(faults)
                took = time.monotonic() - began
                print(
                    f"{program}: {kills} kills in {total} file operations, {len(faults)} faults, {took:.0f} s",
                    flush=True,
                )
                for fault in faults:
                    print(f"  {fault}", flush=True)
        finally:
            os.kill(teacher, signal.SIGKILL)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
