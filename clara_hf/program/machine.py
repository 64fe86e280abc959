"""Settings of the process itself."""

import ctypes
import os

import torch


# glibc's malloc.h
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_MAX = -1, -2, -4


def keep_freed_memory() -> None:
    """Let glibc keep what a training step frees for the next one, instead of returning pages and faulting them in anew.

    On a CPU only, and not where the user has set malloc's own variables.
    """
    if torch.accelerator.is_available() or any(name.startswith("MALLOC_") for name in os.environ):
        return
    library = ctypes.CDLL(None)
    if hasattr(library, "gnu_get_libc_version"):
        library.mallopt(M_MMAP_MAX, 0)
        library.mallopt(M_TRIM_THRESHOLD, -1)
        library.mallopt(M_TOP_PAD, 1 << 28)
