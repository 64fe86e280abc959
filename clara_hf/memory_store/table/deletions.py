"""Lance's deletion files, which name the rows that are gone: they have no checksums, so that copies of them are kept.

A wrong bit in one brings deleted rows back in place of others, or makes Lance ask for so much memory that the process
ends; so they are compared before Lance reads them.
"""

from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path
from typing import TYPE_CHECKING

from .journal import write_beside
from .layout import SIDE_FOLDER


if TYPE_CHECKING:
    from .rows import Rows

FOLDER = "_deletions"
PREFIX = "deleted-"


class Deletions:
    """The deletion files of a table in a folder, and their copies, each named by its file and by its content."""

    def __init__(self, table: "Rows"):
        self._table = table
        self._whole: set[str] = set()  # copies whose files this process has compared

    def copies(self) -> Iterator[tuple[str, Path]]:
        """The name of each file that has a copy, relative to the table's folder, and the copy."""
        for copy in self._table.side_files(f"{PREFIX}*"):
            yield f"{FOLDER}/{copy.name.removeprefix(PREFIX).rpartition('-')[0]}", copy

    def damaged(self, again: bool = False) -> list[str]:
        """Files that are not what was written. They are read once, or `again`."""
        if self._table.remote is not None:
            return []
        if again:
            self._whole = set()
        wrong = []
        for name, copy in self.copies():
            file = Path(self._table.path) / name
            if copy.name in self._whole or not file.is_file():
                continue
            if _digest(file.read_bytes()) == _digest_in(copy):
                self._whole.add(copy.name)
            else:
                wrong.append(name)
        return wrong

    def damaged_copies(self) -> list[Path]:
        """Copies that are not what was written."""
        local = self.copies() if self._table.remote is None else ()
        return [copy for _, copy in local if _digest(copy.read_bytes()) != _digest_in(copy)]

    def mend(self) -> None:
        """Puts whole copies in the place of damaged files. Under the store's exclusive lock."""
        wrong = self.damaged()
        for name, copy in self.copies():
            content = copy.read_bytes()
            if name in wrong and _digest(content) == _digest_in(copy):
                write_beside(Path(self._table.path) / name, content)

    def note(self) -> None:
        """Copies files that have no copy yet, and drops copies of files that are gone. Under the exclusive lock."""
        if self._table.remote is not None:
            return
        known = dict(self.copies())
        for piece in self._table.snapshot().pieces:
            for name in piece.files:
                file = Path(self._table.path) / name
                if name.startswith(f"{FOLDER}/") and name not in known and file.is_file():
                    content = file.read_bytes()
                    folder = self._table.folder / SIDE_FOLDER
                    folder.mkdir(exist_ok=True)
                    write_beside(folder / f"{PREFIX}{file.name}-{_digest(content)}", content)
        for name, copy in known.items():
            if not (Path(self._table.path) / name).exists():
                copy.unlink(missing_ok=True)


def _digest(content: bytes) -> str:
    return blake2b(content, digest_size=16).hexdigest()


def _digest_in(copy: Path) -> str:
    return copy.name.rpartition("-")[2]
