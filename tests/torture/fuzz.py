"""Gives the library inputs that Hypothesis makes: each must be taken, or refused in one sentence.

    python tests/torture/fuzz.py --inputs 10000
    python tests/torture/fuzz.py --inputs 500 --kinds stores,runs --seed 3

Kinds: calls of the model and its processor, data files, YAML, checkpoints, memory stores and runs that are resumed; the
last three, and half of the files, are sound ones that were damaged. A fault is an error that is none of ValueError,
TypeError, OSError and ImportError, or has no message of a line or two; a process that dies or hangs; or a damaged store
whose content differs silently.
Prints the inputs and faults of each kind, and each different fault once; exit code 1 where there is one.
"""

import argparse
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parent))

import kills  # noqa: E402
from common import forked, prepare  # noqa: E402
from hypothesis import HealthCheck, Phase, given, seed, settings  # noqa: E402
from hypothesis import strategies as st  # noqa: E402
from inputs import makers, sound_store  # noqa: E402


REFUSALS = (ValueError, TypeError, OSError, ImportError)
SHARES = {"calls": 80, "yaml": 60, "data": 50, "checkpoints": 5, "stores": 4, "runs": 1}
LIMIT = 120  # seconds
LONGEST = 1500  # characters of a sentence


def fault_of(error: BaseException) -> str | None:
    """What is wrong with an error as the end of a call; `None` if nothing."""
    where = traceback.extract_tb(error.__traceback__)[-1] if error.__traceback__ else None
    place = f"{Path(where.filename).name}:{where.lineno}" if where else "?"
    if not isinstance(error, REFUSALS):
        return f"{type(error).__name__} at {place}: {' '.join(str(error).split())[:160]}"
    text = str(error).strip()
    if not text or len(text) > LONGEST:
        return f"{type(error).__name__} at {place} with {len(text)} characters: {text[:100]!r}"
    return None


def ended(call: Callable) -> tuple[bool, str | None]:
    """Whether a call was taken, and what is wrong with how it ended."""
    try:
        signal.alarm(LIMIT)
        call()
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        return False, fault_of(error)
    finally:
        signal.alarm(0)
    return True, None


def in_child(call: Callable, log: Path) -> tuple[bool, str | None]:
    """[`ended`] of a call that is made in a forked process; one that dies or hangs is a fault."""
    result = log.with_name("ended")
    code = forked(lambda: result.write_bytes(pickle.dumps(ended(call))) and 0, log)
    if code:
        return False, f"the process ended with {code}: {log.read_text(errors='replace')[-200:]}"
    return pickle.loads(result.read_bytes())


def fuzz(kind: str, folder: Path, count: int, number: int) -> tuple[int, int, Counter]:
    """How many inputs were made, how many of them were taken, and faults with how often each was seen."""
    faults, done = Counter(), Counter()
    make, forks = makers(folder)[kind]
    quiet = {"database": None, "deadline": None, "suppress_health_check": list(HealthCheck)}

    @seed(number)
    @settings(max_examples=count, phases=[Phase.generate], **quiet)
    @given(st.data())
    def one(data):
        call = make(data.draw)
        taken, fault = in_child(call, folder / "log") if forks else ended(call)
        done["inputs"] += 1
        done["taken"] += taken
        if fault is not None:
            faults[fault] += 1

    one()
    return done["inputs"], done["taken"], faults


def recorded(result: Path, *given) -> None:
    result.write_bytes(pickle.dumps(fuzz(*given)))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=10_000, help="Of all kinds together.")
    parser.add_argument("--kinds", default=",".join(SHARES))
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    kinds, failed = chosen.kinds.split(","), 0
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory(prefix="clara-fuzz-") as name:
        folder = Path(name)
        os.environ["HF_DATASETS_CACHE"] = str(folder / "rows")
        os.chdir(name)
        prepare(folder)
        # Lance, once used, cannot be forked: the store, too, is made in a process of its own.
        forked(partial(sound_store, folder / "store-sound"), folder / "log")
        forked(partial(kills.run, "scp", folder, folder / "run", "", kill_at=150), folder / "log")
        (folder / "run").rename(folder / "run-sound")
        for kind in kinds:
            count = max(1, chosen.inputs * SHARES[kind] // sum(SHARES[one] for one in kinds))
            began = time.monotonic()
            result = folder / "result"
            log = folder / f"log-{kind}"
            code = forked(partial(recorded, result, kind, folder, count, chosen.seed), log)
            if code:
                print(f"{kind}: the process ended with {code}: {log.read_text(errors='replace')[-1500:]}")
                failed += 1
                continue
            inputs, taken, faults = pickle.loads(result.read_bytes())
            failed += sum(faults.values())
            took, found = f"{time.monotonic() - began:.0f} s", sum(faults.values())
            print(f"{kind}: {inputs} inputs, {taken} taken, {found} faults of {len(faults)} kinds, {took}", flush=True)
            for fault, times in faults.most_common():
                print(f"  {times} x {fault}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
