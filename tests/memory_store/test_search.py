import os
import shutil
import subprocess
import sys
import tempfile

import pytest
import torch
from conftest import TEXTS
from memory_fakes import DOCUMENTS, SpectrumModel, expected, replace_bytes

from clara_hf.memory_store.store import CorruptMemoryError, MemoryStore
from clara_hf.memory_store.table.snapshot import unpacked


# pytest drops the filter that modeling_clara sets for it at import.
pytestmark = pytest.mark.filterwarnings("ignore:lance is not fork-safe")


def cosines(questions, documents):
    left, right = (torch.nn.functional.normalize(rows.flatten(1).double(), dim=1) for rows in (questions, documents))
    return left @ right.T


def test_exact_search_finds_what_the_product_with_all_memories_says(store, monkeypatch):
    monkeypatch.setattr("clara_hf.memory_store.table.rows.READ_ROWS", 7)
    store.write_bytes = 1
    keys = store.add(DOCUMENTS, {"index": list(range(40))}, batch_size=8, show_progress=False)
    questions = torch.randn(5, 2, 8)
    best = cosines(questions, expected(DOCUMENTS)).topk(6, dim=1)
    found = store.search(questions, top_k=6, exact=True)
    assert found.scores.dtype == torch.float32 and torch.allclose(found.scores.double(), best.values, atol=1e-6)
    assert found.keys == [[keys[index] for index in row] for row in best.indices.tolist()]
    assert found.texts == [[DOCUMENTS[index] for index in row] for row in best.indices.tolist()]
    assert found.columns == {"index": best.indices.tolist()}
    assert [memories.shape for memories in store.get(found.keys)] == [(6, 2, 8)] * 5


def test_exact_search_asks_no_index_and_an_index_is_asked_for_as_many_as_are_wanted(path, monkeypatch):
    store = MemoryStore.open(path, SpectrumModel(), dtype="float32")
    keys = store.add([f"document number {index}" for index in range(1000)], show_progress=False)
    store.fit(show_progress=False)
    question = store.get(keys[:1])
    assert store.search(question, top_k=150).scores.shape == (1, 150)
    monkeypatch.setattr("clara_hf.memory_store.search.Searcher._candidates", None)
    assert store.search(question, top_k=150, exact=True).keys[0][0] == keys[0]
    with pytest.raises(TypeError):
        store.search(question, top_k=150)


def test_questions_as_texts_are_read_by_the_model_and_fewer_documents_than_top_k_are_all_found(store):
    keys = store.add(DOCUMENTS[:3], show_progress=False)
    found = store.search([DOCUMENTS[1]], top_k=5)
    assert found.keys[0][0] == keys[1] and sorted(found.keys[0]) == sorted(keys)
    assert found.scores[0, 0].item() == pytest.approx(1)
    assert MemoryStore.open(store.path).search(expected([DOCUMENTS[2]]), top_k=1).texts == [[DOCUMENTS[2]]]


@pytest.mark.parametrize(
    ("condition", "chosen"),
    [
        ("year >= 38", [38, 39]),
        ("title LIKE 'A%' AND year < 9", [0, 3, 6]),
        ("text LIKE '%number 7 %'", [7]),
        ("year < 0", []),
    ],
)
def test_a_filter_keeps_the_rows_for_which_it_holds(store, condition, chosen):
    titles = [f"{'ABC'[index % 3]}{index}" for index in range(40)]
    keys = store.add(DOCUMENTS, {"title": titles, "year": list(range(40))}, show_progress=False)
    found = store.search(expected(DOCUMENTS[:2]), top_k=40, filter=condition)
    assert sorted(found.keys[0]) == sorted(keys[index] for index in chosen) and found.scores.shape == (2, len(chosen))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"questions": torch.zeros(1, 3, 8)}, r"\(1, 3, 8\)"),
        ({"questions": torch.full((1, 2, 8), float("nan"))}, "not finite"),
        ({"questions": "one question"}, "'one question'"),
        ({"questions": torch.ones(1, 2, 8), "top_k": 0}, "top_k is 0"),
        ({"questions": torch.ones(1, 2, 8), "filter": "nothing = 3"}, "'nothing = 3'"),
        ({"questions": torch.ones(1, 2, 8), "filter": "; DROP"}, "'; DROP'"),
    ],
)
def test_what_cannot_be_searched_for_is_refused(store, arguments, message):
    store.add(DOCUMENTS[:3], show_progress=False)
    with pytest.raises(ValueError, match=message):
        store.search(**arguments)


