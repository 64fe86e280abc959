"""Documents and their memories on disk, each compressed once."""

from .store import CorruptMemoryError, MemoryStore


__all__ = ["CorruptMemoryError", "MemoryStore"]
