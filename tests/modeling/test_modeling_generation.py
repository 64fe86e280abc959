"""Retrieval and generation over texts: equal to a slow computation, and to themselves however they are batched."""

import copy
import json
import shutil
import threading

import pytest
import torch
from conftest import build_clara
from torch.nn import functional as F
from transformers import GenerationConfig, TextIteratorStreamer
from transformers.generation import BaseStreamer

from modeling_clara import CLaRaGenerationOutput, CLaRaRetrievalOutput
from modeling_clara.adapters_clara import GENERATOR, use_adapter


QUESTIONS = ["Where does the glassblower live?", "What is sold to sailors?", "Who wrote it?"]
SCORE_TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def double_clara(untouched_clara):
    """Float64, so that equal answers do not hang on rounding at a tie."""
    return copy.deepcopy(untouched_clara).double()


@pytest.fixture(scope="module")
def memories(double_clara, texts):
    return double_clara.compress(texts)


def slow_answer(model, question, memories, max_new_tokens, documents=None):
    """Greedy decoding by one full forward per token, no cache, no padding, memories put into their slots one by one."""
    tokenizer, own = model.processor.tokenizer, set(model.config.memory_token_ids)
    ids = tokenizer.encode(model.processor.answer_prompt(question, len(memories), documents), add_special_tokens=False)
    vectors = iter(memories.flatten(0, 1))
    table = model.get_input_embeddings().weight
    rows = [next(vectors) if token in own else table[token] for token in ids]
    answer = []
    while len(answer) < max_new_tokens and not set(answer) & set(model.config.eos_token_id):
        with torch.no_grad(), use_adapter(model.decoder, GENERATOR):
            logits = model.decoder(inputs_embeds=torch.stack(rows).unsqueeze(0)).logits
        answer.append(int(logits[0, -1].argmax()))
        rows.append(table[answer[-1]])
    return answer


def trimmed(model, row):
    """Generated ids up to the padding behind the end token."""
    ids = row.tolist()
    ends = [position for position, token in enumerate(ids) if token in model.config.eos_token_id]
    return ids[: ends[0] + 1] if ends else ids


# Retrieval


def test_retrieve_ranks_by_cosine_best_first(double_clara, memories):
    found = double_clara.retrieve(QUESTIONS, memories, n_docs=5)
    queries = double_clara.encode_questions(QUESTIONS).flatten(1)
    expected = F.cosine_similarity(queries.unsqueeze(1), memories.flatten(1).unsqueeze(0), dim=-1)
    assert isinstance(found, CLaRaRetrievalOutput) and found.indices.dtype == torch.int64
    assert torch.equal(found.indices, expected.argsort(dim=-1, descending=True))
    assert torch.allclose(found.scores, expected.sort(dim=-1, descending=True).values)
    best = double_clara.retrieve(QUESTIONS, memories)
    assert best.indices.shape == (3, double_clara.config.top_k)
    assert torch.equal(best.indices, found.indices[:, :2])


def test_scores_are_float32_for_a_float32_model(untouched_clara, texts):
    assert untouched_clara.retrieve(QUESTIONS, untouched_clara.compress(texts)).scores.dtype == torch.float32


def test_ragged_questions_in_a_batch_are_ranked_as_each_alone(double_clara, memories):
    rows = [memories[:4], memories[4:], memories[[2, 0]]]
    found = double_clara.retrieve(QUESTIONS, rows, n_docs=3)
    assert found.indices.shape == (3, 3)
    for position, (question, own) in enumerate(zip(QUESTIONS, rows, strict=True)):
        alone = double_clara.retrieve([question], own, n_docs=3)
        count = min(3, len(own))
        assert torch.equal(found.indices[position, :count], alone.indices[0])
        assert (found.scores[position, :count] - alone.scores[0]).abs().max() < SCORE_TOLERANCE
        assert (found.indices[position, count:] == -1).all() and found.scores[position, count:].isneginf().all()


def test_a_list_of_the_same_memories_equals_shared_ones(double_clara, memories):
    shared = double_clara.retrieve(QUESTIONS, memories)
    listed = double_clara.retrieve(QUESTIONS, [memories] * 3)
    assert torch.equal(shared.indices, listed.indices)
    assert (shared.scores - listed.scores).abs().max() < SCORE_TOLERANCE


# Answers


