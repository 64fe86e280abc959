"""The nano world: determinism, disjoint splits, one right answer per question, budgets, tokenizer, spread."""

import importlib.util
import json
import random
import re
import sys
from collections import Counter
from pathlib import Path

import pytest


NANO = Path(__file__).resolve().parents[2] / "recipes" / "nano"
BUDGET = 60


def load(name: str):
    """A module of the recipe folder; the folder joins the path only while its modules import each other."""
    sys.path.insert(0, str(NANO))
    try:
        spec = importlib.util.spec_from_file_location(f"nano_{name}", NANO / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        sys.modules[spec.name] = module
        spec.loader.exec_module(module)
        return module
    finally:
        sys.path.remove(str(NANO))


world = load("world")
lexicon = sys.modules["lexicon"]
STOP = set(
    "a all among an any and as at between by every for from had has in into is it its of off on one out over the "
    "through to two under up was with".split()
)


@pytest.fixture(scope="module")
def rows():
    small = {"train": {"person": 80, "place": 40, "company": 40, "work": 40}}
    small |= {split: world.ENTITIES[split] for split in ("validation", "test")}
    patch = pytest.MonkeyPatch()
    patch.setattr(world, "ENTITIES", small)
    patch.setattr(world, "QUESTIONS", world.QUESTIONS | {"instruct_train": 60, "joint_train": 60})
    yield world.generate(seed=0)
    patch.undo()


@pytest.fixture(scope="module")
def tokenizer():
    return load("tokenizer").make_tokenizer()


@pytest.fixture(scope="module")
def questions():
    """Test-split questions with their candidates as entities."""
    rng = random.Random(1)
    made = world.World("test", world.ENTITIES["test"], rng)
    drawn = [world.random_question(made, rng) for _ in range(300)]
    return [(question, world.candidates(made, question, rng)) for question in drawn]


def test_wordings_of_one_value_share_no_content_word():
    for attribute in (a for attributes in lexicon.ATTRIBUTES.values() for a in attributes):
        assert len(set(attribute.values)) == len(attribute.values) >= 12
        for value, wordings in zip(attribute.values, attribute.wordings, strict=True):
            assert len(wordings) == 3 and value in wordings[0]
            words = [set(re.findall(r"[a-z']+", wording)) - STOP for wording in wordings]
            assert not words[0] & words[1] and not words[0] & words[2] and not words[1] & words[2], (value, words)


def test_same_seed_gives_the_same_world_and_another_seed_another():
    counts = {"person": 30, "place": 15, "company": 15, "work": 15}

    def documents(seed):
        return [entity.document for entity in world.World("test", counts, random.Random(seed)).entities]

    assert documents("0") == documents("0")
    assert documents("0") != documents("1")


def test_splits_share_no_word_of_a_name_and_test_names_consist_of_training_pieces():
    for category, endings in lexicon.ENDINGS.items():
        words = {split: set(world.name_words(split, category)) for split in world.SPLITS}
        assert not words["train"] & (words["test"] | words["validation"]) and not words["test"] & words["validation"]
        beginnings = {b for b in lexicon.BEGINNINGS if any(b + e in words["train"] for e in endings)}
        for word in words["test"]:
            assert any(b + e == word for b in beginnings for e in endings)


def test_documents_of_a_split_name_only_its_own_words(rows):
    for name, found in rows.items():
        split = name.rpartition("_")[2]
        own = {word for category in lexicon.ENDINGS for word in world.name_words(split, category)}
        foreign = {w for s in world.SPLITS for c in lexicon.ENDINGS for w in world.name_words(s, c)} - own
        text = " ".join(doc for row in found for doc in row["docs"])
        assert not set(re.findall(r"\w+", text)) & foreign


def test_rows_follow_the_schema(rows):
    assert set(rows) == {f"{n}_{s}" for n in ("scp", "instruct", "joint") for s in ("train", "validation")} | {"test"}
    for name, found in rows.items():
        for row in found:
            if name.startswith("scp"):
                assert row["data_type"] in ("qa", "paraphrase") and len(row["docs"]) == 1
                expected = len(row["question"]) if row["data_type"] == "qa" else 1
                assert len(row["answers"]) == expected and (row["data_type"] == "qa") == bool(row["question"])
                continue
            assert row["type"] in ("single", "two-hop") and len(set(row["docs"])) == len(row["docs"])
            assert len(row["pos_index"]) == (1 if row["type"] == "single" else 2)
            assert all(0 <= index < len(row["docs"]) for index in row["pos_index"])
            assert len(row["docs"]) == 20 if not name.startswith("instruct") else 1 <= len(row["docs"]) <= 5
    kinds = Counter(row["type"] for row in rows["test"])
    assert kinds["single"] >= 400 and kinds["two-hop"] >= 120


def test_the_gold_document_tells_the_answer_in_one_of_its_wordings(rows):
    for row in rows["test"]:
        if row["type"] == "single":
            told = row["docs"][row["pos_index"][0]]
            assert any(answer in told for answer in row["answers"])


def test_a_two_hop_answer_takes_a_fact_from_each_document(questions):
    for question, _ in questions:
        if question.type == "two-hop":
            parts = question.answers[0].split(" and ")
            assert len(parts) == 2
            for part, gold in zip(parts, question.gold, strict=True):
                told = [world.CLOSED[gold.kind][key] for key in world.closed_said(gold)]
                assert part in [attribute.values[gold.values[attribute.key]] for attribute in told]


def test_two_hop_questions_name_the_first_document_and_describe_the_second(questions):
    for question, _ in questions:
        if question.type == "two-hop":
            first, second = question.gold
            assert question.named and first.name in question.text and first.name not in second.document
            assert second.name not in question.text and second.name in first.document


def test_no_other_candidate_fits_a_name_or_description(questions):
    for question, docs in questions:
        assert [entity for entity in docs if world.matches(entity, question)] == question.gold[:1]
        if question.type == "two-hop":
            assert question.gold[1] in question.gold[0].links.values()
            assert [entity for entity in docs if world.fits(entity, question.gold[1], question.hint)] == question.gold[
                1:
            ]


def test_described_questions_have_many_candidates_that_share_a_described_fact(questions):
    counts = []
    for question, docs in questions:
        if described := question.described or question.hint:
            gold = question.gold[-1]
            counts.append(sum(e is not gold and any(gold.shares(e, key) for key in described) for e in docs))
    assert min(counts) >= 4 and sum(counts) / len(counts) >= 7


def test_descriptions_use_other_words_than_the_gold_document(questions):
    for question, _ in questions:
        for gold, wordings in ((question.gold[0], question.described), (question.gold[-1], question.hint)):
            for key, wording in wordings.items():
                assert key in gold.said and world.predicate(gold, key, wording) not in gold.document


def test_bm25_finds_few_of_the_right_documents(rows):
    bm25s = pytest.importorskip("bm25s")
    stemmer = pytest.importorskip("Stemmer").Stemmer("english")
    single = [row for row in rows["test"] if row["type"] == "single"]
    found = 0
    for row in single:
        index = bm25s.BM25()
        index.index(bm25s.tokenize(row["docs"], stemmer=stemmer, show_progress=False), show_progress=False)
        query = bm25s.tokenize([row["question"]], stemmer=stemmer, show_progress=False)
        best, _ = index.retrieve(query, k=1, show_progress=False)
        found += int(best[0, 0]) in row["pos_index"]
    assert found / len(single) < 0.55


def test_answers_cannot_be_guessed_from_the_question_form(rows):
    """Guessing, for each first five words of a question, their most frequent answer is right in few cases."""
    answers: dict[str, Counter] = {}
    for row in rows["test"]:
        form = " ".join(row["question"].split()[:4])
        answers.setdefault(form, Counter())[row["answers"][0]] += 1
    large = [count for count in answers.values() if sum(count.values()) >= 20]
    assert large
    for count in large:
        assert max(count.values()) / sum(count.values()) < 0.35
    everything = sum(answers.values(), Counter())
    assert max(everything.values()) / len(rows["test"]) < 0.03


def test_every_document_fits_the_token_budget(rows, tokenizer):
    docs = {doc for name in rows for row in rows[name] for doc in row["docs"]}
    lengths = [len(ids) for ids in tokenizer(sorted(docs))["input_ids"]]
    assert max(lengths) <= BUDGET


@pytest.mark.parametrize(
    "text",
    ["Belmere lies.", " leading", "trailing ", "naïve 東京 🐢\n\n\ttab  two", "".join(map(chr, range(1, 256))), ""],
)
def test_tokenizer_round_trips_any_text(tokenizer, text):
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_tokenizer_knows_the_words_and_splits_the_names(tokenizer):
    answers = [v for attributes in lexicon.ATTRIBUTES.values() for a in attributes for v in a.values]
    assert all(len(tokenizer.tokenize(answer)) == 1 for answer in answers)
    names = [w for s in world.SPLITS for category in lexicon.ENDINGS for w in world.name_words(s, category)]
    pieces = [len(tokenizer.tokenize(name)) for name in names]
    assert min(pieces) >= 2 and pieces.count(2) / len(pieces) > 0.94


def test_chat_template_marks_turns_and_keeps_answers_tokenised_as_alone(tokenizer):
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Who?"}]
    prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert prompt == "<s><|system|>Be brief.<|user|>Who?<|assistant|>"
    messages.append({"role": "assistant", "content": "a baker"})
    full = tokenizer.apply_chat_template(messages, tokenize=False)
    assert full == prompt + "a baker</s>"
    alone = tokenizer("a baker", add_special_tokens=False)["input_ids"]
    assert tokenizer(full)["input_ids"] == tokenizer(prompt)["input_ids"] + alone + [tokenizer.eos_token_id]


@pytest.mark.parametrize("count", [2, 5])
def test_questions_have_as_many_candidates_as_asked_with_the_gold_ones(count):
    found = world.more_test_questions(0, 40, candidates=count)
    assert {len(row["docs"]) for row in found} == {count}
    assert all(len(set(row["docs"])) == count and max(row["pos_index"]) < count for row in found)
    assert {len(row["pos_index"]) for row in found} == {1, 2}


def test_ensure_reuses_finished_data_repairs_lost_files_and_refuses_other_settings(tmp_path, monkeypatch):
    monkeypatch.setattr(world, "generate", lambda seed, progress, count: {"test": [{"question": f"seed {seed}"}]})
    assert world.ensure(tmp_path, seed=0) is True
    assert world.ensure(tmp_path, seed=0) is False
    (tmp_path / "test.jsonl").unlink()
    assert world.ensure(tmp_path, seed=0) is True
    assert json.loads((tmp_path / "test.jsonl").read_text()) == {"question": "seed 0"}
    with pytest.raises(ValueError, match="other settings.*seed"):
        world.ensure(tmp_path, seed=1)
    with pytest.raises(ValueError, match="other settings.*candidates"):
        world.ensure(tmp_path, seed=0, count=5)
    assert not list(tmp_path.glob("*.partial"))


def test_shipped_tokenizer_is_the_one_that_its_recipe_makes(tokenizer):
    shipped = json.loads((NANO / "pretrained" / "base" / "tokenizer.json").read_text(encoding="utf-8"))
    assert shipped == json.loads(tokenizer.backend_tokenizer.to_str())
