"""Files of one's own as documents: plain text, Markdown, HTML and PDF, each file or folder read without surprises."""

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

from clara_hf.data.documents import Document
from clara_hf.synthesis.text import damage


TEXT_ENDINGS = (".txt", ".text", ".md", ".markdown", ".rst", ".log", ".csv", ".tsv", ".json", ".jsonl", "")
HTML_ENDINGS = (".html", ".htm", ".xhtml")
PDF_ENDING = ".pdf"
MAX_FILE_BYTES = 64 * 2**20
# Texts are cut into pieces of at most this many characters, at a blank line where there is one.
BLOCK = 2**20
MAX_DAMAGE = 0.05
# What a charset is told from.
SAMPLE = 2**18
BYTE_ORDER_MARKS = (
    (b"\xef\xbb\xbf", "utf-8-sig"),
    (b"\xff\xfe\x00\x00", "utf-32"),
    (b"\x00\x00\xfe\xff", "utf-32"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
)


class Unreadable(ValueError):
    """A file that cannot be taken in; the message is the reason."""


@dataclass(frozen=True)
class Skipped:
    """A file that was left out, by its name in the collection, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class SourceFile:
    """A file to take in: where it is, its name in the collection, and by what a change of it is noticed."""

    path: Path
    name: str
    bytes: int
    changed: int  # nanoseconds


def find_files(paths: list[str], leave_out: Path | None = None) -> tuple[list[SourceFile], list[Skipped]]:
    """The files of `paths`, files and folders, in alphabetical order, and what is left out.

    Links to folders are not followed, so that no loop is walked; hidden files and folders are passed over without a
    word. `leave_out` is a folder of our own.

    Raises:
        FileNotFoundError: one of `paths` is not there.
    """
    found: list[SourceFile] = []
    skipped: list[Skipped] = []
    for given in paths:
        root = Path(given)
        if not root.exists():
            raise FileNotFoundError(f"there is no file or folder {given}: mend the path")
        if not root.is_dir():
            _sort_in(root, root.name, found, skipped)
            continue
        prefix = Path(root.resolve().name) if len(paths) > 1 else Path()
        own = leave_out.resolve() if leave_out else None

        def unreadable(error: OSError, root=root, prefix=prefix) -> None:
            skipped.append(Skipped((prefix / Path(error.filename).relative_to(root)).as_posix(), _reason(error)))

        for folder, folders, files in os.walk(root, onerror=unreadable):
            place = Path(folder)
            for name in sorted(folders):
                path = place / name
                if path.is_symlink():
                    skipped.append(Skipped((prefix / path.relative_to(root)).as_posix(), "a link to a folder"))
            folders[:] = sorted(n for n in folders if not n.startswith(".") and (place / n).resolve() != own)
            for name in sorted(n for n in files if not n.startswith(".")):
                _sort_in(place / name, (prefix / (place / name).relative_to(root)).as_posix(), found, skipped)
    return found, skipped


def _sort_in(path: Path, name: str, found: list[SourceFile], skipped: list[Skipped]) -> None:
    try:
        name.encode()
        about = path.stat()
        if not stat.S_ISREG(about.st_mode):  # opening a pipe would wait for its other end
            raise Unreadable("not a regular file")
        if about.st_size == 0:
            raise Unreadable("empty")
        if about.st_size > MAX_FILE_BYTES:
            raise Unreadable(f"{about.st_size / 2**20:.0f} MB, over the {MAX_FILE_BYTES // 2**20} MB that are read")
        if path.suffix.lower() not in (*TEXT_ENDINGS, *HTML_ENDINGS, PDF_ENDING):
            raise Unreadable(f"of a kind that is not read ({path.suffix})")
    except UnicodeEncodeError:
        skipped.append(Skipped(name.encode(errors="replace").decode(), "a name that is not valid Unicode"))
    except (OSError, Unreadable) as error:
        skipped.append(Skipped(name, _reason(error)))
    else:
        found.append(SourceFile(path, name, about.st_size, about.st_mtime_ns))


def _reason(error: Exception) -> str:
    if isinstance(error, OSError):
        return (error.strerror or type(error).__name__).lower()
    return str(error)


def read_file(file: SourceFile) -> list[Document]:
    """The documents in a file on disk.

    Raises:
        Unreadable: it cannot be taken in; the message is the reason.
    """
    try:
        data = file.path.read_bytes()
    except OSError as error:
        raise Unreadable(_reason(error)) from error
    return read_bytes(file.name, data)


def read_bytes(name: str, data: bytes) -> list[Document]:
    """The documents in a file's content, told by the ending of its name: one per PDF page or per megabyte of text.

    Raises:
        Unreadable: as [`read_file`].
    """
    ending = Path(name).suffix.lower()
    if not data.strip():
        raise Unreadable("empty")
    if ending == PDF_ENDING:
        return list(_pdf(name, data))
    if ending in HTML_ENDINGS:
        title, text = _html(data)
    else:
        text = decode(data)
        title, text = _heading(text) if ending in (".md", ".markdown") else ("", text)
    return read_text(name, text, title)


def read_text(name: str, text: str, title: str = "") -> list[Document]:
    """A text as documents, with their number as the place where there are several.

    Raises:
        Unreadable: there is no text in it.
    """
    if not text.strip():
        raise Unreadable("no text")
    if damage(text) > MAX_DAMAGE:
        raise Unreadable("not text: too many control or replacement characters")
    blocks = list(_blocks(text))
    return [
        Document(name, block, title, name, f"part {number}" if len(blocks) > 1 else "")
        for number, block in enumerate(blocks, start=1)
        if block.strip()
    ]


def _blocks(text: str) -> Iterator[str]:
    while len(text) > BLOCK:
        cut = max(text.rfind("\n\n", 1, BLOCK), 0) or max(text.rfind("\n", 1, BLOCK), text.rfind(" ", 1, BLOCK), 0)
        yield text[: cut or BLOCK]
        text = text[cut or BLOCK :]
    yield text


def decode(data: bytes) -> str:
    """Text from bytes: by its byte order mark, as UTF-8, else in the charset that it most likely is in.

    Raises:
        Unreadable: the bytes are no text.
    """
    for mark, encoding in BYTE_ORDER_MARKS:
        if data.startswith(mark):
            return data.decode(encoding, "replace")
    if b"\0" in data:
        raise Unreadable("binary")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        from charset_normalizer import from_bytes

        best = from_bytes(data[:SAMPLE]).best()
        if best is None:
            raise Unreadable("binary, or in an unknown encoding") from None
        return data.decode(best.encoding, "replace")


def _heading(text: str) -> tuple[str, str]:
    """A Markdown text's first heading, where it begins with one, and the rest."""
    first, _, rest = text.lstrip().partition("\n")
    return (first.lstrip("# ").strip(), rest) if first.startswith("# ") and rest.strip() else ("", text)


def _html(data: bytes) -> tuple[str, str]:
    from bs4 import BeautifulSoup

    try:
        page = BeautifulSoup(data, "html.parser")
        for hidden in page(["script", "style", "noscript", "template", "nav"]):
            hidden.decompose()
        title = page.title.get_text(" ", strip=True) if page.title else ""
        return title, (page.body or page).get_text("\n", strip=True)
    except (RecursionError, AssertionError, ValueError) as error:  # of the standard library's parser
        raise Unreadable("HTML that cannot be read") from error


def _pdf(name: str, data: bytes) -> Iterator[Document]:
    from pypdf import PdfReader
    from pypdf.errors import FileNotDecryptedError

    try:
        reader = PdfReader(BytesIO(data))
        if reader.is_encrypted and not reader.decrypt(""):
            raise Unreadable("an encrypted PDF")
        title = str((reader.metadata and reader.metadata.title) or "")
        texts = [page.extract_text() for page in reader.pages]
    except Unreadable:
        raise
    except FileNotDecryptedError:
        raise Unreadable("an encrypted PDF") from None
    except Exception as error:  # broken files raise all kinds
        raise Unreadable(f"a broken PDF ({' '.join(str(error).split())[:80] or type(error).__name__})") from error
    if not any(text.strip() for text in texts):
        raise Unreadable("a PDF without text (scanned pages?)")
    for number, text in enumerate(texts, start=1):
        if text.strip():
            yield Document(name, text, title, name, f"page {number}")
