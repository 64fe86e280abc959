import io
import os
import socket

import pytest


pytest.importorskip("pypdf")
pytest.importorskip("bs4")
from pypdf import PdfReader, PdfWriter

from clara_hf.serving import documents
from clara_hf.serving.documents import Unreadable, decode, find_files, read_bytes, read_file, read_text


SENTENCE = "Mara Brandel keeps bees on the roof of her workshop in Velholm."


def pdf(*pages: str, password: str | None = None) -> bytes:
    """A PDF with one line of text on each page."""
    objects = [b"<</Type/Catalog/Pages 2 0 R>>"]
    kids = " ".join(f"{3 + 2 * number} 0 R" for number in range(len(pages)))
    objects.append(f"<</Type/Pages/Count {len(pages)}/Kids[{kids}]>>".encode())
    font = "<</Font<</F1<</Type/Font/Subtype/Type1/BaseFont/Helvetica>>>>>>"
    for number, text in enumerate(pages):
        objects.append(
            f"<</Type/Page/Parent 2 0 R/MediaBox[0 0 600 800]/Resources{font}/Contents {4 + 2 * number} 0 R>>".encode()
        )
        stream = f"BT /F1 12 Tf 40 700 Td ({text}) Tj ET".encode()
        objects.append(f"<</Length {len(stream)}>>stream\n".encode() + stream + b"\nendstream")
    out, places = bytearray(b"%PDF-1.4\n"), []
    for number, body in enumerate(objects, start=1):
        places.append(len(out))
        out += f"{number} 0 obj".encode() + body + b"endobj\n"
    start = len(out)
    out += f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n".encode()
    out += b"".join(f"{place:010d} 00000 n \n".encode() for place in places)
    out += f"trailer<</Size {len(objects) + 1}/Root 1 0 R>>\nstartxref\n{start}\n%%EOF".encode()
    if password is None:
        return bytes(out)
    writer = PdfWriter(clone_from=PdfReader(io.BytesIO(out)))
    writer.encrypt(password)
    locked = io.BytesIO()
    writer.write(locked)
    return locked.getvalue()


@pytest.mark.parametrize(
    "data",
    [
        "Grüße aus Velholm".encode(),
        "Grüße aus Velholm".encode("utf-8-sig"),
        "Grüße aus Velholm".encode("utf-16"),
        b"\xfe\xff" + "Grüße aus Velholm".encode("utf-16-be"),
        "Grüße aus Velholm".encode("utf-32"),
        ("Grüße aus Velholm. Die Bienen fliegen über das Dach der Werkstatt. " * 5).encode("cp1252"),
    ],
)
def test_texts_are_decoded_whatever_their_encoding(data):
    assert decode(data).startswith("Grüße aus Velholm")


def test_bytes_that_are_no_text_are_refused():
    with pytest.raises(Unreadable, match="binary"):
        decode(b"\x7fELF\x00\x01\x02")
    with pytest.raises(Unreadable, match="not text"):
        read_text("a.txt", "\x01\x02\x03" * 20)


def test_a_pdf_is_one_document_per_page_that_has_text():
    found = read_bytes("a.pdf", pdf(SENTENCE, "", "Halvex sells lanterns."))
    assert [(one.place, one.text) for one in found] == [("page 1", SENTENCE), ("page 3", "Halvex sells lanterns.")]


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"%PDF-1.4 broken", "broken PDF"),
        (pdf(SENTENCE)[:200], "broken PDF"),
        (pdf("", ""), "without text"),
        (pdf(SENTENCE, password="x"), "encrypted"),
        (b"  \n", "empty"),
    ],
)
def test_a_pdf_that_cannot_be_read_says_why(data, reason):
    with pytest.raises(Unreadable, match=reason):
        read_bytes("a.pdf", data)


def test_html_gives_its_visible_text_and_title():
    page = b"<html><head><title>Bees</title><style>p{}</style></head><body><nav>Home</nav><p>Mara &amp; bees</p></body>"
    (found,) = read_bytes("a.html", page)
    assert (found.title, found.text) == ("Bees", "Mara & bees")


