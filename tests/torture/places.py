"""Runs programs where the machine has little: a full disk, a read-only folder, few file descriptors, no home, the C
locale, another user; each must end well, or in one sentence, and leave nothing that keeps a later run from starting.

    python tests/torture/places.py
    python tests/torture/places.py --programs store,eval --places full,readonly

As root the full disk is a tmpfs of 64 KiB and the read-only folder one that is mounted so; else, and where mounting is
refused, files may not grow beyond 16 KiB, and the folder has no right to be written.
"""

import argparse
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parent))
# Libraries read it when they are imported; the other user needs it, too.
HOME = os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="clara-home-")
os.chmod(HOME, 0o777)

import datasets  # noqa: E402
from common import PROGRAMS, ROOT, arguments, forked, prepare, serve_teacher  # noqa: E402
from kills import compare  # noqa: E402

from clara_hf import cli  # noqa: E402


PLACES = ("full", "readonly", "descriptors", "homeless", "locale", "user")
AFRESH = ("homeless", "locale")
NOBODY = 65534
SMALL = 16 * 1024


def confine(place: str, folder: Path, out: Path) -> None:
    """Make the process a poor one; for ever, since it is one of its own."""
    if place == "full" and not os.path.ismount(out.parent):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (SMALL, SMALL))
    elif place == "descriptors":
        resource.setrlimit(resource.RLIMIT_NOFILE, (40, 40))
    elif place == "user" and os.geteuid() == 0:
        # Rows that root has kept have locks that are root's.
        datasets.config.HF_DATASETS_CACHE = tempfile.mkdtemp(prefix="rows-", dir=HOME)
        os.chown(datasets.config.HF_DATASETS_CACHE, NOBODY, NOBODY)
        os.setgid(NOBODY)
        os.setuid(NOBODY)


@contextmanager
def prepared(place: str, out: Path) -> Iterator[None]:
    """The folder of `out` as the place has it."""
    parent = out.parent
    parent.mkdir(parents=True)
    if place == "full":
        mount("-t", "tmpfs", "-o", "size=64k", "tmpfs", str(parent))
    elif place == "readonly":
        mount("-t", "tmpfs", "-o", "size=256m,ro", "tmpfs", str(parent)) or parent.chmod(0o555)
    elif place == "user" and os.geteuid() == 0:
        os.chown(parent, NOBODY, NOBODY)
    try:
        yield
    finally:
        if os.path.ismount(parent):
            subprocess.check_call(["umount", str(parent)])


def mount(*words: str) -> bool:
    """Whether it could be mounted: as root, and where that is not refused."""
    return os.geteuid() == 0 and subprocess.call(["mount", *words], stderr=subprocess.DEVNULL) == 0


def relieve(parent: Path) -> None:
    """Give a place what it lacked."""
    if os.path.ismount(parent):
        subprocess.check_call(["mount", "-o", "remount,rw,size=256m", str(parent)])
    else:
        parent.chmod(0o755)


def others_may_read(path: str) -> bool:
    """Whether other users reach a file: modules that are imported late must be theirs to read, too."""
    return all(folder.stat().st_mode & 0o001 for folder in Path(path).resolve().parents)


def run_afresh(program: str, place: str, folder: Path, out: Path, url: str, log: Path) -> int:
    """A program in a new interpreter, since libraries read these variables when they are imported."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    if place == "homeless":
        for name in ("HOME", "HF_HOME", "XDG_CACHE_HOME", "HF_DATASETS_CACHE"):
            environment.pop(name, None)
    elif place == "locale":
        environment.update(LC_ALL="C", LANG="C", PYTHONIOENCODING="ascii", PYTHONUTF8="0")
    with open(log, "wb") as told:
        command = [sys.executable, "-m", "clara_hf.cli", *arguments(program, folder, out, url)]
        return subprocess.call(command, env=environment, stdout=told, stderr=told)


def run(program: str, place: str, folder: Path, out: Path, url: str) -> None:
    confine(place, folder, out)
    cli.main(arguments(program, folder, out, url))


def verdict(code: int, told: str, place: str) -> str | None:
    """What is wrong with how a program ended; `None` if nothing."""
    if code < 0:
        return f"ended by signal {-code}"
    if "Traceback" in told:
        return "a traceback"
    if code == 0:
        return "it ended as if all was written" if place == "readonly" else None
    said = [line for line in told.splitlines() if ": error: " in line]
    return None if len(said) == 1 else f"exit code {code} with {len(said)} sentences"


def torture(program: str, place: str, folder: Path, whole: Path, url: str) -> str | None:
    """Run a program in a place, again where that is mended, and print how it went; what is wrong with it."""
    out, log = folder / f"{program}-{place}" / "out", folder / "log"
    with prepared(place, out):
        if place in AFRESH:
            code = run_afresh(program, place, folder, out, url, log)
        else:
            code = forked(partial(run, program, place, folder, out, url), log)
        told = log.read_text(errors="replace")
        wrong = verdict(code, told, place)
        relieve(out.parent)
        if wrong is None and code != 0:
            again = forked(partial(run, program, "", folder, out, url), log)
            wrong = None if again == 0 else f"again, with room: exit code {again}\n{log.read_text()[-800:]}"
        if wrong is None and forked(partial(compare, program, folder, whole, out), log):
            wrong = f"other results\n{log.read_text()[-800:]}"
    sentence = next((line for line in told.splitlines() if ": error: " in line), "")
    print(f"{program}, {place}: exit code {code} {sentence[:300]}", flush=True)
    if wrong is not None:
        print(f"  FAULT: {wrong}\n    " + told[-1500:].replace("\n", "\n    "), flush=True)
    shutil.rmtree(out.parent, ignore_errors=True)
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--programs", default=",".join(PROGRAMS))
    parser.add_argument("--places", default=",".join(PLACES))
    given = parser.parse_args()
    runs, failed = 0, 0
    with tempfile.TemporaryDirectory(prefix="clara-places-") as name:
        folder = Path(name)
        folder.chmod(0o755)
        os.environ["HF_DATASETS_CACHE"] = os.path.join(name, "rows")
        os.chdir(name)
        prepare(folder)
        (folder / "rows").mkdir(exist_ok=True)
        (folder / "rows").chmod(0o777)
        teacher, url = serve_teacher()
        try:
            for program in given.programs.split(","):
                whole = folder / f"{program}-whole"
                forked(partial(run, program, "", folder, whole, url), folder / "log")
                for place in given.places.split(","):
                    if place == "user" and not others_may_read(os.__file__):
                        print(f"{program}, user: not tried, as other users cannot read {os.__file__}")
                        continue
                    wrong = torture(program, place, folder, whole, url)
                    runs, failed = runs + 1, failed + (wrong is not None)
        finally:
            os.kill(teacher, signal.SIGKILL)
            shutil.rmtree(HOME, ignore_errors=True)
    print(f"{runs} runs, {failed} faults")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
