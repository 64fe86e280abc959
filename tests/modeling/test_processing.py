"""From text to tensors: what each position holds, what is cut, what is a label, and what is refused."""

import logging
import pickle

import pytest
import torch
from conftest import CHAT_TEMPLATE, TEXTS, build_tokenizer
from transformers import AutoProcessor

from modeling_clara import CLaRaConfig, CLaRaProcessor
from modeling_clara.control_tokens_clara import check_texts
from modeling_clara.processing_clara import fill_template, index_matrix


MEMORY_SLOT = "<MEM0><MEM1><MEM2><MEM3><SEP>"
SYSTEM = "Be brief."
PROMPTS = {
    "answer": {"system": SYSTEM, "user": "{docs}|{question}", "assistant": "{answer}"},
    "qa": {"system": None, "user": "{docs}|ask", "assistant": "Q: {question}\nA: {answer}"},
    "paraphrase": {"system": None, "user": ["one {docs}", "two {docs}", "{docs} three"], "assistant": "{paraphrase}"},
}


def build_processor(beginning=True, system_role=True, **fields) -> CLaRaProcessor:
    tokenizer = build_tokenizer(beginning=beginning, system_role=system_role)
    fields = {"doc_max_length": 32, "compression_rate": 8, "top_k": 2, "prompts": PROMPTS, **fields}
    geometry = CLaRaConfig(**fields)
    ids = CLaRaProcessor.add_tokens(tokenizer, geometry.num_memory_tokens, geometry.distinct_memory_tokens)
    decoder = {"model_type": "llama", "hidden_size": 32, "vocab_size": len(tokenizer)}
    return CLaRaProcessor(tokenizer, CLaRaConfig(**fields, **ids, decoder_config=decoder, pad_token_id=0))


@pytest.fixture(scope="module")
def processor() -> CLaRaProcessor:
    return build_processor()


def tokens_of(processor, ids):
    return processor.tokenizer.convert_ids_to_tokens(list(ids))


def words_of(processor, ids):
    return processor.tokenizer.decode([token for token in ids if token >= 0])


def exactly(processor, count):
    """A text of exactly `count` tokens."""
    text = "Mara " * 200
    ids = processor.tokenizer.encode(text, add_special_tokens=False)[:count]
    text = processor.tokenizer.decode(ids)
    assert len(processor.tokenizer.encode(text, add_special_tokens=False)) == count
    return text


# Documents and questions


@pytest.mark.parametrize("distinct", [True, False])
def test_a_document_is_marker_beginning_text_end_padded_on_the_left_then_its_memory_tokens(distinct):
    processor = build_processor(distinct_memory_tokens=distinct)
    rows = processor.encode_documents([TEXTS[0], "Aum"])
    for row, text in zip(rows, [TEXTS[0], "Aum"], strict=True):
        inner = processor.tokenizer.encode(text, add_special_tokens=False)
        assert tokens_of(processor, row[:2]) == ["<ENC>", "<s>"] and tokens_of(processor, row[-1:]) == ["</s>"]
        assert row[2:-1] == inner and words_of(processor, inner) == text
    batch = processor.pad_encodings(rows)
    memory = [f"<MEM{i}>" for i in range(4)] if distinct else ["<MEM>"] * 4
    missing = len(rows[0]) - len(rows[1])
    assert missing > 0 and batch["input_ids"].dtype == torch.int64
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (2, len(rows[0]) + 4)
    assert tokens_of(processor, batch["input_ids"][0]) == [*tokens_of(processor, rows[0]), *memory]
    assert tokens_of(processor, batch["input_ids"][1]) == ["<pad>"] * missing + tokens_of(processor, rows[1]) + memory
    assert batch["attention_mask"][0].all()
    assert batch["attention_mask"][1].tolist() == [0] * missing + [1] * (len(rows[1]) + 4)


def test_a_given_width_pads_further(processor):
    (row,) = processor.encode_documents(["Aum"])
    batch = processor.pad_encodings([row], width=20)
    assert batch["input_ids"].shape == (1, 24)
    assert batch["attention_mask"].sum() == len(row) + 4
    assert batch["input_ids"][0, 20 - len(row) : 20].tolist() == row