def test_answers_equal_greedy_decoding_by_full_forwards(double_clara, memories):
    rows = [memories, memories[1:3], memories[[4]]]
    output = double_clara.generate(questions=QUESTIONS, memories=rows, max_new_tokens=6)
    assert isinstance(output, CLaRaGenerationOutput) and output.generation is None
    for position, (question, own) in enumerate(zip(QUESTIONS, rows, strict=True)):
        chosen = double_clara.retrieve([question], own).indices[0]
        assert output.indices[position, : len(chosen)].tolist() == chosen.tolist()
        expected = slow_answer(double_clara, question, own[chosen], 6)
        assert trimmed(double_clara, output.sequences[position]) == expected
        assert output.texts[position] == double_clara.processor.tokenizer.decode(expected, True).strip()


def test_documents_and_their_memories_give_the_same_answers(double_clara, memories, texts):
    documents = [texts[:4], [texts[4]], [texts[2], texts[0]]]
    from_texts = double_clara.generate(questions=QUESTIONS, documents=documents, max_new_tokens=5)
    own = [memories[:4], memories[[4]], memories[[2, 0]]]
    from_memories = double_clara.generate(questions=QUESTIONS, memories=own, max_new_tokens=5)
    assert from_texts.texts == from_memories.texts
    assert torch.equal(from_texts.sequences, from_memories.sequences)
    assert torch.equal(from_texts.indices, from_memories.indices)
    assert torch.allclose(from_texts.scores, from_memories.scores)


def test_a_batch_of_questions_equals_one_by_one(double_clara, memories):
    together = double_clara.generate(questions=QUESTIONS, memories=memories, max_new_tokens=8)
    for position, question in enumerate(QUESTIONS):
        alone = double_clara.generate(questions=[question], memories=memories, max_new_tokens=8)
        assert alone.texts == [together.texts[position]]
        assert trimmed(double_clara, alone.sequences[0]) == trimmed(double_clara, together.sequences[position])
        assert torch.equal(alone.indices[0], together.indices[position])


def test_without_rerank_all_documents_are_used_in_the_given_order(double_clara, memories, texts):
    given = [texts[3], texts[0], texts[2]]
    output = double_clara.generate(questions=QUESTIONS[:1], documents=[given], rerank=False, max_new_tokens=5)
    assert output.indices.tolist() == [[0, 1, 2]] and output.scores is None
    expected = slow_answer(double_clara, QUESTIONS[0], memories[[3, 0, 2]], 5)
    assert trimmed(double_clara, output.sequences[0]) == expected
    ragged = double_clara.generate(
        questions=QUESTIONS[:2], memories=[memories[:3], memories[3:]], rerank=False, max_new_tokens=5
    )
    assert ragged.indices.tolist() == [[0, 1, 2], [0, 1, -1]]
    assert trimmed(double_clara, ragged.sequences[1]) == slow_answer(double_clara, QUESTIONS[1], memories[3:], 5)


def test_without_rerank_top_k_takes_the_first_and_sampling_has_a_top_k_of_its_own(double_clara, memories):
    rows = [memories[:1], memories[1:4]]
    output = double_clara.generate(questions=QUESTIONS[:2], memories=rows, rerank=False, n_docs=2, max_new_tokens=5)
    assert output.indices.tolist() == [[0, -1], [0, 1]]
    expected = slow_answer(double_clara, QUESTIONS[1], memories[1:3], 5)
    assert trimmed(double_clara, output.sequences[1]) == expected
    with pytest.raises(ValueError, match="n_docs must be a whole number of at least 1, got 0"):
        double_clara.generate(questions=QUESTIONS[:2], memories=rows, rerank=False, n_docs=0)
    # Sampling from one token is greedy decoding, whatever the number of documents.
    config = GenerationConfig(do_sample=True, top_k=1, temperature=9.0, max_new_tokens=5)
    sampled = double_clara.generate(questions=QUESTIONS, memories=memories, n_docs=2, generation_config=config)
    greedy = double_clara.generate(questions=QUESTIONS, memories=memories, n_docs=2, max_new_tokens=5)
    assert torch.equal(sampled.sequences, greedy.sequences) and sampled.indices.shape == (3, 2)


