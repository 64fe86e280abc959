"""Exit codes, and output on terminals that lack letters."""

import os
import subprocess
import sys

import pytest
import torch

from clara_hf.program.errors import one_sentence, was_interrupted


PROGRAM = """
from clara_hf.program import UsageError, run_program
def main():
    print("F1 76.1 ± 0.4 – Zürich, “τ” → 東")
    {ending}
run_program(main)
"""


@pytest.mark.parametrize(
    ("ending", "code", "words"),
    [
        ("return 0", 0, ""),
        ("return 3", 3, ""),
        ("raise UsageError('--limit is –1')", 2, "error: --limit is"),
        ("raise OSError('no file')", 1, "error: no file"),
        ("raise KeyboardInterrupt", 130, "interrupted"),
        ("raise TypeError('ours')", 1, "Traceback"),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-8", "cp1252", "latin-1", "ascii"])
def test_exit_codes_and_what_a_terminal_can_print(ending, code, words, encoding):
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(ending=ending)],
        capture_output=True,
        env={"PYTHONIOENCODING": encoding, "PYTHONPATH": ":".join(sys.path)},
    )
    assert done.returncode == code and words in done.stderr.decode(encoding)
    assert ("Traceback" in done.stderr.decode(encoding)) == (words == "Traceback")
    said = done.stdout.decode(encoding)
    if encoding == "utf-8":
        assert said.strip() == "F1 76.1 ± 0.4 – Zürich, “τ” → 東"
    if encoding == "ascii":
        assert said.strip() == 'F1 76.1 +/- 0.4 - Zurich, "?" -> ?'


@pytest.mark.parametrize("lines", [1, 100_000])
def test_where_nobody_reads_the_output_on_a_program_ends_without_a_word(lines):
    code = "from clara_hf.program import run_program\nrun_program(lambda: [print('a line') for _ in range({})] and 0)"
    reading, writing = os.pipe()
    os.close(reading)
    done = subprocess.run([sys.executable, "-c", code.format(lines)], stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert done.returncode == 141 and done.stderr == b""


def test_the_kernel_imports_neither_torch_nor_transformers():
    code = "import sys, clara_hf.program; print({'torch', 'transformers', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_freed_memory_is_kept_where_pytorch_runs_on_a_cpu_and_malloc_is_not_set():
    if sys.platform != "linux" or torch.accelerator.is_available():
        pytest.skip("for glibc and a CPU")
    code = (
        "import torch\nfrom clara_hf.program import run_program\n"
        "def pages(): return int(open('/proc/self/statm').read().split()[1])\n"
        "def main():\n"
        "    held = torch.ones(1 << 25)\n    full = pages()\n    del held\n    print(full - pages())\n"
        "run_program(main)"
    )
    freed = {}
    for name, environment in {"ours": {}, "the user's": {"MALLOC_ARENA_MAX": "2"}}.items():
        kept = {key: value for key, value in os.environ.items() if not key.startswith("MALLOC_")}
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={**kept, **environment}
        )
        freed[name] = int(done.stdout)
    assert freed["ours"] < 1000 < 30_000 < freed["the user's"]  # pages of 4 KiB, of 128 MiB


INTERRUPTED_TASKS = """
import asyncio, os, signal
from clara_hf.program import run_program
from clara_hf.program.errors import run_async

async def part(number):
    if number == 1:
        os.kill(os.getpid(), signal.SIGINT)
    await asyncio.sleep(30)

async def work():
    parts = [asyncio.ensure_future(part(number)) for number in range(3)]
    try:
        await asyncio.wait(parts)
    finally:
        print(sum(each.cancel() for each in parts), "parts stopped")

run_program(lambda: run_async(work()))
"""


def test_an_interrupt_in_the_midst_of_a_task_is_one_sentence():
    done = subprocess.run([sys.executable, "-c", INTERRUPTED_TASKS], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout.split()) == (130, ["3", "parts", "stopped"])
    assert "interrupted" in done.stderr and "Traceback" not in done.stderr


def test_errors_that_name_each_other_as_causes_end():
    first, second = ValueError("first"), ValueError("second")
    first.__cause__, second.__cause__ = second, first
    assert not was_interrupted(first)
    second.__cause__ = KeyboardInterrupt()
    assert was_interrupted(first)


def test_an_error_that_a_library_raises_while_it_is_interrupted_is_an_interruption():
    def stop(of_cause):
        try:
            raise KeyboardInterrupt
        except KeyboardInterrupt as interrupt:
            if of_cause:
                raise RuntimeError("worker exited") from interrupt
            raise RuntimeError("worker exited")  # noqa: B904

    for of_cause in (True, False):
        with pytest.raises(RuntimeError) as caught:
            stop(of_cause)
        assert was_interrupted(caught.value)
    assert not was_interrupted(RuntimeError("worker exited"))


def test_a_read_only_place_is_told_without_lance_s_own_line():
    error = OSError(
        "LanceError(IO): Read-only file system (os error 30), /home/x/rust/lance-io/src/object_store.rs:1:2"
    )
    told = one_sentence(error)
    assert "read-only" in told and "another place" in told and ".rs" not in told
