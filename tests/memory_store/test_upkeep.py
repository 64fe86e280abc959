import json
import shutil
from types import SimpleNamespace

import lance
import pyarrow.parquet
import pytest
import torch
from memory_fakes import SpectrumModel, data_files, raise_, replace_bytes

from clara_hf.memory_store import search as search_module
from clara_hf.memory_store.encoding import FITTED
from clara_hf.memory_store.store import CorruptMemoryError, MemoryStore
from clara_hf.memory_store.table.journal import Parts


# pytest drops the filter that modeling_clara sets for it at import.
pytestmark = pytest.mark.filterwarnings("ignore:lance is not fork-safe")

TEXTS = [f"document number {index}" for index in range(1200)]


@pytest.fixture(scope="module")
def filled(tmp_path_factory):
    path = tmp_path_factory.mktemp("filled") / "store"
    store = MemoryStore.open(path, SpectrumModel(), dtype="float32")
    store.add(TEXTS, {"number": list(range(1200))}, show_progress=False)
    return path


@pytest.fixture
def copied(filled, tmp_path):
    return MemoryStore.open(shutil.copytree(filled, tmp_path / "copy"), SpectrumModel())


def memories_of(texts):
    model = SpectrumModel()
    return torch.stack([model.memory(text) for text in texts])


def questions(count=20):
    near = memories_of(TEXTS[:count])
    return near + 0.1 * torch.randn(near.shape, generator=torch.Generator().manual_seed(3))


def recall(found, exact):
    return sum(len(set(a) & set(b)) for a, b in zip(found.keys, exact.keys, strict=True)) / sum(map(len, exact.keys))


@pytest.mark.parametrize(
    ("form", "most"),
    [
        ("rotated8", 1e-4),
        ("rotated4", 0.011),
        ("rotated2", 0.13),
        ("fitted2", 0.03),
        ("fitted1.5", 0.06),
        ("fitted1", 0.15),
    ],
)
def test_a_store_is_recoded_without_compressing_and_added_to_in_its_new_form(copied, form, most):
    store, exact = copied, copied.search(questions(), top_k=5, exact=True)
    keys = store.keys(TEXTS)
    if form in FITTED:
        measured = store.fit(form=form, show_progress=False)
        assert measured["share_of_exact_top_5_before_recoding"] > 0.5
    else:
        store.recode(form)
    assert store.form == form and store.model.compressed == [] and len(store) == 1200
    error = (store.get(keys) - memories_of(TEXTS)).square().sum() / memories_of(TEXTS).square().sum()
    assert error < most
    (new,) = store.add(["a new document"], {"number": [-1]}, show_progress=False)
    reader = MemoryStore.open(store.path)
    assert reader.form == form and reader.get([new]).dtype == torch.float32
    assert (reader.get([new])[0] - store.model.memory("a new document")).norm() < 1.2 * most**0.5 * reader.get(
        [new]
    ).norm()
    assert reader.columns([keys[7], new], ["number"])["number"] == [7, -1]
    # Scores in code space are those of the memories that `get` gives.
    found = reader.search(questions(), top_k=5, exact=True)
    decoded = torch.nn.functional.normalize(reader.get(found.keys[0]).flatten(1), dim=1)
    asked = torch.nn.functional.normalize(questions()[:1].flatten(1), dim=1)
    assert torch.allclose(found.scores[0], (asked @ decoded.T)[0], atol=1e-3)
    assert recall(found, exact) > 0.5
    with pytest.raises(ValueError, match=f"codes of form '{form}'"):
        store.recode("rotated8" if form != "rotated8" else "rotated4")
    with pytest.raises(ValueError, match=f"has form '{form}'"):
        MemoryStore.open(store.path, form="none")


def test_a_new_store_has_the_form_that_it_is_opened_with(path):
    store = MemoryStore.open(path, SpectrumModel(), form="rotated4", dtype="float32")
    keys = store.add(TEXTS[:50], show_progress=False)
    assert MemoryStore.open(path).form == "rotated4"
    assert (store.get(keys) - memories_of(TEXTS[:50])).norm() < 0.11 * store.get(keys).norm()
    with pytest.raises(ValueError, match="form is 'rotated3'"):
        MemoryStore.open(path, form="rotated3")


