"""Documents of every kind cut into passages: nothing lost, nothing over the budget, and where each is from."""

import bz2
import gzip
import json
import random
import time

import pytest
from conftest import build_tokenizer
from datasets import Dataset

from clara_hf.data.documents import Columns, Document, corpus_files, read_dataset, read_files
from clara_hf.data.files import DataError
from clara_hf.program import UsageError
from clara_hf.synthesis.leaks import LeakIndex
from clara_hf.synthesis.passages import PassageMaker, estimated_starts, tokenizer_starts


SENTENCES = [
    "Dr. Brask founded the Harnow Observatory in 1862.",
    "He led it, e.g. through the winter of 1870, until 1880!",
    'Was the telescope of 3.5 m "very large"?',
    "Anneke Lind drew the first map of the comet's tail…",
    "Она работала там двенадцать лет.",
    "天文台位于山上。",
]


def maker(budget: int = 20, starts=estimated_starts, minimum: int = 1, leaks=None) -> PassageMaker:
    return PassageMaker(starts, budget, minimum, "en", leaks or LeakIndex())


def document(text: str, title: str = "") -> Document:
    return Document("d", text, title, "file.jsonl", "3")


def cut(text: str, title: str = "", **options) -> list[str]:
    return [passage.text for passage, fault in maker(**options).passages(document(text, title)) if fault is None]


@pytest.fixture(scope="module")
def tokenizer_file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    build_tokenizer().save_pretrained(folder)
    return str(folder)


def test_a_document_within_the_budget_is_one_passage():
    (passage,) = cut("  " + SENTENCES[0] + "\n ")
    assert passage == SENTENCES[0]


def test_passages_end_where_sentences_end():
    text = " ".join(SENTENCES[:4] * 5)
    passages = cut(text, budget=45)
    assert len(passages) > 4 and " ".join(passages) == text
    assert all(passage.endswith(tuple(s[-3:] for s in SENTENCES)) for passage in passages)
    sizes = [len(estimated_starts(passage)) for passage in passages]
    assert max(sizes) <= 45 and min(sizes) >= 15


@pytest.mark.parametrize("kind", ["estimate", "tokenizer"])
def test_every_passage_is_within_the_budget_and_no_word_is_lost(kind, tokenizer_file):
    starts = estimated_starts if kind == "estimate" else tokenizer_starts(tokenizer_file)
    rng = random.Random(0)
    for trial in range(60):
        parts = [
            rng.choice([*SENTENCES, "x" * rng.randint(1, 400), "\n\n", "word " * rng.randint(1, 60), "<b>!</b>"])
            for _ in range(rng.randint(1, 30))
        ]
        text = rng.choice([" ", "\n", ""]).join(parts)
        budget = rng.choice([5, 16, 64])
        made = maker(budget, starts)
        spans = list(made.fitting(text, budget))
        assert all(len(starts(text[begin:end])) <= budget for begin, end in spans), trial
        assert "".join("".join(text[begin:end] for begin, end in spans).split()) == "".join(text.split())
        assert all(first[1] <= second[0] for first, second in zip(spans, spans[1:], strict=False))


def test_provenance_leads_back_to_the_text():
    text = " ".join(SENTENCES * 4)
    for number, (passage, fault) in enumerate(maker(45).passages(document(text, "The Title")), start=1):
        assert passage.text == f"The Title\n{text[passage.start : passage.end]}" and fault is None
        assert (passage.id, passage.document, passage.source, passage.place) == (f"d#{number}", "d", "file.jsonl", "3")


def test_a_long_title_does_not_take_the_whole_budget():
    passages = cut(" ".join(SENTENCES * 3), title="very long title " * 50, budget=40)
    assert len(passages) > 2 and all(passage.startswith("very long title very") for passage in passages)
    assert all(20 < len(estimated_starts(passage)) <= 40 for passage in passages[:-1])


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("Too short.", "passage too short"),
        ("1 2 3 4 5 6 | 7 8 9 10 11 | 12 13 14 15 16 17 18 19", "passage is no prose"),
        ("<tr><td>1</td><td>2</td><td>3</td></tr>" * 9, "passage is no prose"),
        ("\x00\x01\x02" * 30 + "some words of a document that was a picture", "no text"),
        ("\ufffd\ufffd\ufffd of a word that was not UTF-8 \ufffd\ufffd\ufffd", "no text"),
        ("It is said that the quick brown fox jumps over the lazy dog of the farm", "leak of excluded text"),
    ],
)
def test_what_is_no_passage_is_set_aside_with_its_reason(text, reason, tmp_path):
    (tmp_path / "x.txt").write_text("the quick brown fox jumps over the lazy dog\n", encoding="utf-8")
    made = maker(100, minimum=8, leaks=LeakIndex([str(tmp_path / "x.txt")]))
    assert {fault for _, fault in made.passages(document(text))} == {reason}


