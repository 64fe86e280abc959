"""A memory store's folder in object storage: its files, and the lock of the one process that writes."""

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from tempfile import TemporaryDirectory
from uuid import uuid4

import lance
import pyarrow as pa
from lance.file import LanceFileSession
from pyarrow import fs


LOCK = "_lock"


class Remote:
    """The folder at `url`. Files beside the table are fetched when they are needed, and kept as long as this object.

    Address and credentials of the service are read by Lance and Arrow, from the environment (`AWS_ACCESS_KEY_ID` and
    so on).

    The lock is a Lance data set of one row, which can be created only where there is none: object storage writes its
    manifest on the condition that no other is there. A process that is killed leaves it.
    """

    def __init__(self, url: str):
        self.url = url
        self._session = LanceFileSession(url)
        self._kept = TemporaryDirectory(prefix="clara-store-")
        self._depth = 0

    def __reduce__(self):
        return Remote, (self.url,)

    @property
    def folder(self) -> Path:
        """Where fetched files are."""
        return Path(self._kept.name)

    def names(self, folder: str | None = None) -> list[str]:
        """All files in the folder, or in one of its folders, relative to it."""
        return [name for name in self._session.list(folder) if name and not name.endswith("/")]  # marks of folders

    @property
    def is_blank(self) -> bool:
        """Whether a table can be created here: nothing is there, or what is left of a creation that was cut off.

        Raises:
            OSError: it cannot be known.
        """
        try:
            with_table = self.names("_versions")
            return not with_table and all(name.startswith(("_transactions/", f"{LOCK}/")) for name in self.names())
        except (OSError, ValueError) as error:
            raise OSError(f"{self.url} cannot be listed: {' '.join(str(error).split())[:300]}") from error

    def upload(self, file: Path, name: str) -> None:
        self._session.upload_file(str(file), name)

    def download(self, name: str, file: Path) -> None:
        self._session.download_file(name, str(file))

    def fetch(self, name: str) -> Path:
        file = self.folder / name
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            unfinished = file.with_name(f"{uuid4().hex}.unfinished")
            self.download(name, unfinished)
            unfinished.replace(file)
        return file

    def remove(self, name: str) -> None:
        """Removes a file, or a folder with all that is in it."""
        storage, path = fs.FileSystem.from_uri(f"{self.url}/{name}")
        found = storage.get_file_info(path).type
        if found == fs.FileType.File:
            storage.delete_file(path)
        elif found == fs.FileType.Directory:
            storage.delete_dir(path)

    @contextmanager
    def lock(self) -> Iterator[bool]:
        """Holds the lock of the one that writes, unless another process has it; yields whether it was got."""
        if self._depth == 0 and not self._acquire():
            yield False
            return
        self._depth += 1
        try:
            yield True
        finally:
            self._depth -= 1
            if self._depth == 0:
                self.remove(LOCK)

    def _acquire(self) -> bool:
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        holder = f"process {os.getpid()} on {socket.gethostname()}, since {now}"
        try:
            lance.write_dataset(pa.table({"holder": [holder]}), f"{self.url}/{LOCK}", mode="create")
        except OSError:
            if not any(name.startswith(f"{LOCK}/_versions/") for name in self.names(LOCK)):
                raise  # no other has it: it cannot be written
            return False
        return True

    def holder(self) -> str:
        """Who has the lock."""
        try:
            return lance.dataset(f"{self.url}/{LOCK}").to_table()["holder"][0].as_py()
        except (OSError, ValueError, KeyError, IndexError):
            return "another process"