@pytest.mark.parametrize(
    "fields, start",
    [
        ({"beginning": False}, []),
        ({"beginning": False, "document_start": "</s>"}, ["</s>"]),
        ({"document_start": ""}, []),
    ],
)
def test_without_a_beginning_token_or_with_another_start(fields, start):
    processor = build_processor(**fields)
    (row,) = processor.encode_documents(["Aum"])
    inner = processor.tokenizer.tokenize("Aum")
    assert tokens_of(processor, row) == ["<ENC>", *start, *inner, "</s>"]


@pytest.mark.parametrize("keep_end", [True, False])
def test_a_document_over_the_budget_is_cut_with_or_without_its_end_token(keep_end):
    processor = build_processor(keep_end_token=keep_end)
    fitting, long = exactly(processor, 32), exactly(processor, 33)
    kept, cut = processor.encode_documents([fitting, long])
    assert len(kept) == len(cut) == 32 + 3
    assert kept[2:-1] == processor.tokenizer.encode(fitting, add_special_tokens=False)
    assert processor.find_cut_documents([fitting, long, fitting, long + long]) == [1, 3]
    inner = processor.tokenizer.encode(long, add_special_tokens=False)
    end = processor.tokenizer.eos_token_id
    assert cut[2:] == (inner[:32] + [end] if keep_end else inner)


def test_cut_documents_are_counted_once_per_call_with_the_way_to_list_them(processor, caplog):
    long = exactly(processor, 40)
    with caplog.at_level(logging.WARNING):
        processor.encode_documents([long, "Aum", long + " too"])
        processor.encode_documents(["Aum"])
        processor.encode_documents([long])
    told = [record.message for record in caplog.records]
    assert told == [
        "2 of 3 documents are longer than doc_max_length=32 tokens and were cut; "
        "processor.find_cut_documents(documents) lists them.",
        "1 of 1 documents are longer than doc_max_length=32 tokens and were cut; "
        "processor.find_cut_documents(documents) lists them.",
    ]


def test_cut_questions_are_told_once_with_the_way_to_list_them(caplog):
    processor = build_processor(query_max_length=7)
    long = exactly(processor, 8)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            processor.encode_questions(["Who?", long])
        processor.encode_questions(["Who?", exactly(processor, 7)])
    assert [record.message for record in caplog.records] == [
        "1 of 2 questions are longer than query_max_length=7 tokens and were cut for retrieval; "
        "processor.find_cut_questions(questions) lists them."
    ]
    assert processor.find_cut_questions(["Who?", long]) == [1]


@pytest.mark.parametrize("system", ["Be brief.", None])
def test_a_chat_template_that_always_raises_is_told(system):
    processor = build_processor(prompts={"answer": {**PROMPTS["answer"], "system": system}})
    processor.tokenizer.chat_template = "{{ raise_exception('No roles at all.') }}"
    with pytest.raises(ValueError, match=r"the tokenizer's chat template cannot write .* \(No roles at all\): set"):
        processor.answer_prompt("Who?", 1)


def test_questions_have_a_budget_of_their_own():
    processor = build_processor(query_max_length=5)
    (row,) = processor.encode_questions([exactly(processor, 30)])
    assert len(row) == 5 + 3 and row[-1] == processor.tokenizer.eos_token_id
    assert len(processor.encode_documents([exactly(processor, 30)])[0]) == 30 + 3


# Prompts


def test_a_prompt_has_system_user_and_the_opening_of_the_answer(processor):
    prompt = processor.answer_prompt("Who?", num_documents=2)
    assert prompt == f"<s>[system]{SYSTEM}[user]{MEMORY_SLOT * 2}|Who?[assistant]"
    assert processor.prompt("qa", processor.slots(1)) == f"<s>[user]{MEMORY_SLOT}|ask[assistant]"
    assert processor.answer_prompt("Who?") == f"<s>[system]{SYSTEM}[user]|Who?[assistant]"
    assert processor.answer_prompt("Who?", documents=["a", "b"]) == f"<s>[system]{SYSTEM}[user]a\nb|Who?[assistant]"
    assert (
        processor.answer_prompt("Who?", 1, ["a", "b"])
        == f"<s>[system]{SYSTEM}[user]{MEMORY_SLOT}\na\nb|Who?[assistant]"
    )