def test_a_fitted_form_is_refused_for_few_documents_and_its_file_is_checked(copied, path):
    small = MemoryStore.open(path, SpectrumModel(), form="fitted1", dtype="float32")
    keys = small.add(TEXTS[:50], show_progress=False)
    assert torch.equal(small.get(keys), memories_of(TEXTS[:50]))  # as they are, until they are fitted
    with pytest.raises(ValueError, match="at least 1000 documents, and the store at .* has 50"):
        small.fit()
    copied.fit(form="fitted1", show_progress=False)
    (file,) = (copied.path / "_search").glob("fitted-*.safetensors")
    content = file.read_bytes()
    file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CorruptMemoryError, match=file.name):
        MemoryStore.open(copied.path).get(copied.keys(TEXTS[:1]))
    assert list(copied.verify(show_progress=False).files) == [f"_search/{file.name}"]


@pytest.fixture
def small_index(monkeypatch):
    """An index from a thousand rows on."""
    pytest.importorskip("faiss")
    monkeypatch.setattr(search_module, "MOST_LOOSE", 1000)


def test_search_by_sketches_finds_what_exact_search_does_and_is_measured(copied, small_index):
    measured = copied.fit(show_progress=False)
    assert measured["share_of_exact_top_5"] > 0.95 and copied.stats()["fit"]["documents"] == 1200
    assert copied.stats()["indexed"] == 1200
    exact = copied.search(questions(), top_k=5, exact=True)
    for store in (copied, MemoryStore.open(copied.path)):
        found = store.search(questions(), top_k=5)
        assert recall(found, exact) > 0.95
        same = [row for row in range(20) if found.keys[row] == exact.keys[row]]
        assert torch.allclose(found.scores[same], exact.scores[same], atol=1e-5)


def test_few_questions_are_looked_up_by_one_thread_of_faiss_and_many_by_all(copied, small_index):
    copied.fit(show_progress=False)
    faiss, before = search_module.faiss, search_module.faiss.omp_get_max_threads()
    index = copied._searcher.index()
    inner, used = index._faiss, []

    def search(*given):
        used.append(faiss.omp_get_max_threads())
        return inner.search(*given)

    index._faiss = SimpleNamespace(search=search)
    faiss.omp_set_num_threads(3)
    try:
        few = copied.search(memories_of(TEXTS[:2]), top_k=2)
        many = copied.search(memories_of(TEXTS[:40]), top_k=2)
        assert used == [1, 3] and faiss.omp_get_max_threads() == 3 and few.keys == many.keys[:2]
    finally:
        faiss.omp_set_num_threads(before)


def test_search_is_measured_by_questions_of_the_user(copied):
    assert copied.fit(show_progress=False)["kind"] == "memories with noise"
    measured = copied.fit(show_progress=False, questions=TEXTS[:30])
    assert (measured["questions"], measured["kind"]) == (30, "given") and measured["share_of_exact_top_5"] > 0.95
    assert copied.stats()["fit"]["kind"] == "given"
    for wrong, fact in (([], "questions is empty"), (torch.zeros(2, 3, 16), "questions have shape")):
        with pytest.raises(ValueError, match=fact):
            copied.fit(show_progress=False, questions=wrong)


def test_columns_that_are_read_together_are_those_that_are_read_alone(copied, monkeypatch):
    copied.add(TEXTS[:9], {"half": [None if index % 2 else index / 2 for index in range(9)]}, show_progress=False)
    keys = copied.keys(TEXTS[8::-1])
    together = copied.columns(keys)
    assert together["number"] == list(range(8, -1, -1)) and together["half"][:2] == [4.0, None]
    monkeypatch.setattr(type(copied._table), "_take_together", lambda *given: None)
    assert copied.columns(keys) == together


def test_added_documents_are_found_at_once_deleted_ones_never_and_filters_hold(copied, small_index):
    copied.fit(show_progress=False)
    reader = MemoryStore.open(copied.path)
    assert len(reader) == 1200
    (new,) = copied.add(["a new document"], {"number": [-1]}, show_progress=False)
    copied.delete(copied.keys(TEXTS[:1]))
    asked = memories_of(["a new document", TEXTS[0], TEXTS[1]])
    for store in (copied, MemoryStore.open(copied.path)):
        found = store.search(asked, top_k=1)
        assert found.keys[0] == [new] and found.texts[1] != [TEXTS[0]] and found.texts[2] == [TEXTS[1]]
        assert store.search(asked, top_k=3, filter="number > 1190").columns["number"][0] != [-1, 1191, 1192]
        assert all(
            number > 1190 for row in store.search(asked, filter="number > 1190").columns["number"] for number in row
        )
        assert store.search(asked, top_k=1, filter="number > 5 AND number < 900").scores.shape == (3, 1)
    assert reader.search(asked, top_k=1).texts[1] == [TEXTS[0]]  # of the version that it has open


