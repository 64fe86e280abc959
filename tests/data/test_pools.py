"""Candidate pools: what is in them, for which retriever, and the sentence for what cannot be built."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from processes import exit_code
from transformers import BertConfig, BertModel

from clara_hf.data import pools, retrievers
from clara_hf.data.files import write_jsonl
from clara_hf.data.pools import build_candidates, distinct_passages, read_corpus, read_questions
from clara_hf.data.retrievers import BiEncoderRetriever, BM25Retriever, random_rows
from clara_hf.data.schema import DataError, load_examples
from tests.conftest import build_tokenizer


ANIMALS = ("heron", "otter", "badger", "lynx", "marten", "beaver", "falcon", "plover", "weasel", "ibex")
PLACES = ("harbour", "quarry", "orchard", "meadow", "glacier")
CORPUS = {f"{animal}-{place}": f"The {animal} sleeps near the old {place}." for animal in ANIMALS for place in PLACES}


def question(name, **fields):
    animal, place = name.split("-")
    text = f"Which animal, a {animal}, sleeps near the {place}?"
    return {"id": f"q-{name}", "question": text, "answers": [animal], "positives": [name], **fields}


QUESTIONS = [question(name) for name in CORPUS]


def test_oracle_pools_hold_every_positive_once_and_the_best_ranked_others():
    questions = [question("otter-quarry", positives=["otter-quarry", "heron-glacier"])]
    (row,) = build_candidates(questions, CORPUS, size=8)
    assert len(row["docs"]) == len(set(row["docs"])) == 8
    assert {row["doc_ids"][position] for position in row["pos_index"]} == {"otter-quarry", "heron-glacier"}
    assert row["docs"] == [CORPUS[name] for name in row["doc_ids"]]
    # The five others about the animal or the place that BM25 puts first share a word with the question.
    negatives = set(row["doc_ids"]) - {"otter-quarry", "heron-glacier"}
    assert all("otter" in name or "quarry" in name for name in negatives)
    assert row["positives"] == ["otter-quarry", "heron-glacier"] and row["answers"] == ["otter"]


def test_normal_pools_are_the_retrievers_best_whether_gold_or_not():
    questions = [question("otter-quarry", positives=["heron-glacier"]), question("otter-quarry", id="with gold")]
    without, found = build_candidates(questions, CORPUS, size=6, mode="normal")
    ranking = BM25Retriever(list(CORPUS.values())).search([questions[0]["question"]], 6)[0]
    assert set(without["doc_ids"]) == {list(CORPUS)[row] for row in ranking}
    assert without["pos_index"] == []
    assert [found["doc_ids"][position] for position in found["pos_index"]] == ["otter-quarry"]


@pytest.mark.parametrize("mode", ["oracle", "normal"])
def test_copies_of_a_passage_count_once(mode):
    name = "otter-quarry"
    copies = {"copy": CORPUS[name].upper(), "second copy": CORPUS[name].replace(" ", "\n ")}
    texts, ids, rows_of = distinct_passages({**CORPUS, **copies})
    assert len(texts) == len(ids) == len(CORPUS) and rows_of["copy"] == rows_of["second copy"] == rows_of[name]
    # The question names the passage and both of its copies.
    questions = [question(name, positives=[name, "copy", "second copy"])]
    (row,) = build_candidates(questions, {**CORPUS, **copies}, size=20, mode=mode)
    folded = [" ".join(text.casefold().split()) for text in row["docs"]]
    assert len(set(folded)) == 20 and len(row["pos_index"]) == 1


def test_the_order_carries_no_meaning_and_depends_on_seed_and_id_alone():
    rows = build_candidates(QUESTIONS, CORPUS, size=10)
    places = [row["pos_index"][0] for row in rows]
    assert len(set(places)) >= 8
    backwards = build_candidates(QUESTIONS[::-1], CORPUS, size=10)
    assert backwards[::-1] == rows == build_candidates(QUESTIONS, CORPUS, size=10)
    assert rows != build_candidates(QUESTIONS, CORPUS, size=10, seed=1)


def test_what_is_not_found_is_filled_up_by_chance():
    questions = [{"question": "東京?", "answers": ["x"], "positives": ["lynx-meadow"], "id": str(n)} for n in range(30)]
    rows = build_candidates(questions, CORPUS, size=10)
    assert all(len(set(row["docs"])) == 10 for row in rows)
    assert len({name for row in rows for name in row["doc_ids"]}) > 40
    (whole,) = build_candidates(questions[:1], CORPUS, size=len(CORPUS), mode="normal")
    assert sorted(whole["doc_ids"]) == sorted(CORPUS)


def test_a_corpus_of_stop_words_fills_pools_by_chance():
    corpus = {str(place): text for place, text in enumerate(("the", "of", "and", "?"))}
    (row,) = build_candidates([{"question": "What of it?", "answers": ["x"], "positives": ["2"]}], corpus, size=3)
    assert len(set(row["docs"])) == 3 and [row["docs"][place] for place in row["pos_index"]] == ["and"]


def test_negatives_with_an_answer_can_be_left_out():
    (plain,) = build_candidates([question("otter-quarry")], CORPUS, size=10)
    (clean,) = build_candidates([question("otter-quarry")], CORPUS, size=10, exclude_answers=True)
    assert sum("otter" in name for name in plain["doc_ids"]) > 1
    assert [name for name in clean["doc_ids"] if "otter" in name] == ["otter-quarry"]
    with pytest.raises(
        ValueError, match="question 'q-otter-quarry': only 46 passages hold none of its answers, 47 are"
    ):
        build_candidates([question("otter-quarry")], CORPUS, size=47, exclude_answers=True)


def test_ids_default_to_the_position_and_further_keys_are_kept():
    row = {"question": "Where is the lynx?", "answers": ["meadow"], "positives": ["lynx-meadow"], "level": "hard"}
    first, second = build_candidates([row, {**row, "id": None}], CORPUS, size=5)
    assert (first["id"], second["id"], first["level"]) == ("1", "2", "hard")


@pytest.mark.parametrize(
    ("questions", "options", "message"),
    [
        (QUESTIONS, {"mode": "gold"}, "mode is 'gold'; it must be 'oracle' or 'normal'"),
        (QUESTIONS, {"size": 0}, "size is 0; it must be at least 1"),
        (QUESTIONS, {"size": 51}, "the corpus holds 50 distinct passages, too few for pools of 51"),
        ([question("lynx-meadow", positives=["x"])], {}, "'q-lynx-meadow': its positive 'x' is not in the corpus"),
        ([question("lynx-meadow", positives=[])], {}, "'q-lynx-meadow' has no positives: give them, or use the mode"),
        ([question("lynx-meadow", positives=list(CORPUS))], {}, "has 50 positives, more than its pool of 20 holds"),
    ],
)
def test_what_cannot_be_built_is_named(questions, options, message):
    with pytest.raises(ValueError, match=message):
        build_candidates(questions, CORPUS, **options)


def test_random_rows_are_distinct_free_and_reach_every_row():
    chance = np.random.default_rng(0)
    for size, count, taken in ((1000, 5, {1, 2}), (10, 5, {1, 2, 3}), (4, 9, {0}), (3, 1, {0, 1, 2})):
        rows = random_rows(chance, size, count, taken)
        assert len(rows) == len(set(rows)) == min(count, size - len(taken)) and not taken & set(rows)
    assert {row for _ in range(200) for row in random_rows(chance, 30, 3, {0})} == set(range(1, 30))


# Bi-encoders


@pytest.fixture(scope="session")
def bi_encoder(tmp_path_factory):
    """A folder with a tiny random bi-encoder of sentence-transformers, which puts prompts before its texts."""
    sentence_transformers = pytest.importorskip("sentence_transformers")
    from sentence_transformers.sentence_transformer.modules import Pooling, Transformer

    folder = str(tmp_path_factory.mktemp("bert"))
    tokenizer = build_tokenizer()
    tokenizer.chat_template = None  # with one, sentence-transformers would make each prompt a message
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    # Wide initial values, so that texts differ clearly.
    BertModel(BertConfig(**shape, vocab_size=len(tokenizer), initializer_range=0.5)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    modules = [Transformer(folder), Pooling(32, "mean")]
    prompts = {"query": "Question: ", "document": "Passage: "}
    target = str(tmp_path_factory.mktemp("bi-encoder"))
    sentence_transformers.SentenceTransformer(modules=modules, prompts=prompts, device="cpu").save(target)
    return target


def test_a_bi_encoder_finds_the_most_similar_passages_with_its_own_prompts(bi_encoder):
    from sentence_transformers import SentenceTransformer

    texts, asked = list(CORPUS.values()), [row["question"] for row in QUESTIONS[:7]]
    model = SentenceTransformer(bi_encoder)
    queries = model.encode([f"Question: {text}" for text in asked], normalize_embeddings=True)
    passages = model.encode([f"Passage: {text}" for text in texts], normalize_embeddings=True)
    expected = np.argsort(-queries @ passages.T, axis=1)
    found = BiEncoderRetriever(texts, bi_encoder).search(asked, 3)
    assert found == expected[:, :3].tolist()
    assert [len(rows) for rows in BiEncoderRetriever(texts[:2], bi_encoder).search(asked, 3)] == [2] * 7
    rows = build_candidates(QUESTIONS[:7], CORPUS, bi_encoder, size=4, mode="normal")
    assert [set(row["doc_ids"]) for row in rows] == [{list(CORPUS)[row] for row in best[:4]} for best in expected]


# Corpus and questions from files


def test_a_corpus_has_titles_in_front_of_its_texts_and_ids_or_numbers(tmp_path):
    rows = [{"_id": "a", "title": "Lynx", "text": "It sleeps."}, {"contents": "An otter."}, {"id": 7, "content": "x"}]
    write_jsonl(tmp_path / "c.jsonl", rows)
    assert read_corpus(tmp_path / "c.jsonl") == {"a": "Lynx\nIt sleeps.", "2": "An otter.", "7": "x"}
    write_jsonl(tmp_path / "null.jsonl", [{"id": None, "_id": "a", "text": "x"}, {"id": None, "text": "y"}])
    assert read_corpus(tmp_path / "null.jsonl") == {"a": "x", "2": "y"}


def test_a_question_whose_id_is_null_has_its_lines_number(tmp_path):
    write_jsonl(tmp_path / "q.jsonl", [{"id": None, "question": "Who?", "answers": ["x"], "positives": ["a"]}] * 2)
    assert [question["id"] for question in read_questions(tmp_path / "q.jsonl", {})] == ["1", "2"]


def test_a_gold_document_that_joins_the_corpus_takes_no_id_that_is_used(tmp_path):
    corpus = {"doc:1": "Of the corpus.", "doc:3": "Of the corpus, too.", "doc:2": "And this."}
    rows = [{"question": "Who?", "answers": ["x"], "docs": ["New.", "New, too."], "pos_index": [0, 1]}]
    write_jsonl(tmp_path / "q.jsonl", rows)
    (question,) = read_questions(tmp_path / "q.jsonl", corpus)
    assert [corpus[name] for name in question["positives"]] == ["New.", "New, too."]
    assert len(corpus) == 5 and corpus["doc:1"] == "Of the corpus."


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"title": "x"}, "line 2: 'text' must be a string, but is null"),
        ({"text": " "}, "line 2: 'text' is empty"),
        ({"text": "x", "id": "1"}, "line 2: id '1' is already used"),
    ],
)
def test_a_broken_passage_is_named_with_its_line(tmp_path, row, message):
    write_jsonl(tmp_path / "c.jsonl", [{"text": "An otter."}, row])
    with pytest.raises(DataError, match=f"c.jsonl, {message}"):
        read_corpus(tmp_path / "c.jsonl")


def test_gold_documents_are_positives_and_join_the_corpus_where_it_lacks_them(tmp_path):
    docs = ["The  OTTER sleeps near the old quarry.", "A new passage.", "Not gold."]
    rows = [{"question": "Who?", "answers": ["x"], "docs": docs, "pos_index": [0, 1], "level": 2}]
    write_jsonl(tmp_path / "q.jsonl", rows)
    corpus = dict(CORPUS)
    (question,) = read_questions(tmp_path / "q.jsonl", corpus)
    assert question["positives"][0] == "otter-quarry" and corpus[question["positives"][1]] == "A new passage."
    assert len(corpus) == len(CORPUS) + 1 and question["level"] == 2 and "docs" not in question
    read_questions(tmp_path / "q.jsonl", corpus, pooled=True)
    assert list(corpus.values())[len(CORPUS) :] == ["A new passage.", "Not gold."]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"answers": ["x"]}, "the field 'question' is missing"),
        ({"question": "Who?", "answers": [""]}, r"'answers\[0\]' is empty"),
        ({"question": "Who?", "answers": ["x"], "positives": "p"}, "'positives' must be a list of ids, but is \"p\""),
        ({"question": "Who?", "answers": ["x"], "docs": ["d"], "pos_index": [1]}, "gold index 1 in 'pos_index' is out"),
        ({"question": "Who?", "answers": ["x"], "id": "1"}, "id '1' is already used in line 1"),
    ],
)
def test_a_broken_question_is_named_with_its_line(tmp_path, row, message):
    write_jsonl(tmp_path / "q.jsonl", [{"question": "Who?", "answers": ["x"]}, row])
    with pytest.raises(DataError, match=f"q.jsonl, line 2: {message}"):
        read_questions(tmp_path / "q.jsonl", {})


# The command line


@pytest.fixture
def files(tmp_path):
    write_jsonl(tmp_path / "q.jsonl", QUESTIONS)
    write_jsonl(tmp_path / "c.jsonl", [{"id": name, "text": text} for name, text in CORPUS.items()])
    return ["--questions", str(tmp_path / "q.jsonl"), "--corpus", str(tmp_path / "c.jsonl")]


@pytest.mark.parametrize("retriever", ["bm25", "bi-encoder"])
def test_the_command_writes_pools_that_the_loader_reads_and_their_report(tmp_path, capsys, files, request, retriever):
    name = "bm25" if retriever == "bm25" else request.getfixturevalue("bi_encoder")
    output = tmp_path / "new" / "pools.jsonl.gz"
    assert exit_code(pools.main, [*files, "--output", str(output), "--size", "12", "--retriever", name]) == 0
    examples = load_examples(output)
    assert [example.gold for example in examples] == [[CORPUS[row["positives"][0]]] for row in QUESTIONS]
    assert all(len(example.docs) == 12 for example in examples)
    report = json.loads((tmp_path / "new" / "pools.jsonl.gz.report.json").read_text())
    assert report["questions"] == 50 and report["gold_in_pool"] == report["answer_in_gold"] == 1
    assert report["random"]["recall@3"] == pytest.approx(0.25) and report["settings"]["retriever"] == name
    assert set(os.listdir(output.parent)) == {"pools.jsonl.gz", "pools.jsonl.gz.report.json"}
    printed = capsys.readouterr().out
    assert "50 questions, 12.0 candidates each" in printed and "by a question-blind classifier" in printed
    assert exit_code(pools.main, [*files, "--output", str(output)]) == 2
    assert "is there already: give another --output, or --overwrite" in capsys.readouterr().err
    before = output.read_bytes()
    again = [*files, "--output", str(output), "--size", "12", "--retriever", name]
    assert exit_code(pools.main, [*again, "--overwrite"]) == 0 and output.read_bytes() == before
    times = [path.stat().st_mtime_ns for path in output.parent.iterdir()]
    assert exit_code(pools.main, again) == 0  # complete: nothing is written again
    assert [path.stat().st_mtime_ns for path in output.parent.iterdir()] == times
    write_jsonl(tmp_path / "q.jsonl", QUESTIONS[1:])
    assert exit_code(pools.main, again) == 2 and output.read_bytes() == before
    assert str(output) in capsys.readouterr().err


def test_pools_that_were_not_written_are_not_taken_for_those_of_their_report(tmp_path, files, monkeypatch):
    output = tmp_path / "pools.jsonl"
    arguments = [*files, "--output", str(output), "--size", "4"]
    assert exit_code(pools.main, [*arguments, "--seed", "1"]) == 0
    wanted = output.read_bytes()
    assert exit_code(pools.main, [*arguments, "--overwrite"]) == 0
    with monkeypatch.context() as patch:
        patch.setattr(pools, "write_jsonl", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert exit_code(pools.main, [*arguments, "--seed", "1", "--overwrite"]) == 130
    assert exit_code(pools.main, [*arguments, "--seed", "1"]) == 0
    assert output.read_bytes() == wanted


def test_an_interrupted_call_goes_on_from_what_is_embedded(tmp_path, capsys, files, bi_encoder, monkeypatch):
    arguments = [*files, "--size", "12", "--retriever", bi_encoder, "--output"]
    monkeypatch.setattr(retrievers, "PART_TEXTS", 20)
    assert exit_code(pools.main, [*arguments, str(tmp_path / "whole.jsonl")]) == 0
    embed, embedded = BiEncoderRetriever._embed, []

    def counting(self, texts):
        if len(embedded) == 2:
            raise KeyboardInterrupt
        embedded.append(texts)
        return embed(self, texts)

    monkeypatch.setattr(BiEncoderRetriever, "_embed", counting)
    output = str(tmp_path / "pools.jsonl")
    assert exit_code(pools.main, [*arguments, output]) == 130 and len(embedded) == 2
    assert "run the same command again to resume" in capsys.readouterr().err
    first, second = sorted(Path(f"{output}.unfinished").iterdir())
    second.write_bytes(second.read_bytes()[:40])
    embedded[:] = [None] * 3  # counts on, without another interruption
    assert exit_code(pools.main, [*arguments, output]) == 0
    assert len(embedded) - 3 == -(-len(CORPUS) // 20) - 1, "all parts but the one that was whole"
    assert Path(output).read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    assert not Path(f"{output}.unfinished").exists()


def test_an_unknown_mode_is_told_before_the_corpus_is_read(tmp_path, capsys):
    arguments = ["--questions", "none.jsonl", "--corpus", "none.jsonl", "--output", str(tmp_path / "pools.jsonl")]
    assert exit_code(pools.main, [*arguments, "--mode", "best"]) == 2
    error = capsys.readouterr().err
    assert "mode is 'best'" in error and "none.jsonl" not in error and error.count("\n") == 1


def test_without_a_corpus_the_questions_docs_are_the_corpus(tmp_path):
    rows = build_candidates(QUESTIONS, CORPUS, size=3)
    write_jsonl(tmp_path / "small.jsonl", [{**row, "positives": None} for row in rows])
    output = tmp_path / "pools.jsonl"
    arguments = ["--questions", str(tmp_path / "small.jsonl"), "--output", str(output), "--size", "20"]
    assert exit_code(pools.main, [*arguments, "--mode", "normal"]) == 0
    assert {text for example in load_examples(output) for text in example.docs} <= set(CORPUS.values())
    report = json.loads((tmp_path / "pools.jsonl.report.json").read_text())
    assert 0 < report["gold_in_pool"] <= 1 and report["corpus"]["passages"] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--size", "51"], "the corpus holds 50 distinct passages, too few for pools of 51"),
        (["--mode", "best"], "mode is 'best'; it must be 'oracle' or 'normal'"),
        (["--output", "pools.txt"], "--output must end in .jsonl or .jsonl.gz, but is pools.txt"),
        (["--batch_size", "0"], "--batch_size must be at least 1, but is 0"),
        (["--seed", "-1"], "--seed must be at least 0, but is -1"),
        (["--questions", "none.jsonl"], "none.jsonl: the file cannot be read"),
        (["--retriever", "./no-such-folder"], "--retriever: there is no folder ./no-such-folder"),
    ],
)
def test_what_cannot_be_done_is_one_sentence_and_leaves_nothing(
    tmp_path, monkeypatch, capsys, files, arguments, message
):
    monkeypatch.chdir(tmp_path)
    assert exit_code(pools.main, [*files, "--output", "pools.jsonl", *arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "error: " in error and message in error
    assert sorted(os.listdir(tmp_path)) == ["c.jsonl", "q.jsonl"]