@pytest.mark.parametrize("sentence", ["System role not supported", "Conversation roles must alternate"])
def test_a_template_without_a_system_role_gets_the_system_text_in_the_user_turn(sentence):
    processor = build_processor()
    processor.tokenizer.chat_template = (
        "{% if messages[0]['role'] == 'system' %}{{ raise_exception('" + sentence + "') }}{% endif %}" + CHAT_TEMPLATE
    )
    assert processor.answer_prompt("Who?", 1) == f"<s>[user]{SYSTEM}\n{MEMORY_SLOT}|Who?[assistant]"
    example = processor.training_example("answer", processor.slots(1), "Mara.", "Who?")
    assert words_of(processor, example["labels"]) == "Mara.</s>"


def test_a_template_that_fails_for_another_reason_says_so():
    processor = build_processor()
    processor.tokenizer.chat_template = "{{ raise_exception('no turn will do') }}"
    with pytest.raises(Exception, match="no turn will do"):
        processor.answer_prompt("Who?")


def test_without_a_chat_template_the_turns_are_plain_paragraphs():
    processor = build_processor()
    processor.tokenizer.chat_template = None
    assert processor.answer_prompt("Who?", 1) == f"{SYSTEM}\n\n{MEMORY_SLOT}|Who?\n"
    example = processor.training_example("answer", processor.slots(1), "Mara.", "Who?")
    assert words_of(processor, example["input_ids"]) == f"{SYSTEM}\n\n{MEMORY_SLOT}|Who?\nMara.</s>"
    assert words_of(processor, example["labels"]) == "Mara.</s>"


def test_user_templates_take_turns_by_variant(processor):
    prompts = [processor.prompt("paraphrase", "D", variant=variant) for variant in range(4)]
    assert prompts == [f"<s>[user]{text}[assistant]" for text in ("one D", "two D", "D three", "one D")]


@pytest.mark.parametrize("hostile", ["{question}", "{docs}{answer}{paraphrase}", "{0} %s {unknown} {{x}}", r"\1 \g<0>"])
def test_what_is_filled_into_a_template_is_never_a_template(processor, hostile):
    assert fill_template("{docs}|{question}|{answer}", docs=hostile, question="Q") == f"{hostile}|Q|{{answer}}"
    prompt = processor.answer_prompt(f"why {hostile}", documents=[f"text {hostile}"])
    assert prompt == f"<s>[system]{SYSTEM}[user]text {hostile}|why {hostile}[assistant]"
    assert processor.target("qa", [hostile], [hostile + "?"]) == f"Q: {hostile}?\nA: {hostile}"
    assert processor.target("paraphrase", [hostile]) == hostile


def test_slots_are_memory_tokens_then_the_separator(processor):
    ids = processor.tokenizer.encode(processor.slots(2), add_special_tokens=False)
    assert tokens_of(processor, ids) == ["<MEM0>", "<MEM1>", "<MEM2>", "<MEM3>", "<SEP>"] * 2
    assert processor.slots(0) == ""
    shared = build_processor(distinct_memory_tokens=False)
    assert shared.slots(1) == "<MEM><MEM><MEM><MEM><SEP>"


# Targets and labels


def test_labels_cover_the_target_and_its_end_token_only(processor):
    example = processor.training_example("answer", processor.slots(2), "In Velholm.", "Where?")
    prompt = processor.tokenizer.encode(processor.answer_prompt("Where?", 2), add_special_tokens=False)
    labels = example["labels"]
    assert example["input_ids"][: len(prompt)] == prompt and labels[: len(prompt)] == [-100] * len(prompt)
    assert labels[len(prompt) :] == example["input_ids"][len(prompt) :]
    assert words_of(processor, labels) == "In Velholm.</s>"
    assert labels[-1] == processor.tokenizer.eos_token_id


def test_a_qa_target_lists_one_pair_per_entry(processor):
    target = processor.target("qa", ["In Velholm.", "Bees."], ["Where?", "What?"])
    assert target == "Q: Where?\nA: In Velholm.\nQ: What?\nA: Bees."
    example = processor.training_example("qa", processor.slots(1), target)
    assert words_of(processor, example["labels"]) == target + "</s>"


