"""BM25's ranking, the choice of wrong memories, and reading from memories and from text."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from eval.data import QAExample, load_examples
from eval.metrics.retrieval_recall.retrieval_recall import score_ranking
from eval.systems import BM25, Clara, Gold, MemoryReader, NoMemory, TextReader, wrong_documents


SHARED = Path(os.environ.get("CLARA_SHARED", Path(__file__).parents[1] / ".." / "shared"))
QUESTIONS = ["Where does the glassblower live?", "Who sells copper lanterns?", "Who wrote The Long Winter?"]


def example(identifier, answer, docs, gold, question="Who?"):
    return QAExample(str(identifier), question, [answer], docs, gold)


def bm25(examples, seed=0):
    corpus = list(dict.fromkeys(document for one in examples for document in one.docs))
    return BM25("bm25", None, None, corpus, seed).rank(examples)


@pytest.fixture
def examples(texts):
    return [example(number, "x", texts[:4], [number], question) for number, question in enumerate(QUESTIONS)]


# BM25


@pytest.mark.parametrize(
    ("name", "expected"), [("nq_dev20_matched", (84.3, 93.7, 95.7)), ("hotpotqa_dev10", (39.9, 65.8, 76.1))]
)
def test_bm25_recall_equals_the_published_baseline(name, expected):
    path = SHARED / "data" / f"{name}.jsonl.gz"
    if not path.exists():
        pytest.skip(f"{path} is not there; CLARA_SHARED names the folder that holds data/")
    examples = load_examples(path)
    scores = [score_ranking(*pair) for pair in zip(bm25(examples), (one.pos_index for one in examples), strict=True)]
    for k, percent in zip((1, 3, 5), expected, strict=True):
        assert 100 * np.mean([score[f"recall@{k}"] for score in scores]) == pytest.approx(percent, abs=0.3)


def test_bm25_takes_document_frequencies_from_the_corpus_not_the_candidates():
    # Among the candidates both words occur once; in the corpus "amber" is common, so "quartz" must decide.
    one = example(1, "x", ["amber ring here", "quartz ring here"], [1], "amber quartz")
    corpus = [*one.docs, *(f"amber ring number {word}" for word in ("alpha", "beta", "gamma", "delta"))]
    assert BM25("bm25", None, None, corpus, 0).rank([one]) == [[1, 0]]


def test_bm25_orders_equal_scores_by_chance_not_by_position():
    docs = [f"document {number}" for number in range(10)]
    examples = [example(number, "x", docs, [0], "unrelated words") for number in range(200)]
    rankings = bm25(examples)
    assert 5 <= sum(ranking[0] == 0 for ranking in rankings) <= 40
    assert rankings == bm25(examples) != bm25(examples, seed=1)


def test_bm25_ranks_questions_without_any_known_word():
    docs = ["alpha beta", "gamma delta"]
    for ranking in bm25([example(number, "x", docs, [0], text) for number, text in enumerate(("the", "???", "東京"))]):
        assert sorted(ranking) == [0, 1]


# Wrong memories


def test_wrong_documents_come_from_questions_with_other_answers_and_as_many_gold_documents():
    examples = [
        example(number, f"answer {number % 7}", [f"d{number}.{place}" for place in range(4)], [0, 2][: 1 + number % 2])
        for number in range(60)
    ]
    owner = {document: one for one in examples for document in one.gold}
    chosen = wrong_documents(examples, seed=0)
    for one, documents in zip(examples, chosen, strict=True):
        (other,) = {owner[document].id: owner[document] for document in documents}.values()
        assert documents == other.gold and len(documents) == len(one.gold)
        assert set(other.answers).isdisjoint(one.answers)
    assert len({tuple(documents) for documents in chosen}) > 20
    assert chosen == wrong_documents(examples, seed=0) != wrong_documents(examples, seed=1)


def test_answers_are_compared_after_normalisation_and_shared_gold_is_no_wrong_memory():
    examples = [
        example(1, "The Harbour", ["a", "b"], [0]),
        example(2, "harbour!", ["c", "d"], [0]),
        example(3, "Mill", ["a", "e"], [0]),
        example(4, "Bridge", ["f", "g"], [0]),
    ]
    for seed in range(5):
        chosen = wrong_documents(examples, seed)
        assert chosen[0] == ["f"]
        assert chosen[1] in (["a"], ["f"])
        assert chosen[2] in (["c"], ["f"])


def test_documents_of_several_questions_are_put_together_where_none_has_as_many():
    examples = [example(1, "x", ["a", "b"], [0, 1]), example(2, "y", ["c"], [0]), example(3, "z", ["d"], [0])]
    chosen = wrong_documents(examples, seed=0)
    assert sorted(chosen[0]) == ["c", "d"]


def test_without_gold_or_without_another_question_there_is_no_wrong_memory():
    assert wrong_documents([example(1, "x", ["a"], None), example(2, "y", ["b"], [0])], seed=0) == [None, None]
    assert wrong_documents([example(1, "x", ["a"], [0])], seed=0) == [None]


# Readers


def test_what_clara_answers_is_what_generate_answers(clara, examples):
    reader = MemoryReader(clara, {}, batch_size=2, max_new_tokens=6)
    system = Clara("clara", reader, top_k=2)
    rankings = system.rank(examples)
    direct = clara.generate(
        questions=QUESTIONS, documents=[one.docs for one in examples], top_k=2, max_new_tokens=6, do_sample=False
    )
    assert [ranking[:2] for ranking in rankings] == direct.indices.tolist()
    assert all(sorted(ranking) == [0, 1, 2, 3] for ranking in rankings)
    assert system.answer(examples, rankings) == direct.texts


def test_questions_may_have_different_numbers_of_candidates(clara, texts):
    ragged = [example(1, "x", texts[:1], [0], QUESTIONS[0]), example(2, "x", texts[:4], [0], QUESTIONS[1])]
    system = Clara("clara", MemoryReader(clara, {}, batch_size=2, max_new_tokens=2), top_k=3)
    rankings = system.rank(ragged)
    assert rankings[0] == [0] and sorted(rankings[1]) == [0, 1, 2, 3]
    assert [len(given) for given in system.documents(ragged, rankings)] == [1, 3]


def test_each_distinct_document_is_compressed_once_for_all_systems(clara, examples, texts, monkeypatch):
    compressed, compress = [], clara.compress
    monkeypatch.setattr(
        clara,
        "compress",
        lambda documents, **options: (compressed.extend(documents), compress(documents, **options))[1],
    )
    reader = MemoryReader(clara, {}, batch_size=2, max_new_tokens=2)
    for system in (Clara("clara", reader, top_k=2), Gold("gold", reader), NoMemory("no-memory", reader)):
        system.answer(examples, system.rank(examples))
    assert compressed == texts[:4]
    assert all(memory.device.type == "cpu" for memory in reader.memories.values())


def test_no_memory_is_a_prompt_without_documents(clara, examples):
    answers = NoMemory("no-memory", MemoryReader(clara, {}, batch_size=8, max_new_tokens=6)).answer(examples, None)
    empty = torch.empty(0, clara.config.num_memory_tokens, clara.config.hidden_size)
    direct = clara.generate(questions=QUESTIONS, memories=[empty] * 3, rerank=False, max_new_tokens=6)
    assert answers == direct.texts


def test_questions_that_a_system_cannot_answer_are_left_out(clara, examples):
    examples[1] = example(1, "x", examples[1].docs, None, QUESTIONS[1])
    answers = Gold("gold", MemoryReader(clara, {}, batch_size=8, max_new_tokens=3)).answer(examples, None)
    assert [answer is None for answer in answers] == [False, True, False]


def test_text_answers_are_those_of_the_causal_model_alone_whatever_the_batch(clara, base, examples):
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    tokenizer = clara.processor.tokenizer
    expected = []
    for one in examples:
        prompt = clara.processor.answer_prompt(one.question, documents=one.gold)
        inputs = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
        output = model.generate(
            inputs.input_ids, attention_mask=inputs.attention_mask, do_sample=False, max_new_tokens=6
        )
        expected.append(tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True).strip())
    reader = TextReader(model, clara.processor, batch_size=3, max_new_tokens=6)
    assert Gold("text-gold", reader).answer(examples, None) == expected
    unknown = [example(1, "x", examples[0].docs, None)]
    assert Gold("text-gold", reader).answer(unknown, None) == [None]


def test_a_system_without_a_reader_only_ranks(examples):
    system = BM25("bm25", None, None, examples[0].docs, 0)
    assert system.answer(examples, system.rank(examples)) == [None] * 3
