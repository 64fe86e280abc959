"""Exit codes, and output on terminals that lack letters."""

import subprocess
import sys

import pytest


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


def test_the_kernel_imports_neither_torch_nor_transformers():
    code = "import sys, clara_hf.program; print({'torch', 'transformers', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