def test_a_token_never_spans_the_end_of_the_prompt():
    processor = build_processor()
    processor.tokenizer.add_tokens(["]Yes"])
    assert "]Yes" in processor.tokenizer.tokenize("[assistant]Yes.")
    example = processor.training_example("answer", processor.slots(1), "Yes.", "Is it?")
    prompt = processor.tokenizer.encode(processor.answer_prompt("Is it?", 1), add_special_tokens=False)
    assert example["input_ids"][: len(prompt)] == prompt
    assert words_of(processor, example["labels"]) == "Yes.</s>"


def test_a_chat_template_that_rewrites_the_prompt_once_an_answer_follows_is_refused():
    processor = build_processor()
    processor.tokenizer.chat_template = "{% if messages[-1]['role'] == 'assistant' %}done {% endif %}" + CHAT_TEMPLATE
    with pytest.raises(ValueError, match="the tokenizer's chat template writes .* otherwise once an answer follows"):
        processor.training_example("answer", processor.slots(1), "Yes.", "Is it?")


def test_max_length_cuts_the_target_and_says_when_nothing_of_it_is_left(processor):
    whole = processor.training_example("answer", processor.slots(1), "In Velholm, on the river.", "Where?")
    length = whole["labels"].count(-100)
    short = processor.training_example(
        "answer", processor.slots(1), "In Velholm, on the river.", "Where?", max_length=length + 2
    )
    assert short["input_ids"] == whole["input_ids"][: length + 2] and short["labels"] == whole["labels"][: length + 2]
    with pytest.raises(ValueError, match=f"max_length={length} leaves no room for the target .* 'Where\\?'"):
        processor.training_example("answer", processor.slots(1), "In Velholm.", "Where?", max_length=length)


def test_prompts_are_padded_on_the_left_with_labels_ignored_there(processor):
    batch = processor.pad_prompts([[5, 6, 7], [8]], [[-100, 6, 7], [8]])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [0, 0, 8]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    assert batch["labels"].tolist() == [[-100, 6, 7], [-100, -100, 8]]
    assert "labels" not in processor.pad_prompts([[5]])


def test_a_batch_holds_every_distinct_document_once_and_says_which_question_has_which(processor):
    questions, documents = ["Where?", "Who is it?", "What?"], [TEXTS[:3], [TEXTS[1]], [TEXTS[3], TEXTS[0]]]
    batch = processor(questions, documents, ["Here.", "Mara.", "Bees."])
    assert batch["document_index"].tolist() == [[0, 1, 2], [1, -1, -1], [3, 0, -1]]
    assert batch["document_input_ids"].shape[0] == 4 and batch["query_input_ids"].shape[0] == 3
    for row, (question, count) in enumerate(zip(questions, (2, 1, 2), strict=True)):
        assert f"[user]{MEMORY_SLOT * count}|{question}[assistant]" in words_of(processor, batch["input_ids"][row])
        assert words_of(processor, batch["document_input_ids"][row][-4:]) == MEMORY_SLOT.removesuffix("<SEP>")
    assert [words_of(processor, row) for row in batch["labels"]] == ["Here.</s>", "Mara.</s>", "Bees.</s>"]
    unlabelled = processor(questions, documents)
    assert "labels" not in unlabelled
    assert words_of(processor, unlabelled["input_ids"][0]).endswith("[assistant]")


def test_index_matrix_fills_up_with_minus_one_on_the_right():
    assert index_matrix([[3, 1], [], [2]]).tolist() == [[3, 1], [-1, -1], [2, -1]]
    assert index_matrix([[], []]).shape == (2, 0)


# Saving, pickling


def test_a_pickled_processor_encodes_alike(processor):
    other = pickle.loads(pickle.dumps(processor))
    assert other.encode_documents(TEXTS) == processor.encode_documents(TEXTS)
    assert other.answer_prompt("Who?", 2) == processor.answer_prompt("Who?", 2)
    assert other.training_example("qa", other.slots(1), "Q") == processor.training_example(
        "qa", processor.slots(1), "Q"
    )
    with pytest.raises(ValueError, match="<SEP>"):
        other.encode_documents(["a <SEP>"])