def test_without_an_index_file_or_with_a_damaged_one_search_goes_on_and_fit_makes_it_anew(copied, small_index, caplog):
    copied.fit(show_progress=False)
    (file,) = (copied.path / "_search").glob("index-*.faiss")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    store = MemoryStore.open(copied.path, SpectrumModel())
    assert store.search(memories_of(TEXTS[:1]), top_k=1).texts == [[TEXTS[0]]] and store.stats()["indexed"] == 0
    report = store.verify(repair=True, show_progress=False)
    assert list(report.files) == [f"_search/{file.name}"]
    assert store.verify(show_progress=False).is_sound
    store.fit(show_progress=False)
    assert MemoryStore.open(copied.path).stats()["indexed"] == 1200


def test_sketches_of_a_store_without_faiss_are_compared_one_by_one(copied, monkeypatch):
    monkeypatch.setattr(search_module, "faiss", None)
    assert copied.fit(show_progress=False)["share_of_exact_top_5"] > 0.98
    assert not list((copied.path / "_search").glob("*.faiss"))


# Damage


def test_damage_of_every_kind_is_found_named_and_repaired_where_the_text_is_there(copied):
    copied.fit(show_progress=False)
    keys = copied.keys(TEXTS)
    memory = copied.get([keys[3]]).numpy().tobytes()
    sketch = copied._table.take(copied._table.find([keys[4]]), [copied._table.sketch_column])
    sketch = sketch.column(0).combine_chunks().flatten().to_numpy().tobytes()
    for old in (memory, sketch):
        replace_bytes(copied.path, old, old[:-1] + bytes([old[-1] ^ 1]))
    replace_bytes(copied.path, b"number 777document", b"number 7x7document")
    store = MemoryStore.open(copied.path, SpectrumModel())
    with pytest.raises(CorruptMemoryError, match=keys[3]):
        store.get(keys)
    report = store.verify(show_progress=False)
    assert report.damaged == {keys[3]: ["memory"], keys[4]: [store._table.sketch_column], keys[777]: ["text"]}
    report = store.verify(repair=True, show_progress=False)
    assert sorted(report.repaired) == sorted([keys[3], keys[4]]) and list(report.unrepaired) == [keys[777]]
    assert store.verify(show_progress=False).is_sound and len(store) == 1199
    rest = [index for index in range(1200) if index != 777]
    assert torch.equal(store.get([keys[index] for index in rest]), memories_of([TEXTS[index] for index in rest]))
    assert store.columns([keys[3], keys[4]], ["number"])["number"] == [3, 4]


def test_damaged_bases_are_told_and_all_memories_are_made_anew(copied):
    copied.fit("fitted2", show_progress=False)
    before, calls = copied.get(list(copied)), len(copied.model.batches)
    (file,) = (copied.path / "_search").glob("fitted-*.safetensors")
    content = file.read_bytes()
    file.write_bytes(content[:500] + bytes([content[500] ^ 1]) + content[501:])
    store = MemoryStore.open(copied.path)
    assert list(store.verify(repair=True, show_progress=False).files) == [f"_search/{file.name}"]
    with pytest.raises(CorruptMemoryError, match=file.name):
        store.get(list(store)[:1])
    report = MemoryStore.open(copied.path, copied.model).verify(repair=True, show_progress=False)
    assert report.repaired == list(store) and not report.unrepaired and len(copied.model.batches) > calls
    mended = MemoryStore.open(copied.path, copied.model)
    assert mended.form == "fitted2" and mended.verify(show_progress=False).is_sound
    assert torch.equal(mended.get(list(mended)), before)
    assert mended.columns(mended.keys(TEXTS[:2]), ["number"]) == {"number": [0, 1]}


def test_a_damaged_manifest_is_one_sentence(copied):
    for manifest in (copied.path / "_versions").glob("*.manifest"):
        manifest.write_bytes(manifest.read_bytes()[:40])
    with pytest.raises(CorruptMemoryError, match="cannot be opened"):
        MemoryStore.open(copied.path)