def test_search_does_not_score_a_damaged_memory(store, path):
    keys = store.add(DOCUMENTS, show_progress=False)
    memory = expected([DOCUMENTS[3]]).numpy().tobytes()
    replace_bytes(path, memory, memory[:-1] + bytes([memory[-1] ^ 1]))
    with pytest.raises(CorruptMemoryError, match=keys[3]):
        MemoryStore.open(path).search(expected(DOCUMENTS[:1]))


# Deleting and updating


def test_deleted_documents_are_gone_for_this_store_and_for_others(store, path):
    keys = store.add(DOCUMENTS, show_progress=False)
    reader = MemoryStore.open(path)
    assert len(reader) == 40
    store.delete([keys[3], keys[3], keys[7]])
    left = [key for key in keys if key not in (keys[3], keys[7])]
    assert len(store) == 38 and torch.equal(store.get(left[:5]), expected([*DOCUMENTS[:3], *DOCUMENTS[4:6]]))
    assert len(MemoryStore.open(path)) == 38 and len(reader) == 40
    assert keys[3] not in store.search(expected([DOCUMENTS[3]]), top_k=38).keys[0]
    with pytest.raises(KeyError, match=keys[3]):
        store.delete([keys[0], keys[3]])
    assert keys[0] in store


def test_updating_gives_new_values_and_a_new_text_a_new_key_with_the_old_columns(store):
    keys = store.add(DOCUMENTS[:3], {"title": list("abc"), "year": [1, 2, 3]}, show_progress=False)
    assert store.update(keys[1:], columns={"year": [20, 30]}) == keys[1:]
    assert store.columns(keys)["year"] == [1, 20, 30] and len(store.model.compressed) == 3
    new = store.update([keys[0]], documents=["another text"], columns={"year": [10]}, show_progress=False)
    assert new == store.keys(["another text"]) and keys[0] not in store and len(store) == 3
    assert store.columns(new) == {"text": ["another text"], "title": ["a"], "year": [10]}


# Costs of adding


def test_the_compressor_is_fingerprinted_once_and_again_when_its_weights_are_not_as_they_were(store):
    before = store.model.fingerprinted
    for number in range(5):
        store.add([f"text {number}"], show_progress=False)
    assert store.model.fingerprinted <= before + 1
    store.model.fingerprint = "c" * 64
    with pytest.raises(ValueError, match="compressor has changed"):
        store.add(["one"])


def test_many_single_additions_leave_few_files_and_compacting_leaves_one(store, path):
    keys = [store.add([f"text {number}"], show_progress=False)[0] for number in range(150)]
    assert len(store._table.snapshot().pieces) <= 65
    reader = MemoryStore.open(path)
    reader.get(keys[:1])
    store.compact()
    assert len(list((path / "data").glob("*.lance"))) == 1 and len(list((path / "_versions").glob("*.manifest"))) == 1
    texts = [f"text {number}" for number in range(150)]
    for some in (store, reader, MemoryStore.open(path)):
        assert torch.equal(some.get(keys), expected(texts)) and len(some) == 150


