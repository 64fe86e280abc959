"""What a run has done so far, on disk: one JSON line per question, appended batch by batch, read by the next call."""

import json
from pathlib import Path


class JournalError(ValueError):
    """A journal is damaged in a way that no kill can explain; the message names file and line."""


class Journal:
    """Records by question id. Every process appends to a file of its own; reading joins the files of all.

    A kill can leave half a last line: it is not read, and cut off by the next append.

    Args:
        folder: where the files lie; made when the first record is appended.
        name: the files' name, before the process's number.
        process: this process's number.
    """

    def __init__(self, folder: Path, name: str, process: int = 0):
        self.folder = folder
        self.name = name
        self.path = folder / f"{name}.{process}.jsonl"
        self._checked = False

    def read(self) -> dict[str, dict]:
        """All whole records.

        Raises:
            JournalError: a whole line is no record.
        """
        records = {}
        for path in sorted(self.folder.glob(f"{self.name}.*.jsonl")):
            if path.name.removeprefix(f"{self.name}.").removesuffix(".jsonl").isdigit():
                records.update(_records(path))
        return records

    def append(self, records: list[dict]) -> None:
        """Appends records, each with its question's `id`, in one write."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not self._checked:
            self._cut_half_line()
            self._checked = True
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        with open(self.path, "ab") as file:
            file.write(lines.encode())

    def _cut_half_line(self) -> None:
        if self.path.exists():
            content = self.path.read_bytes()
            whole = content.rfind(b"\n") + 1
            if whole < len(content):
                with open(self.path, "r+b") as file:
                    file.truncate(whole)


def _records(path: Path) -> dict[str, dict]:
    records = {}
    content = path.read_bytes()
    for number, line in enumerate(content[: content.rfind(b"\n") + 1].splitlines(), start=1):
        try:
            record = json.loads(line)
            records[record["id"]] = record
        except (ValueError, KeyError, TypeError) as error:
            raise JournalError(
                f"{path}, line {number} is damaged: delete that line, or the file, and run it again"
            ) from error
    return records