def test_expanded_documents_stand_as_text_behind_the_memories_best_first(double_clara, memories, texts):
    documents, own = [texts[:4], [texts[4]]], [memories[:4], memories[4:]]
    options = {"questions": QUESTIONS[:2], "documents": documents, "n_docs": 3, "max_new_tokens": 5}
    output = double_clara.generate(**options, expand=2)
    for row, count in enumerate((3, 1)):
        chosen = output.indices[row, :count]
        best = [documents[row][place] for place in chosen[:2].tolist()]
        expected = slow_answer(double_clara, QUESTIONS[row], own[row][chosen], 5, best)
        assert trimmed(double_clara, output.sequences[row]) == expected
    assert not torch.equal(double_clara.generate(**options).sequences, output.sequences)
    cut = double_clara.generate(**options, expand=1, expand_max_length=4)
    best = documents[0][output.indices[0, 0]]
    best = double_clara.processor.tokenizer.decode(double_clara.processor.tokenizer.encode(best)[:4])
    expected = slow_answer(double_clara, QUESTIONS[0], own[0][output.indices[0]], 5, [best])
    assert trimmed(double_clara, cut.sequences[0]) == expected


@pytest.mark.parametrize("options", [{}, {"expand": 2}, {"rerank": False}])
def test_equal_texts_of_a_question_are_one_candidate(double_clara, texts, options):
    copies, distinct = [[texts[0], texts[0], texts[1], texts[0]], texts[1:3]], [texts[:2], texts[1:3]]
    found, wanted = (
        double_clara.generate(QUESTIONS[:2], rows, n_docs=2, max_new_tokens=4, **options) for rows in (copies, distinct)
    )
    place = torch.tensor([0, 2])  # of the distinct texts among the copies
    assert torch.equal(found.indices[0, :2], place[wanted.indices[0]])
    assert torch.equal(found.indices[1], wanted.indices[1])
    assert torch.equal(found.sequences, wanted.sequences)
    # A batch of the processor: as many slots as distinct texts, copies chosen by none, and the loss of the texts alone.
    losses = []
    for rows in (copies, distinct):
        output = double_clara(**double_clara.processor(QUESTIONS[:2], rows, ["In Velholm.", "Lanterns."]))
        assert output.topk_indices[0].tolist() in ([0, 2], [2, 0], [0, 1], [1, 0])
        losses.append(output.loss)
    assert torch.allclose(*losses, rtol=0, atol=1e-9)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"expand": 3, "documents": [["a", "b", "c"]]}, "expand=3 is more than n_docs=2"),
        ({"expand": 2, "documents": [["a", "b"]], "n_docs": 1}, "expand=2 is more than n_docs=1"),
        ({"expand": 1, "memories": torch.ones(1, 4, 32)}, "expand=1 needs texts"),
        ({"expand": True, "documents": [["a"]]}, "got True"),
        ({"expand": -1, "documents": [["a"]]}, "got -1"),
        ({"expand": 1, "documents": [["a"]], "expand_max_length": 0}, "expand_max_length .* got 0"),
    ],
)
def test_an_expansion_that_is_not_possible_is_refused(untouched_clara, options, message):
    with pytest.raises(ValueError, match=message):
        untouched_clara.generate(questions=QUESTIONS[:1], **options)


@pytest.mark.parametrize("shared", [True, False])
def test_no_memory_is_a_prompt_without_documents(double_clara, memories, shared):
    nothing = memories[:0]
    given = nothing if shared else [nothing, nothing]
    output = double_clara.generate(questions=QUESTIONS[:2], memories=given, rerank=False, max_new_tokens=5)
    assert output.indices.shape == (2, 0)
    for position in range(2):
        expected = slow_answer(double_clara, QUESTIONS[position], nothing, 5)
        assert trimmed(double_clara, output.sequences[position]) == expected


def test_a_question_without_memories_may_stand_beside_one_with(double_clara, memories):
    rows = [memories[:0], memories[:2]]
    output = double_clara.generate(questions=QUESTIONS[:2], memories=rows, rerank=False, max_new_tokens=5)
    assert output.indices.tolist() == [[-1, -1], [0, 1]]
    for position in range(2):
        expected = slow_answer(double_clara, QUESTIONS[position], rows[position], 5)
        assert trimmed(double_clara, output.sequences[position]) == expected


# Options of transformers' generate


def answer(model, memories, questions=QUESTIONS, **options):
    return model.generate(questions=questions, memories=memories, **{"max_new_tokens": 5, **options})


def test_max_new_tokens_bounds_the_answer_and_64_is_the_default(double_clara, memories):
    never_ends = {"eos_token_id": None}
    assert answer(double_clara, memories, max_new_tokens=3, **never_ends).sequences.shape == (3, 3)
    default = double_clara.generate(questions=QUESTIONS[:1], memories=memories, **never_ends)
    assert default.sequences.shape == (1, 64)


