import io
import json
import os

import pytest
import torch


pytest.importorskip("fastapi")
pytest.importorskip("bs4")

from clara_hf.cli import main
from clara_hf.memory_store import MemoryStore
from clara_hf.serving import ask
from clara_hf.serving import library as library_module
from clara_hf.serving.library import FileEntry, Library, PassageRow


pytest_plugins = ["served"]
pytestmark = pytest.mark.filterwarnings("ignore:lance is not fork-safe")
QUESTION = "Who keeps bees?"


@pytest.fixture(scope="module")
def checkpoint(served_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    served_model.save_pretrained(folder)
    served_model.processor.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "notes"
    folder.mkdir()
    (folder / "mara.md").write_text("# Mara\n\nMara Brandel keeps bees. She lives in Velholm on the river Aum. " * 3)
    (folder / "halvex.html").write_text("<title>Halvex</title><p>Halvex sells lanterns to sailors.</p>")
    (folder / "reserved.txt").write_text("This holds <MEM0>, which is a token.")
    (folder / "empty.txt").touch()
    return folder


def asked(capsys, *arguments) -> dict:
    ask.main([*map(str, arguments), "--once", QUESTION, "--json"])
    return json.loads(capsys.readouterr().out.splitlines()[-1])


def test_a_folder_is_taken_in_and_answers_as_generate_does(folder, checkpoint, served_model, capsys):
    found = asked(capsys, folder, "--model", checkpoint)
    store = MemoryStore.open(folder.with_name("notes.clara"))
    memories = store.get(list(store)).to(served_model.dtype)
    wanted = served_model.generate([QUESTION], memories=memories)
    assert found["answer"] == wanted.texts[0]
    assert [one["score"] for one in found["documents"]] == pytest.approx(wanted.scores[0].tolist(), abs=1e-6)
    assert {one["name"] for one in found["skipped"]} == {"empty.txt", "reserved.txt"}
    for one in found["documents"]:
        assert one["filename"] in ("mara.md", "halvex.html")
        assert len(one["text"]) >= one["end"] - one["start"] > 0


def test_a_second_run_needs_no_model_name_and_takes_up_only_what_changed(folder, checkpoint, capsys, monkeypatch):
    asked(capsys, folder, "--model", checkpoint)
    compressed = []
    add = MemoryStore.add
    monkeypatch.setattr(
        MemoryStore, "add", lambda self, texts, **how: compressed.append(texts) or add(self, texts, **how)
    )
    asked(capsys, folder)
    assert compressed == []
    (folder / "halvex.html").unlink()
    (folder / "new.txt").write_text("Otto mends clocks.")
    asked(capsys, folder)
    assert compressed == [["Otto mends clocks."]]
    (folder / "new.txt").write_text("Otto mends watches.")
    os.utime(folder / "new.txt", (1, 1))
    found = asked(capsys, folder, "--n-docs", 50)
    assert {one["filename"] for one in found["documents"]} == {"mara.md", "new.txt"}
    assert [one["text"] for one in found["documents"] if one["filename"] == "new.txt"] == ["Otto mends watches."]


def test_the_terminal_shows_the_answer_its_passages_and_what_was_skipped(folder, checkpoint, capsys):
    found = asked(capsys, folder, "--model", checkpoint)
    ask.main([str(folder), "--once", QUESTION])
    out, err = capsys.readouterr()
    assert out.strip().startswith(found["answer"])
    for one in found["documents"]:
        assert one["filename"] in out and f"{one['score']:.3f}" in out and f"passage {one['number']}" in out
    assert "empty.txt: empty" in err


def test_questions_are_read_line_by_line_and_a_bad_one_does_not_end_it(folder, checkpoint, capsys, monkeypatch):
    found = asked(capsys, folder, "--model", checkpoint)
    monkeypatch.setattr("sys.stdin", io.StringIO(f"\n{QUESTION}\nWhat is <MEM0>?\n{QUESTION}\n"))
    ask.main([str(folder)])
    out, err = capsys.readouterr()
    assert out.count(found["answer"]) >= 2 and "<MEM0>" in err


@pytest.mark.parametrize(
    ("arguments", "facts"),
    [
        (["{folder}", "--once", "Who?"], ["--model", "notes.clara"]),
        (["{folder}/nothing", "--model", "{model}"], ["nothing"]),
        (["{folder}/empty.txt", "--model", "{model}", "--once", "Who?"], ["empty.txt", "skipped"]),
        (["{folder}", "--model", "{model}", "--json"], ["--json", "--once"]),
        (["{folder}", "--model", "{model}", "--once", " "], ["questions[0]", "empty"]),
    ],
)
def test_what_cannot_be_done_is_one_sentence(folder, checkpoint, arguments, facts, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["clara"])
    arguments = [text.format(folder=folder, model=checkpoint) for text in arguments]
    with pytest.raises(SystemExit) as ended:
        main(["ask", *arguments])
    (said,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("clara ask: error: ")]
    assert ended.value.code in (1, 2) and all(fact in said for fact in facts)


def test_a_store_without_files_of_ours_is_one_file(tmp_path, served_model):
    store = MemoryStore.open(tmp_path / "plain", served_model)
    store.add(["Otto mends clocks.", "Selma paints doors."], show_progress=False)
    for read_only in (True, False, True):
        library = Library.open(tmp_path / "plain", served_model, read_only)
        (file,) = library.files()
        assert (file.name, file.passages, len(library)) == ("plain", 2, 2)
        assert {hit.filename for hit in library.search(["Who?"], 2)[0]} == {"plain"}
        library.close()
    assert (tmp_path / "plain" / "files.sqlite").exists()


def test_a_collection_too_large_for_the_memory_is_searched_in_its_store(tmp_path, served_model, monkeypatch):
    library = Library.open(tmp_path / "notes", served_model)
    texts = [f"Note {number} is about hive {number * 7}." for number in range(30)]
    library.add([FileEntry(f"{number}.txt", [PassageRow(text, "", 0, 9)], 9) for number, text in enumerate(texts)])
    library.store.add(["A stray that no file has."], show_progress=False)
    questions = ["Which note is about hive 7?", "Who?"]
    inside = library.search(questions, 4)
    monkeypatch.setattr(library_module, "RESIDENT_BYTES", 0)
    other = Library.open(tmp_path / "notes", served_model, read_only=True)
    outside = other.search(questions, 4)
    for row, expected in zip(outside, inside, strict=True):
        assert [hit.filename for hit in row] == [hit.filename for hit in expected]
        assert [hit.score for hit in row] == pytest.approx([hit.score for hit in expected], abs=1e-5)
    keys = [hit.key for hit in inside[0]]
    assert torch.equal(other.memories(keys), library.memories(keys))


def test_a_removed_file_leaves_no_memory_that_another_does_not_need(tmp_path, served_model):
    library = Library.open(tmp_path / "notes", served_model)
    rows = [[PassageRow(text, "", 0, 9) for text in some] for some in (["shared", "own"], ["shared", "other"])]
    first, second = library.add([FileEntry(str(number), some, 9) for number, some in enumerate(rows)])
    assert library.remove(first.id) and not library.remove(first.id)
    assert set(library.store.columns(list(library.store), ["text"])["text"]) == {"shared", "other"}
    assert {hit.text for hit in library.search(["Who?"], 9)[0]} == {"shared", "other"}
    library.record([FileEntry("new", rows[1][:1], 9, replaces=second.id)])
    assert [(file.name, file.passages) for file in library.files()] == [("new", 1)] and len(library) == 1