@pytest.mark.parametrize("distinct", [True, False])
def test_a_processor_comes_back_from_its_folder_through_auto_processor(tmp_path, distinct):
    processor = build_processor(distinct_memory_tokens=distinct)
    processor.save_pretrained(tmp_path)
    loaded = AutoProcessor.from_pretrained(tmp_path)
    assert type(loaded) is CLaRaProcessor and loaded.config.prompts == processor.config.prompts
    documents = [*TEXTS, exactly(processor, 40)]
    assert loaded.encode_documents(documents) == processor.encode_documents(documents)
    example = processor(["Who?"], [TEXTS], ["Mara."])
    for key, value in loaded(["Who?"], [TEXTS], ["Mara."]).items():
        assert torch.equal(value, example[key])


def test_saving_a_processor_leaves_the_config_of_a_model_there_alone(processor, tmp_path):
    (tmp_path / "config.json").write_text("{}")
    processor.save_pretrained(tmp_path)
    assert (tmp_path / "config.json").read_text() == "{}"


# Bad input


@pytest.mark.parametrize(
    "texts, error, message",
    [
        ("text", TypeError, "documents must be a list of strings, got str"),
        (None, TypeError, "documents must be a list of strings, got NoneType"),
        ([], ValueError, "documents is empty: give at least one string"),
        (["a", ""], ValueError, r"documents\[1\] is an empty string: remove it or give it a text"),
        (["a", "\t\n "], ValueError, r"documents\[1\] is an empty string"),
        (
            ["a", "b \ud83d c"],
            ValueError,
            r"documents\[1\] has '\\ud83d', half of a surrogate pair, at character 2: remove",
        ),
        ([3], TypeError, r"documents\[0\] must be a string, got int"),
        (["a", ["b"]], TypeError, r"documents\[1\] must be a string, got list"),
    ],
)
def test_bad_texts_are_named(processor, texts, error, message):
    for check in (lambda: check_texts(texts, "documents"), lambda: processor.encode_documents(texts)):
        with pytest.raises(error, match=message):
            check()
    with pytest.raises(error, match=message):
        processor.find_cut_documents(texts)


@pytest.mark.parametrize("token", ["<MEM0>", "<MEM3>", "<AE>", "<ENC>", "<SEP>"])
def test_a_reserved_token_is_refused_wherever_users_give_text(processor, token):
    message = rf"\[0\] contains '{token}', a token that the model reserves: remove it"
    for call in (
        lambda: processor.encode_documents([f"a{token}b"]),
        lambda: processor.encode_questions([token]),
        lambda: processor.answer_prompt(f"Who {token}?"),
        lambda: processor.answer_prompt("Who?", documents=[token]),
        lambda: processor.target("answer", [token]),
        lambda: processor.target("qa", ["a"], [token]),
        lambda: processor(["Who?"], [[token]]),
        lambda: processor(["Who?"], [["a"]], [token]),
    ):
        with pytest.raises(ValueError, match=message):
            call()
    assert processor.encode_documents(["<MEM4> <mem0> <MEM> < SEP >"])


@pytest.mark.parametrize(
    "arguments, error, message",
    [
        ((["a", "b"], [["c"]]), ValueError, "documents has 1 lists for 2 questions: give one per question"),
        ((["a"], ["c"]), TypeError, "documents must be a list"),
        ((["a"], "c"), TypeError, "documents must be a list"),
        ((["a"], [[]]), ValueError, r"documents\[0\] is empty"),
        ((["\udc00"], [["c"]]), ValueError, r"questions\[0\] has '\\udc00', half of a surrogate pair"),
        ((["a"], [["c", ""]]), ValueError, r"documents\[0\]\[1\] is an empty string"),
        (([], []), ValueError, "questions is empty"),
        ((["a"], [["c"]], []), ValueError, "answers is empty"),
        ((["a"], [["c"]], ["d", "e"]), ValueError, "answers has 2 texts for 1 questions: give one per question"),
        ((["a"], [["c"]], [""]), ValueError, r"answers\[0\] is an empty string"),
    ],
)
def test_lists_that_do_not_fit_are_named(processor, arguments, error, message):
    with pytest.raises(error, match=message):
        processor(*arguments)


def test_question_and_answer_lists_of_unequal_length_are_refused(processor):
    with pytest.raises(ValueError, match="2 questions have 1 answers"):
        processor.target("qa", ["a"], ["b", "c"])