def test_a_generation_config_is_used_as_it_is_and_gets_the_models_end_and_padding_tokens(
    double_clara, memories, caplog
):
    config = GenerationConfig(max_new_tokens=7, num_beams=2, min_new_tokens=7)
    output = double_clara.generate(questions=QUESTIONS, memories=memories, generation_config=config)
    expected = answer(double_clara, memories, max_new_tokens=7, num_beams=2, min_new_tokens=7)
    assert torch.equal(output.sequences, expected.sequences) and output.sequences.shape == (3, 7)
    ends = double_clara.generate(
        questions=QUESTIONS, memories=memories, generation_config=GenerationConfig(num_beams=1)
    )
    assert ends.sequences.shape[1] <= 64
    assert torch.equal(ends.sequences, double_clara.generate(questions=QUESTIONS, memories=memories).sequences)
    length = double_clara.processor.encode_prompts(QUESTIONS, [2] * 3)["input_ids"].shape[1]
    short = GenerationConfig(max_length=length + 2)
    limited = double_clara.generate(questions=QUESTIONS, memories=memories, generation_config=short)
    assert limited.sequences.shape == (3, 2)
    with pytest.raises(ValueError, match=f"max_length=8 leaves no room .* prompt's {length} tokens too: give max_new_"):
        double_clara.generate(questions=QUESTIONS, memories=memories, generation_config=GenerationConfig(max_length=8))
    with pytest.raises(ValueError, match=f"max_length={length} leaves no room for an answer"):
        double_clara.generate(questions=QUESTIONS, memories=memories, max_length=length)
    assert config.eos_token_id is None
    assert not [record for record in caplog.records if "generation_config" in record.message]


def test_beams_find_answers_at_least_as_likely_as_greedy_decoding(double_clara, memories):
    options = {"return_dict_in_generate": True, "output_scores": True, "min_new_tokens": 5}
    greedy = answer(double_clara, memories, **options)
    beams = answer(double_clara, memories, num_beams=4, length_penalty=0.0, **options)
    logits = torch.stack(greedy.generation.scores, dim=1).log_softmax(dim=-1)
    greedy_total = logits.gather(-1, greedy.sequences.unsqueeze(-1)).sum(dim=(1, 2))
    assert beams.sequences.shape == greedy.sequences.shape
    assert (beams.generation.sequences_scores >= greedy_total - 1e-6).all()


def test_sampling_follows_the_seed(double_clara, memories):
    def sample(seed):
        torch.manual_seed(seed)
        return answer(double_clara, memories, do_sample=True, temperature=3.0, max_new_tokens=12).texts

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


def test_several_sequences_per_question_come_grouped(double_clara, memories):
    output = answer(double_clara, memories, num_beams=3, num_return_sequences=2)
    best = answer(double_clara, memories, num_beams=3)
    assert len(output.texts) == 6 and output.indices.shape == (3, 2)
    assert output.texts[::2] == best.texts


def test_return_dict_gives_what_the_decoder_returned(double_clara, memories):
    output = answer(double_clara, memories, return_dict_in_generate=True, output_scores=True)
    assert torch.equal(output.generation.sequences, output.sequences)
    assert torch.equal(torch.stack(output.generation.scores, dim=1)[:, 0].argmax(-1), output.sequences[:, 0])


def test_a_streamer_gets_every_token_as_it_is_made(double_clara, memories):
    class Collector(BaseStreamer):
        def __init__(self):
            self.tokens, self.ended = [], False

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.ended = True

    collector = Collector()
    output = answer(double_clara, memories, QUESTIONS[:1], streamer=collector)
    assert collector.tokens == output.sequences[0].tolist() and collector.ended


def test_a_text_iterator_streamer_in_a_thread_yields_the_answer(double_clara, memories):
    streamer = TextIteratorStreamer(double_clara.processor.tokenizer, skip_special_tokens=True, timeout=60)
    results = {}

    def work():
        results["output"] = answer(double_clara, memories, QUESTIONS[:1], streamer=streamer)

    thread = threading.Thread(target=work)
    thread.start()
    streamed = "".join(streamer)
    thread.join()
    assert streamed.strip() == results["output"].texts[0] != ""


