"""BM25's ranking, the choice of wrong memories, and reading from memories and from text."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from clara_hf.data.schema import QAExample
from clara_hf.evaluation.systems.bm25 import BM25
from clara_hf.evaluation.systems.documents import fixed_documents, wrong_documents
from clara_hf.evaluation.systems.listwise import ListwiseRanker, cut, parse_order
from clara_hf.evaluation.systems.loading import load_text_model
from clara_hf.evaluation.systems.readers import MemoryReader, ShuffledReader, TextReader
from clara_hf.program.models import ModelSource


QUESTIONS = ["Where does the glassblower live?", "Who sells copper lanterns?", "Who wrote The Long Winter?"]


def example(identifier, answer, docs, gold, question="Who?"):
    return QAExample(str(identifier), question, [answer], docs, gold)


def bm25(examples, seed=0):
    corpus = list(dict.fromkeys(document for one in examples for document in one.docs))
    return orders(BM25(seed), examples, corpus)


def orders(system, examples, corpus=()):
    system.prepare(examples, list(corpus))
    return [ranking.order for ranking in system.rank(examples)]


def texts_of(answers):
    return [answer.text for answer in answers]


@pytest.fixture
def examples(texts):
    return [example(number, "x", texts[:4], [number], question) for number, question in enumerate(QUESTIONS)]


# BM25


def test_bm25_takes_document_frequencies_from_the_corpus_not_the_candidates():
    # Among the candidates both words occur once; in the corpus "amber" is common, so "quartz" must decide.
    one = example(1, "x", ["amber ring here", "quartz ring here"], [1], "amber quartz")
    corpus = [*one.docs, *(f"amber ring number {word}" for word in ("alpha", "beta", "gamma", "delta"))]
    assert orders(BM25(0), [one], corpus) == [[1, 0]]


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


def test_bm25_ranks_documents_without_any_word():
    assert sorted(bm25([example(1, "x", ["the", "of", "?"], [0], "where is the amber")])[0]) == [0, 1, 2]


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


def test_gold_and_no_memory(texts):
    examples = [example(1, "x", texts[:3], [2, 0]), example(2, "x", texts[:3], None)]
    assert fixed_documents("gold", examples, 0) == [[texts[2], texts[0]], None]
    assert fixed_documents("no-memory", examples, 0) == [[], []]


# Readers


def test_what_clara_answers_is_what_generate_answers(clara, examples):
    reader = MemoryReader(clara, batch_size=2, max_new_tokens=6)
    assert reader.prepare([document for one in examples for document in one.docs]) == 4
    rankings = reader.rank(examples)
    direct = clara.generate(
        questions=QUESTIONS, documents=[one.docs for one in examples], n_docs=2, max_new_tokens=6, do_sample=False
    )
    assert [ranking.order[:2] for ranking in rankings] == direct.indices.tolist()
    assert np.array([ranking.scores[:2] for ranking in rankings]) == pytest.approx(direct.scores.numpy(), abs=1e-6)
    assert all(sorted(ranking.order) == [0, 1, 2, 3] for ranking in rankings)
    given = [[one.docs[place] for place in found.order[:2]] for one, found in zip(examples, rankings, strict=True)]
    assert texts_of(reader.answer(QUESTIONS, given)) == direct.texts


def test_questions_may_have_different_numbers_of_candidates(clara, texts):
    ragged = [example(1, "x", texts[:1], [0], QUESTIONS[0]), example(2, "x", texts[:4], [0], QUESTIONS[1])]
    reader = MemoryReader(clara, batch_size=2, max_new_tokens=2)
    reader.prepare(texts[:4])
    first, second = reader.rank(ragged)
    assert first.order == [0] and sorted(second.order) == [0, 1, 2, 3]
    assert len(first.scores) == 1 and second.scores == sorted(second.scores, reverse=True)


def test_memories_are_made_once_and_all_in_one_call(clara, texts, monkeypatch):
    compressed, compress = [], clara.compress
    monkeypatch.setattr(
        clara,
        "compress",
        lambda documents, **options: (compressed.append(documents), compress(documents, **options))[1],
    )
    reader = MemoryReader(clara, batch_size=2, max_new_tokens=2)
    assert [reader.prepare([texts[0], texts[1], texts[0]]), reader.prepare([texts[1]])] == [2, 0]
    # More documents than before: all of them again, so that batches do not depend on what was there.
    assert reader.prepare(texts[:3]) == 3
    assert compressed == [texts[:2], texts[:3]]
    assert set(reader.memories) == set(texts[:3])
    assert all(memory.device.type == "cpu" for memory in reader.memories.values())


def test_no_memory_is_a_prompt_without_documents(clara):
    answers = MemoryReader(clara, batch_size=8, max_new_tokens=6).answer(QUESTIONS, [[], [], []])
    empty = torch.empty(0, clara.config.num_memory_tokens, clara.config.hidden_size)
    direct = clara.generate(questions=QUESTIONS, memories=[empty] * 3, rerank=False, max_new_tokens=6)
    assert texts_of(answers) == direct.texts


def test_shuffled_memories_are_the_right_vectors_in_other_slots(clara, examples, monkeypatch):
    reader = MemoryReader(clara, batch_size=2, max_new_tokens=2)
    documents = [one.docs[:2] for one in examples]
    reader.prepare(examples[0].docs)
    given, generate = [], clara.generate
    monkeypatch.setattr(clara, "generate", lambda **kwargs: given.append(kwargs["memories"]) or generate(**kwargs))
    assert len(ShuffledReader(reader).answer(QUESTIONS, documents)) == len(reader.answer(QUESTIONS, documents)) == 3
    slots = clara.config.num_memory_tokens
    for shuffled, right in zip(*given, strict=True):
        for slot in range(slots):
            assert torch.equal(shuffled[:, slot], right[:, (slot - 1) % slots])
            assert not torch.equal(shuffled[:, slot], right[:, slot])
    assert fixed_documents("shuffled-memory", examples, 0) == [one.gold for one in examples]


def test_prompt_tokens_count_a_memory_vector_as_one(clara, texts):
    reader = MemoryReader(clara, batch_size=8, max_new_tokens=1)
    reader.prepare(texts[:3])
    none, one, two = (reader.answer(QUESTIONS[:1], [texts[:count]])[0].prompt_tokens for count in range(3))
    slot = clara.config.num_memory_tokens + 1  # the separator
    assert (one - none, two - none) == (slot, 2 * slot)


def text_reader(clara, base, **options):
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    return TextReader(model, clara.processor, max_new_tokens=6, **{"doc_max_length": 256, **options})


def test_text_answers_are_those_of_the_causal_model_alone_whatever_the_batch(clara, base, examples):
    reader = text_reader(clara, base)
    tokenizer = clara.processor.tokenizer
    expected, lengths = [], []
    for one in examples:
        prompt = clara.processor.answer_prompt(one.question, documents=one.gold)
        inputs = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")
        output = reader.model.generate(
            inputs.input_ids, attention_mask=inputs.attention_mask, do_sample=False, max_new_tokens=6
        )
        expected.append(tokenizer.decode(output[0, inputs.input_ids.shape[1] :], skip_special_tokens=True).strip())
        lengths.append(inputs.input_ids.shape[1])
    reader.prepare([document for one in examples for document in one.gold])
    answers = reader.answer(QUESTIONS, [one.gold for one in examples])
    assert texts_of(answers) == expected and [answer.prompt_tokens for answer in answers] == lengths


def test_a_decoder_that_knows_the_added_tokens_never_writes_one(clara, examples):
    reader = TextReader(clara.decoder, clara.processor, max_new_tokens=6, doc_max_length=256)
    asked = QUESTIONS, [one.gold for one in examples]
    reader.prepare([document for one in examples for document in one.gold])
    expected = texts_of(reader.answer(*asked))
    favoured = torch.zeros(clara.config.vocab_size)
    favoured[clara.config.added_token_ids] = 1e4
    clara.get_output_embeddings().register_forward_hook(lambda module, inputs, logits: logits + favoured)
    assert any(expected) and texts_of(reader.answer(*asked)) == expected


def test_the_decoder_without_its_adapters_answers_as_the_base(clara, base, examples, tmp_path):
    clara.save_pretrained(tmp_path)
    model, processor = load_text_model(None, ModelSource(str(tmp_path)))
    bare = TextReader(model, processor, max_new_tokens=6, doc_max_length=256)
    answers = []
    for reader in (bare, text_reader(clara, base)):
        reader.prepare([document for one in examples for document in one.gold])
        answers.append(texts_of(reader.answer(QUESTIONS, [one.gold for one in examples])))
    assert answers[0] == answers[1]


def test_documents_are_cut_at_tokens_and_shortened_once(clara, base, texts):
    tokenizer, seen = clara.processor.tokenizer, []

    def shorten(documents):
        seen.extend(documents)
        return [document.split()[0] for document in documents]

    short = cut(texts[0], tokenizer, 5)
    assert texts[0].startswith(short) and len(tokenizer(short, add_special_tokens=False)["input_ids"]) == 5
    assert cut("a b", tokenizer, 3) == "a b" and cut(texts[0], tokenizer, 500) == texts[0]
    # Three tokens per character.
    assert [cut("東京都", tokenizer, limit) for limit in (9, 8, 6, 4)] == ["東京都", "東京", "東京", "東"]
    reader = text_reader(clara, base, doc_max_length=5, shorten=shorten)
    assert [reader.prepare(texts[:2]), reader.prepare(texts[:2])] == [2, 0]
    assert seen == [cut(text, tokenizer, 5) for text in texts[:2]]
    (answer,) = reader.answer(QUESTIONS[:1], [texts[:2]])
    prompt = clara.processor.answer_prompt(QUESTIONS[0], documents=[text.split()[0] for text in texts[:2]])
    assert answer.prompt_tokens == len(tokenizer(prompt, add_special_tokens=False)["input_ids"])


# Listwise ranking


class Dictated:
    """A listwise ranker whose model says what a rule says."""

    def __init__(self, monkeypatch, window):
        self.windows = []
        self.ranker = ListwiseRanker(None, None, batch_size=8, window=window)
        monkeypatch.setattr(self.ranker, "prompt", lambda question, passages: passages)
        monkeypatch.setattr(self.ranker, "_generate", self.generate)

    def generate(self, prompts):
        self.windows += prompts
        found = [sorted(range(len(passages)), key=lambda place: -int(passages[place])) for passages in prompts]
        return [" > ".join(f"[{place + 1}]" for place in order) for order in found]


def test_an_answer_is_read_leniently():
    assert parse_order("[2] > [3] > [1]", 3) == [1, 2, 0]
    assert parse_order("I think [3], then [3], [9] and [0].", 4) == [2, 0, 1, 3]
    assert parse_order("", 2) == [0, 1]


def test_the_model_orders_one_window(monkeypatch):
    one = example(1, "x", ["3", "9", "5"], [0])
    assert orders(Dictated(monkeypatch, 4).ranker, [one]) == [[1, 2, 0]]


def test_the_best_of_a_long_list_rise_through_the_windows(monkeypatch):
    dictated = Dictated(monkeypatch, 4)
    long = [str(number) for number in range(9)]
    found = orders(dictated.ranker, [example(1, "x", long, [0]), example(2, "x", ["1", "2"], [0])])
    assert [long[place] for place in found[0][:2]] == ["8", "7"] and sorted(found[0]) == list(range(9))
    assert found[1] == [1, 0]
    assert dictated.windows[0] == ["5", "6", "7", "8"] and all(len(window) <= 4 for window in dictated.windows)
    assert sum(window[0] in "12" and len(window) == 2 for window in dictated.windows) == 1


def test_a_real_model_gives_a_whole_order_in_any_batch(clara, base, texts):
    model = AutoModelForCausalLM.from_pretrained(base).eval()
    tokenizer = AutoTokenizer.from_pretrained(base)
    examples = [example(number, "x", texts[: 3 + number], [0], QUESTIONS[number]) for number in range(2)]
    together = orders(ListwiseRanker(model, tokenizer, batch_size=2, window=4), examples)
    alone = orders(ListwiseRanker(model, tokenizer, batch_size=1, window=4), examples)
    assert together == alone and [sorted(order) for order in together] == [[0, 1, 2], [0, 1, 2, 3]]
    prompt = ListwiseRanker(model, tokenizer, 1).prompt("Who {x}?", ["a\nb", "c"])
    assert "[1] a b\n[2] c" in prompt and prompt.count("Who {x}?") == 2 and prompt.endswith("[assistant]")