@pytest.mark.parametrize("wrong", [{}, {"maker": 3}, {"maker": {"fingerprint": 1}}, {"dtype": "int3"}, {"form": "zip"}])
def test_a_damaged_description_is_one_sentence(copied, wrong):
    dataset = lance.dataset(str(copied.path))
    known = json.loads(dataset.schema.metadata[b"clara.memory_store"])
    value = json.dumps({**known, **wrong} if wrong else {"format": 2})
    dataset.update_schema_metadata({"clara.memory_store": value}, replace=True)
    with pytest.raises(CorruptMemoryError, match="description"):
        MemoryStore.open(copied.path)


def test_sketches_are_exported_with_keys_texts_and_columns(copied, tmp_path):
    with pytest.raises(ValueError, match="no sketches"):
        copied.export_sketch(tmp_path / "sketches.parquet")
    copied.fit(show_progress=False)
    assert copied.export_sketch(tmp_path / "sketches.parquet") == 1200
    found = pyarrow.parquet.read_table(tmp_path / "sketches.parquet")
    assert found.schema.names == ["key", "sketch", "text", "number"] and len(found) == 1200
    sketches = torch.tensor(found["sketch"].to_pylist())
    asked = copied.sketch_questions(memories_of(TEXTS[5:6]))
    best = int((asked @ sketches.T).argmax())
    assert found["text"][best].as_py() == TEXTS[5]


def test_a_reader_goes_on_while_the_store_is_recoded_and_compacted(copied):
    reader, keys = MemoryStore.open(copied.path), copied.keys(TEXTS)
    before = reader.get(keys[:5])
    copied.recode("rotated8")
    assert torch.equal(reader.get(keys[:5]), before)  # of the version that it has open
    copied.compact()
    assert torch.allclose(reader.get(keys[:5]), before, rtol=0.05, atol=0.1) and len(data_files(copied.path)) == 1


def test_compacting_removes_what_a_killed_writer_left_and_keeps_what_is_announced(copied, monkeypatch):
    before, table = set(data_files(copied.path)), copied._table
    with monkeypatch.context() as patched:
        patched.setattr(Parts, "announce", lambda *given: raise_(RuntimeError("killed")))
        with pytest.raises(RuntimeError, match="killed"):
            copied.add(["left"], {"number": [-1]}, show_progress=False)
    (left,) = set(data_files(copied.path)) - before
    arrays, made = table.arrays({"number": [-2]}), table.form.encode(memories_of(["waits"]).flatten(1)).numpy()
    table.write_part(copied.keys(["waits"]), ["waits"], [made], arrays, [])
    copied.compact()
    assert not left.exists()
    assert copied.columns(copied.keys(["waits"])) == {"text": ["waits"], "number": [-2]} and len(copied) == 1201
    assert copied.verify(show_progress=False).is_sound


def test_a_damaged_record_of_deleted_rows_is_named_before_it_is_read_and_mended(copied, tmp_path):
    copied.delete(copied.keys(TEXTS[3:5]))
    copied.copy_to(tmp_path / "other")
    for path in (copied.path, tmp_path / "other"):
        (file,) = (path / "_deletions").iterdir()
        content = file.read_bytes()
        for place in range(0, len(content), 50):
            file.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
            with pytest.raises(CorruptMemoryError, match=file.name):
                len(MemoryStore.open(path))
        store = MemoryStore.open(path, SpectrumModel())
        assert list(store.verify(show_progress=False).files) == [f"_deletions/{file.name}"]
        assert list(store.verify(repair=True, show_progress=False).files) == [f"_deletions/{file.name}"]
        assert file.read_bytes() == content and store.verify(show_progress=False).is_sound
        assert len(store) == 1198 and not set(copied.keys(TEXTS[3:5])) & set(store)
    (copy,) = (copied.path / "_search").glob("deleted-*")
    copy.write_bytes(b"else")
    assert list(copied.verify(repair=True, show_progress=False).files) == [f"_search/{copy.name}"]
    assert copied.verify(show_progress=False).is_sound
    copied.delete(copied.keys(TEXTS[5:7]))
    copied.compact()
    assert len(list((copied.path / "_search").glob("deleted-*"))) == len(list((copied.path / "_deletions").iterdir()))
    assert len(MemoryStore.open(copied.path)) == 1196