def test_an_answer_ends_at_the_bases_end_tokens_and_its_other_defaults_are_not_used(base, tmp_path, texts):
    folder = tmp_path / "base"
    shutil.copytree(base, folder)
    defaults = json.loads((folder / "generation_config.json").read_text())
    defaults |= {"do_sample": True, "temperature": 9.0, "eos_token_id": [1, 77]}
    (folder / "generation_config.json").write_text(json.dumps(defaults))
    model = build_clara(str(folder))
    assert model.config.eos_token_id == [1, 77]
    memories = model.compress(texts)
    first, second = (answer(model, memories, max_new_tokens=20) for _ in range(2))
    assert torch.equal(first.sequences, second.sequences)
    head = model.decoder.get_output_embeddings()
    head.register_forward_hook(lambda module, inputs, logits: logits.index_fill(-1, torch.tensor([77]), 99.0))
    assert answer(model, memories, max_new_tokens=20).sequences.tolist() == [[77]] * 3


# Bad input


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ({}, ValueError, "give one of documents, memories and store"),
        (
            {"documents": [["a"]], "memories": torch.zeros(1, 4, 32)},
            ValueError,
            "give one of documents, memories and store",
        ),
        ({"documents": [["a"], ["b"]]}, ValueError, "documents has 2 lists for 1 questions"),
        ({"documents": [[]]}, ValueError, r"documents\[0\] is empty"),
        ({"documents": ["a"]}, TypeError, "documents must be a list with one list of strings per question"),
        ({"documents": [["a", 5]]}, TypeError, r"documents\[0\]\[1\] must be a string, got int"),
        ({"documents": [["a", " "]]}, ValueError, r"documents\[0\]\[1\] is an empty string"),
        ({"documents": [["a", "b <MEM1>"]]}, ValueError, r"documents\[0\]\[1\] contains '<MEM1>'"),
        ({"memories": torch.zeros(2, 4, 16)}, ValueError, r"memories has the shape \[2, 4, 16\].*\[N, 4, 32\]"),
        ({"memories": torch.zeros(2, 8, 32)}, ValueError, r"memories has the shape \[2, 8, 32\].*\[N, 4, 32\]"),
        ({"memories": torch.zeros(2, 128)}, ValueError, r"memories has the shape \[2, 128\]"),
        ({"memories": [torch.zeros(2, 4, 31)]}, ValueError, r"memories\[0\] has the shape \[2, 4, 31\]"),
        ({"memories": [[1.0]]}, TypeError, r"memories\[0\] must be a tensor, got list"),
        ({"memories": "bank"}, TypeError, "memories must be a tensor or a list of tensors, got str"),
        ({"memories": [torch.zeros(1, 4, 32)] * 2}, ValueError, "memories has 2 tensors for 1 questions"),
        ({"memories": torch.zeros(0, 4, 32)}, ValueError, "memories is empty: give every question at least one"),
        ({"memories": [torch.zeros(0, 4, 32)]}, ValueError, r"memories\[0\] is empty: give every question"),
        ({"memories": torch.zeros(2, 4, 32), "n_docs": 0}, ValueError, "n_docs must be .* at least 1, got 0"),
        ({"memories": torch.zeros(2, 4, 32), "n_docs": 1.5}, ValueError, "n_docs must be a whole number .*, got 1.5"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_sentence(untouched_clara, arguments, error, message):
    with pytest.raises(error, match=message):
        untouched_clara.generate(questions=QUESTIONS[:1], **arguments)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_memories_that_are_not_finite_are_refused_with_their_row(untouched_clara, value):
    memories = torch.ones(3, 4, 32)
    memories[2, 1, 5] = value
    message = "has values that are NaN or infinite in float32: compress its document again"
    for given, name in ((memories, r"memories\[2\]"), ([memories[:2], memories[:0], memories], r"memories\[2\]\[2\]")):
        for rerank in (True, False) if given is memories else (False,):
            with pytest.raises(ValueError, match=f"{name} {message}"):
                untouched_clara.generate(questions=QUESTIONS, memories=given, rerank=rerank)
    with pytest.raises(ValueError, match=rf"memories\[1\]\[0\] {message}"):
        untouched_clara.retrieve(QUESTIONS[:2], [memories[:2], memories[2:]])


@pytest.mark.parametrize("part, name", [("compressor", r"documents\[1\]"), ("query_reasoner", r"questions\[1\]")])
def test_weights_that_are_not_finite_are_told_by_compressing(clara, part, name):
    with torch.no_grad():
        clara.part_parameters(part)[-1].fill_(float("nan"))
    message = f"the memory of {name} has values that are NaN or infinite in float32: load weights that are finite"
    verb = clara.compress if part == "compressor" else clara.encode_questions
    with pytest.raises(ValueError, match=message):
        verb(["a", "a longer text"])


@pytest.mark.parametrize(
    "questions, error, message",
    [
        ([], ValueError, "questions is empty"),
        ("Who?", TypeError, "questions must be a list of strings, got str"),
        (["Who?", ""], ValueError, r"questions\[1\] is an empty string"),
        ([None], TypeError, r"questions\[0\] must be a string, got NoneType"),
        (["Who is <SEP>?"], ValueError, r"questions\[0\] contains '<SEP>'"),
    ],
)
def test_bad_questions_are_refused_by_every_verb(untouched_clara, questions, error, message):
    memories = torch.zeros(2, 4, 32)
    with pytest.raises(error, match=message):
        untouched_clara.generate(questions=questions, memories=memories)
    with pytest.raises(error, match=message):
        untouched_clara.retrieve(questions, memories)
    with pytest.raises(error, match=message):
        untouched_clara.encode_questions(questions)


@pytest.mark.parametrize(
    "documents, error, message",
    [
        ([], ValueError, "documents is empty: give at least one string"),
        ("a text", TypeError, "documents must be a list of strings, got str"),
        (["a", "\n "], ValueError, r"documents\[1\] is an empty string"),
        (["a", b"bytes"], TypeError, r"documents\[1\] must be a string, got bytes"),
        (["a <ENC>"], ValueError, r"documents\[0\] contains '<ENC>', a token that the model reserves: remove it"),
    ],
)
def test_bad_documents_are_refused_by_compress(untouched_clara, documents, error, message):
    with pytest.raises(error, match=message):
        untouched_clara.compress(documents)


def test_documents_are_compressed_in_batches_of_so_many_tokens(clara, texts, monkeypatch):
    expected = clara.compress(texts, batch_size=1)
    sizes, encode = [], clara.encode
    monkeypatch.setattr(clara, "encode", lambda *given, **own: (sizes.append(given[1].shape), encode(*given, **own))[1])
    rows = clara.processor.encode_documents(texts)
    most = 2 * max(clara.processor.encoded_lengths(rows))
    found = clara.compress(texts, max_tokens_per_batch=most)
    assert (found - expected).abs().max() < 1e-5
    assert sum(count for count, _ in sizes) == len(texts) and 1 < len(sizes) < len(texts)
    assert all(count * width <= most for count, width in sizes)
    with pytest.raises(ValueError, match="max_tokens_per_batch is 9, but a text has"):
        clara.compress(texts, max_tokens_per_batch=9)
    with pytest.raises(ValueError, match="batch_size=2 and max_tokens_per_batch=64 both"):
        clara.compress(texts, batch_size=2, max_tokens_per_batch=64)
    with pytest.raises(ValueError, match="max_tokens_per_batch must be a whole number of at least 1, got 0"):
        clara.compress(texts, max_tokens_per_batch=0)


@pytest.mark.parametrize("batch_size", [0, -1, 2.5])
def test_a_bad_batch_size_is_refused(untouched_clara, batch_size):
    with pytest.raises(ValueError, match=f"batch_size must be a whole number of at least 1, got {batch_size}"):
        untouched_clara.compress(["a"], batch_size=batch_size)


def test_a_batch_s_prompts_are_answered_from_its_memories_as_generate_does(double_clara, memories, texts):
    expected = double_clara.generate(QUESTIONS, memories=memories, n_docs=2, max_new_tokens=5)
    prompts = double_clara.processor.encode_prompts(QUESTIONS, [2, 2, 2])
    found = double_clara.answer(**prompts, memories=memories, document_index=expected.indices, max_new_tokens=5)
    assert found.texts == expected.texts and torch.equal(found.sequences, expected.sequences)
    # An unused slot: the last prompt has one document only.
    prompts = double_clara.processor.encode_prompts(QUESTIONS[:1], [1])
    rows = torch.tensor([[-1, 3]])
    found = double_clara.answer(**prompts, memories=memories, document_index=rows, max_new_tokens=5)
    alone = double_clara.generate(QUESTIONS[:1], documents=[[texts[3]]], rerank=False, max_new_tokens=5)
    assert found.texts == alone.texts
    with pytest.raises(ValueError, match="document_index holds 9"):
        double_clara.answer(**prompts, memories=memories, document_index=torch.tensor([[9]]))