ADD_AS_NOBODY = """
import sys, os
sys.path[:0] = sys.argv[3:]
from memory_fakes import DOCUMENTS, FakeModel
from clara_hf.memory_store.store import MemoryStore
import lance.optimize, lance.udf, encodings.idna
os.setgid(65534); os.setuid(65534)
store = MemoryStore.open(sys.argv[1], FakeModel())
keys = store.add(DOCUMENTS[:3], show_progress=False)
assert len(store.get(keys)) == 3 and len(store.search(["a question"]).keys[0]) == 3
try:
    store.add(DOCUMENTS[:4], show_progress=False)
except OSError as error:
    print(error)
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="needs to become another user")
def test_a_store_that_cannot_be_written_to_is_read_and_added_to_as_long_as_nothing_is_missing(store, path):
    store.add(DOCUMENTS[:3], show_progress=False)
    # Not below pytest's own folder, which other users may not enter.
    home = tempfile.mkdtemp()
    shared = shutil.copytree(path, os.path.join(home, "store"))
    try:
        subprocess.run(["chmod", "-R", "a+rX,go-w", home], check=True)
        command = [sys.executable, "-c", ADD_AS_NOBODY, shared, "", os.path.dirname(os.path.dirname(__file__)), "."]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HOME": home})
    finally:
        shutil.rmtree(home)
    assert "read-only" in done.stdout and "1 documents" in done.stdout, done.stderr[-1000:]


def test_a_model_retrieves_and_answers_from_a_store_as_from_its_memories(clara, path):
    texts = [f"{text} It is {number}." for number in range(4) for text in TEXTS]
    store = MemoryStore.open(path, clara, dtype="float32")
    memories = store.get(store.add(texts, show_progress=False))
    questions = ["Who keeps bees?", "Where is Mara?"]
    ranked = clara.retrieve(questions, memories, top_k=3)
    found = clara.retrieve(questions, store, top_k=3)
    assert torch.allclose(found.scores, ranked.scores.float(), atol=1e-5)
    chosen = [[texts[index] for index in row] for row in ranked.indices.tolist()]
    assert found.texts == chosen
    answers = clara.generate(questions, store=store, top_k=3, max_new_tokens=4)
    assert answers.texts == clara.generate(questions, memories=memories, top_k=3, max_new_tokens=4).texts
    expanded = clara.generate(questions, store=store, n_docs=3, expand=2, max_new_tokens=4)
    same = clara.generate(questions, documents=chosen, n_docs=3, rerank=False, expand=2, max_new_tokens=4)
    assert expanded.texts == same.texts and expanded.keys == answers.keys
    with pytest.raises(ValueError, match="one of documents, memories and store"):
        clara.generate(questions, store=store, memories=memories)


# Words beside memories


def test_hybrid_search_fuses_both_rankings_and_is_never_stale(path):
    store = MemoryStore.open(path, SpectrumModel(), dtype="float32")
    texts = [f"document number {index} about goats" for index in range(300)] + ["a zebra in Galholm"]
    store.add(texts, {"number": list(range(301))}, show_progress=False)
    question = ["the zebra of number 17"]
    with pytest.raises(ValueError, match="index_texts"):
        store.search(question, hybrid=True)
    store.index_texts()

    def first(word):
        """The text with a word among the best, which are the nearest memory and the best text at least."""
        for some in (store, MemoryStore.open(path, SpectrumModel())):
            found = some.search([word], top_k=2, hybrid=True)
        return next((text for text in found.texts[0] if word in text), None)

    assert first("zebra") == "a zebra in Galholm" and first("okapi") is None
    found = store.search(question, top_k=301, hybrid=True)
    nearest = store.search(question, top_k=301).keys[0]
    words = unpacked(store._table.texts.search(question[0], 301, None))
    assert store.columns(words[:2], ["text"])["text"] == [texts[300], texts[17]]
    slow = {key: sum(1 / (61 + some.index(key)) for some in (nearest, words) if key in some) for key in nearest}
    assert found.scores[0].tolist() == pytest.approx(sorted(slow.values(), reverse=True)[: len(found.keys[0])])
    assert [slow[key] for key in found.keys[0]] == pytest.approx(found.scores[0].tolist())
    # Each change of the store, at once and after the next ones.
    store.add(["an okapi"], {"number": [301]}, show_progress=False)
    assert first("okapi") == "an okapi" and first("zebra")
    store.delete(store.keys(["a zebra in Galholm"]))
    assert first("zebra") is None and first("okapi")
    (key,) = store.update(store.keys(["an okapi"]), ["a quagga"], show_progress=False)
    store.update([key], columns={"number": [7]}, show_progress=False)
    assert first("okapi") is None and first("quagga")
    assert store.search(["quagga"], top_k=1, hybrid=True, filter="number = 8").texts == [[texts[8]]]
    for change in (store.compact, lambda: store.recode("rotated8"), store.compact, store.index_texts):
        change()
        assert first("quagga") and first("zebra") is None and first("okapi") is None
        assert (
            len(store._table.texts.indexes()) == len(store._table.snapshot().pieces) == 1
            and store.verify(show_progress=False).is_sound
        )
    with pytest.raises(ValueError, match="as texts"):
        store.search(torch.stack([SpectrumModel().memory("one")]), hybrid=True)


def test_damage_in_the_index_of_the_texts_is_an_error_and_made_anew(path):
    store = MemoryStore.open(path, SpectrumModel(), dtype="float32")
    store.add([f"document number {index}" for index in range(50)], show_progress=False)
    store.index_texts()
    files = sorted((path / "_indices").rglob("*.lance"))
    assert len(files) >= 3
    for file in files:
        content = bytearray(file.read_bytes())
        content[len(content) // 2] ^= 4
        file.write_bytes(content)
        reader = MemoryStore.open(path, SpectrumModel())
        with pytest.raises(CorruptMemoryError, match=file.name):
            reader.search(["number 7"], hybrid=True)
        assert list(store.verify(show_progress=False).files) == [str(file.relative_to(path))]
        content[len(content) // 2] ^= 4
        file.write_bytes(content)
    file.write_bytes(content[:-1])
    assert store.verify(repair=True, show_progress=False).files and store.verify(show_progress=False).is_sound
    assert store.search(["7"], top_k=1, hybrid=True).texts == [["document number 7"]]
