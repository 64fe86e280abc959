"""Settings of the process itself."""

import ctypes
import os
import sys
import time


# glibc's malloc.h
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> None:
    """Let glibc keep what one step frees for the next one, instead of returning pages and faulting them in anew.

    On a CPU only, where PyTorch is loaded, and not where the user has set malloc's own variables.
    """
    torch = sys.modules.get("torch")
    if torch is None or torch.accelerator.is_available() or any(name.startswith("MALLOC_") for name in os.environ):
        return
    library = ctypes.CDLL(None)
    if hasattr(library, "gnu_get_libc_version"):
        library.mallopt(M_MMAP_MAX, 0)
        library.mallopt(M_TRIM_THRESHOLD, -1)
        library.mallopt(M_TOP_PAD, 1 << 28)


def choose_threads() -> str | None:
    """Set, on a CPU, as many threads as a step's operations run fastest with; returns what was measured.

    Beside other load the threads of one operation wait for each other: two can take 20 times as long as one. Where
    `OMP_NUM_THREADS` is set nothing is measured.
    """
    import torch

    most = torch.get_num_threads()
    if most == 1 or "OMP_NUM_THREADS" in os.environ or torch.accelerator.is_available():
        return None
    rounds = [(step_seconds(most), step_seconds(1)) for _ in range(3)]  # in turns: a moment's load hits both
    many, one = (sorted(each)[1] for each in zip(*rounds, strict=True))
    chosen = most if many <= one else 1
    torch.set_num_threads(chosen)
    took = f"{many:.2f} s on {most}, {one:.2f} s on one"
    return f"PyTorch runs on {chosen} of {most} threads; the same steps took {took}."


def step_seconds(threads: int, steps: int = 4) -> float:
    """What some steps of a small network take with so many threads."""
    import torch

    torch.set_num_threads(threads)
    hidden = torch.randn(2048, 256)
    weights = [torch.randn(256, 256, requires_grad=True) for _ in range(8)]
    began = time.perf_counter()
    for step in range(steps + 1):
        if step == 1:  # the first one warms up
            began = time.perf_counter()
        states = hidden
        for weight in weights:
            states = torch.nn.functional.silu(states @ weight / 16)
        states.square().mean().backward()
    return time.perf_counter() - began