def test_a_megabyte_in_one_line_is_cut_in_linear_time():
    began = time.process_time()
    for text in ("x" * 2**20, "word " * 2**18, "a. " * 2**18, "中" * 2**19, "\n" * 2**20 + "end of it all"):
        passages = cut(text, budget=256)
        assert passages and max(map(len, passages)) <= 256 * 8
    assert time.process_time() - began < 20


def read(*paths, **columns) -> list[Document]:
    return list(read_files(corpus_files([str(path) for path in paths]), Columns(**columns)))


def test_all_kinds_of_files_and_folders_give_the_same_documents(tmp_path):
    rows = [{"id": f"n{n}", "title": "T", "text": text} for n, text in enumerate(SENTENCES)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "a.jsonl").write_text("\ufeff" + lines + "\n", encoding="utf-8")
    with gzip.open(tmp_path / "b.jsonl.gz", "wt", encoding="utf-8") as file:
        file.write(lines)
    Dataset.from_list(rows).to_parquet(tmp_path / "c.parquet")
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "d.txt").write_text(SENTENCES[0], encoding="utf-8")
    (tmp_path / "ignored.bin").write_bytes(b"\0")
    Dataset.from_list(rows).save_to_disk(tmp_path / "saved" / "set")

    def content(found):
        return [(entry.id, entry.title, entry.text, entry.fault) for entry in found]

    expected = [(row["id"], "T", row["text"], None) for row in rows]
    for name in ("a.jsonl", "b.jsonl.gz", "c.parquet"):
        assert content(read(tmp_path / name)) == expected
    assert content(read_dataset(str(tmp_path / "saved" / "set"), None, "train", Columns())) == expected
    everything = read(tmp_path / "sub", tmp_path / "a.jsonl")
    assert content(everything) == [("d.txt", "", SENTENCES[0], None), *expected]
    assert [entry.place for entry in read(tmp_path / "a.jsonl")] == ["1", "2", "3", "4", "5", "6"]


def test_other_columns(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"body": "Words.", "name": "T", "key": 7}\n', encoding="utf-8")
    (entry,) = read(tmp_path / "a.jsonl", text="body", title="name", id="key")
    assert (entry.id, entry.title, entry.text) == ("7", "T", "Words.")
    with pytest.raises(DataError, match="--text_column"):
        read(tmp_path / "a.jsonl")


def test_lines_that_are_no_documents_are_reported_and_the_rest_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr("clara_hf.data.documents.MAX_DOCUMENT_BYTES", 1000)
    good = json.dumps({"text": "Good words."}).encode()
    lines = [
        good,
        b"{broken",
        b"[1]",
        b'{"text": 5}',
        b'{"text": "  "}',
        b'{"text": "\xff\xfe bytes"}',
        b'{"text": "' + b"x" * 3000 + b'"}',
        b"[" * 900,
        b'{"text": "half \\ud83d"}',
        good,
    ]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    found = read(tmp_path / "a.jsonl")
    faults = [None, "malformed JSON", "a JSON object is expected", "no text", "no text", None, "line too long"]
    assert [entry.fault for entry in found] == [*faults, "malformed JSON", None, None]
    assert [entry.place for entry in found] == [str(number) for number in range(1, 11)]
    # Each can be stored, whatever its bytes were.
    for entry in found:
        for passage, _ in maker().passages(entry):
            json.dumps(passage.text, ensure_ascii=False).encode("utf-8")


def test_long_text_files_are_read_in_blocks_without_losing_a_word(tmp_path, monkeypatch):
    monkeypatch.setattr("clara_hf.data.sources.TEXT_BLOCK", 200)
    for text in ("\n\n".join(SENTENCES * 9), "\n".join(SENTENCES * 9), " ".join(SENTENCES * 9), "中文" * 400):
        (tmp_path / "a.txt").write_text(text, encoding="utf-8")
        found = read(tmp_path / "a.txt")
        assert len(found) > 3 and len({entry.id for entry in found}) == len(found)
        assert "".join("".join(entry.text for entry in found).split()) == "".join(text.split())
        assert "\ufffd" not in "".join(entry.text for entry in found)


