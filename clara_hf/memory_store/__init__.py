"""Documents and their memories on disk, each compressed once."""

from .store import MemoryStore
from .table import CorruptMemoryError


__all__ = ["CorruptMemoryError", "MemoryStore"]