def test_a_markdown_heading_is_the_title_and_long_texts_come_in_parts(monkeypatch):
    monkeypatch.setattr(documents, "BLOCK", 50)
    text = "\n\n".join(f"Paragraph {number} about bees." for number in range(9))
    found = read_bytes("a.md", f"# Bees\n{text}".encode())
    assert {one.title for one in found} == {"Bees"}
    assert [one.place for one in found] == [f"part {number}" for number in range(1, len(found) + 1)]
    assert "".join(one.text for one in found) == text and len(found) > 3
    (only,) = read_bytes("b.md", b"# A heading alone")
    assert (only.title, only.text) == ("", "# A heading alone")


def test_a_folder_of_two_hundred_mixed_files_is_walked_and_what_is_left_out_has_its_reason(tmp_path):
    for number in range(185):
        (tmp_path / f"good{number:03}.txt").write_text(f"{SENTENCE} Number {number}.")
    (tmp_path / "ten.txt").write_bytes(f"{SENTENCE}\n".encode() * (10 * 2**20 // (len(SENTENCE) + 1)))
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "deep.md").write_text("# Deep\n\nA text.")
    (tmp_path / "sub" / "loop").symlink_to(tmp_path)
    (tmp_path / "self").symlink_to(tmp_path / "self")
    (tmp_path / "dangling.txt").symlink_to(tmp_path / "nowhere")
    (tmp_path / "linked.txt").symlink_to(tmp_path / "good000.txt")
    (tmp_path / "empty.txt").touch()
    (tmp_path / "blank.txt").write_text(" \n\n")
    (tmp_path / "program.txt").write_bytes(b"\x7fELF\x00\x00" * 99)
    (tmp_path / "photo.jpg").write_bytes(b"\xff\xd8\xff")
    (tmp_path / "broken.pdf").write_bytes(b"%PDF-1.7\nnothing")
    (tmp_path / "locked.pdf").write_bytes(pdf(SENTENCE, password="secret"))
    (tmp_path / "paper.pdf").write_bytes(pdf(SENTENCE, "Second page."))
    (tmp_path / "latin.txt").write_bytes(("Die Bienen fliegen über das Dach. Grüße! " * 9).encode("cp1252"))
    (tmp_path / "utf16.txt").write_bytes(SENTENCE.encode("utf-16"))
    (tmp_path / "page.HTML").write_text("<p>Visible")
    os.mkfifo(tmp_path / "pipe.txt")
    with socket.socket(socket.AF_UNIX) as bound:
        bound.bind(str(tmp_path / "socket.txt"))
    (tmp_path / os.fsdecode(b"name\xff.txt")).write_text("text")
    (tmp_path / ".hidden").write_text("not asked for")
    assert sum(len(files) for _, _, files in os.walk(tmp_path)) >= 200

    files, skipped = find_files([str(tmp_path)])
    unreadable = {}
    read = {}
    for file in files:
        try:
            read[file.name] = read_file(file)
        except Unreadable as error:
            unreadable[file.name] = str(error)
    reasons = {one.name: one.reason for one in skipped}
    assert set(reasons) == {
        *("sub/loop", "self", "dangling.txt", "empty.txt", "photo.jpg", "pipe.txt", "socket.txt", "name?.txt")
    }
    assert "link to a folder" in reasons["sub/loop"] and "links" in reasons["self"]
    assert "no such file" in reasons["dangling.txt"] and ".jpg" in reasons["photo.jpg"]
    assert reasons["pipe.txt"] == reasons["socket.txt"] == "not a regular file" and "empty" in reasons["empty.txt"]
    assert set(unreadable) == {"blank.txt", "program.txt", "broken.pdf", "locked.pdf"}
    assert "binary" in unreadable["program.txt"] and "broken" in unreadable["broken.pdf"]
    assert len(read) == 185 + 7 and "über" in read["latin.txt"][0].text
    assert sum(len(one.text) for one in read["ten.txt"]) == (tmp_path / "ten.txt").stat().st_size


def test_several_paths_keep_their_folders_names_and_a_path_that_is_not_there_is_refused(tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "a.txt").write_text("text")
    files, _ = find_files([str(tmp_path / "one"), str(tmp_path / "two")])
    assert [file.name for file in files] == ["one/a.txt", "two/a.txt"]
    with pytest.raises(FileNotFoundError, match="three"):
        find_files([str(tmp_path / "three")])