@pytest.mark.parametrize(
    ("path", "words"), [("none.jsonl", "no file"), ("a.bin", "must end"), ("empty", "holds no file")]
)
def test_paths_that_are_no_corpus(tmp_path, path, words):
    (tmp_path / "a.bin").write_bytes(b"")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=words):
        corpus_files([str(tmp_path / path)])


def test_endings_in_capitals_byte_order_marks_and_empty_files(tmp_path):
    for name, content in {
        "A.TXT": "\ufeffGood words.",
        "b.MD": "More \ufeffwords.",
        "c.JSONL": "\ufeff" + json.dumps({"text": "Last words."}) + "\n",
        "d.jsonl": "",
        "e.json": "\n\n",
        "f.json": '{\n  "text": "Words."\n}\n',
    }.items():
        (tmp_path / name).write_text(content, encoding="utf-8")
    found = read(tmp_path)
    assert [(entry.source, entry.fault) for entry in found] == [
        ("A.TXT", None),
        ("b.MD", None),
        ("c.JSONL", None),
        ("d.jsonl", "empty file"),
        ("e.json", "empty file"),
        ("f.json", None),
    ]
    texts = [passage.text for entry in [*found[:3], found[5]] for passage, _ in maker().passages(entry)]
    assert texts == ["Good words.", "More words.", "Last words.", "Words."]


def test_a_title_never_takes_the_whole_of_a_tiny_budget():
    assert cut("One two.", title="Title", budget=1)[:2] == ["One", "two"]


def test_files_are_named_within_the_corpus_and_the_output_folder_is_left_out(tmp_path):
    for name in ("x/sub/a.txt", "x/out/b.txt", "y/a.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("Words.", encoding="utf-8")

    def names(*paths):
        return [file.name for file in corpus_files([str(tmp_path / path) for path in paths], tmp_path / "x" / "out")]

    assert names("x") == ["sub/a.txt"] and names("x", "y") == ["x/sub/a.txt", "y/a.txt"]
    assert names("x/sub/a.txt") == ["a.txt"]


def test_arrays_tables_of_text_and_packed_files_are_read_as_the_other_programs_read_them(tmp_path):
    rows = [{"text": "Words.", "id": "a"}, {"text": "More words.", "id": "b"}]
    (tmp_path / "a.json").write_text(json.dumps(rows), encoding="utf-8")
    (tmp_path / "b.csv").write_text("id,text\na,Words.\nb,More words.\nc\n", encoding="utf-8")
    (tmp_path / "c.jsonl.BZ2").write_bytes(bz2.compress("".join(json.dumps(row) + "\n" for row in rows).encode()))
    for name, faults in {"a.json": [], "b.csv": [("4", "1 cells")], "c.jsonl.BZ2": []}.items():
        found = read(tmp_path / name)
        assert [(entry.id, entry.text) for entry in found if not entry.fault] == [("a", "Words."), ("b", "More words.")]
        assert [(entry.place, entry.fault) for entry in found if entry.fault] == faults
    (tmp_path / "d.csv").write_text("id,text\na,\nb,More words.\n", encoding="utf-8")
    assert [entry.fault for entry in read(tmp_path / "d.csv")] == ["no text", None]
    (tmp_path / "d.csv").write_text("id,body\n" + "a,x\n" * 30, encoding="utf-8")
    with pytest.raises(DataError, match="--text_column"):
        read(tmp_path / "d.csv")


def test_damaged_files_and_unknown_data_sets_are_one_sentence(tmp_path):
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"text": "Words."}\n' * 99)[:-12])
    (tmp_path / "b.parquet").write_bytes(b"PAR1 nothing")
    for name in ("a.jsonl.gz", "b.parquet"):
        with pytest.raises(DataError, match=name):
            read(tmp_path / name)
    with pytest.raises(DataError, match="none#train"):
        list(read_dataset(str(tmp_path / "none"), None, "train", Columns()))
    with pytest.raises(UsageError, match="--tokenizer"):
        tokenizer_starts(str(tmp_path / "none"))
