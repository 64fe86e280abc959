"""A memory store's folder in object storage, which is read where it is."""

from pathlib import Path
from tempfile import TemporaryDirectory
from uuid import uuid4

from lance.file import LanceFileSession


class Remote:
    """The folder at `url`. Files beside the table are fetched when they are needed, and kept as long as this object.

    Address and credentials of the service are read by Lance, from the environment (`AWS_ACCESS_KEY_ID` and so on).
    """

    def __init__(self, url: str):
        self.url = url
        self._session = LanceFileSession(url)
        self._kept = TemporaryDirectory(prefix="clara-store-")

    def __reduce__(self):
        return Remote, (self.url,)

    @property
    def folder(self) -> Path:
        """Where fetched files are."""
        return Path(self._kept.name)

    def names(self, folder: str | None = None) -> list[str]:
        """All files in the folder, or in one of its folders, relative to it."""
        return self._session.list(folder)

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
