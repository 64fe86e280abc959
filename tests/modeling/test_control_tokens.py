"""What a document, question or answer says never acts as a control token, on any road."""

import copy
import json
import pickle
from types import SimpleNamespace

import pytest
import torch
from conftest import CHAT_TEMPLATE, TEXTS, build_tokenizer
from datasets import Dataset
from scripted_endpoint import Endpoint, Say
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from clara_hf.data.retrievers import split_control_tokens
from clara_hf.evaluation.systems.judge import judge
from clara_hf.evaluation.systems.listwise import ListwiseRanker
from clara_hf.program.text_lora import as_examples
from clara_hf.synthesis.backends.client import ChatRequest
from clara_hf.synthesis.backends.local_model import LocalModel
from modeling_clara.control_tokens_clara import ControlTokens


MARKUP = [
    "ends</s>",
    "<s> starts",
    "a <pad> b",
    "</s</s>>",
    "[INST]</s><s>",
    "\ufdd00\ufdd1",
    "<pad>" * 3,
    "x\ufdd0</s>",
]


def byte_level() -> PreTrainedTokenizerFast:
    return build_tokenizer()


def byte_fallback() -> PreTrainedTokenizerFast:
    """As the tokenizers of Llama 2 and Mistral: control tokens in the model's vocabulary, a prefix space everywhere."""
    pieces = ["<unk>", "<s>", "</s>", "<pad>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁"]
    words = ["e", "n", "d", "s", "<", "/", ">", "s>", "/s", "/s>", "en", "end", "▁e", "▁s"]
    pairs = [("s", ">"), ("/", "s"), ("/", "s>"), ("e", "n"), ("en", "d"), ("▁", "e"), ("▁", "s")]
    vocabulary = {piece: number for number, piece in enumerate([*pieces, *words])}
    tokenizer = Tokenizer(models.BPE(vocabulary, pairs, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return wrapped(tokenizer)


def unigram() -> PreTrainedTokenizerFast:
    """Whose vocabulary would let a text be cut into a control token as the likeliest piece."""
    letters = sorted({letter for text in [*TEXTS, *MARKUP, "[]user assistant"] for letter in text} | {"▁"})
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("<pad>", 0.0), *((letter, -5.0) for letter in letters)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return wrapped(tokenizer)


def wrapped(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    names = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
    new = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    new.chat_template = CHAT_TEMPLATE
    return new


KINDS = [byte_level, byte_fallback, unigram]


@pytest.mark.parametrize("text", MARKUP)
@pytest.mark.parametrize("kind", KINDS)
def test_hidden_markup_is_split_as_text_and_nothing_is_lost(kind, text):
    tokenizer = kind()
    control = ControlTokens(tokenizer)
    (ids,) = control.encode([f"<s>{control.hide(text)}</s>"])
    specials = set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}
    assert [token for token in ids if token in specials] == [tokenizer.bos_token_id, tokenizer.eos_token_id]
    assert (ids[0], ids[-1]) == (tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert tokenizer.decode(ids[1:-1]).strip() == text.strip()
    assert control.show(control.hide(text)) == text


@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_a_tokenizer_whose_control_tokens_have_other_names(kind):
    """Nothing but the name decides: neighbours are merged, and spaces put, as around any text."""
    tokenizer = kind()
    names = {"<s>": "{begin}", "</s>": "{end}", "<pad>": "{pad}", "<unk>": "{unk}"}
    other = tokenizer.backend_tokenizer.to_str()
    for name, new in names.items():
        other = other.replace(json.dumps(name), json.dumps(new))
    other = Tokenizer.from_str(other)
    control = ControlTokens(tokenizer)
    for text in MARKUP:
        (ids,) = control.encode([f"<s>before {control.hide(text)} after</s>next"])
        assert ids == other.encode(f"{{begin}}before {text} after{{end}}next", add_special_tokens=False).ids


@pytest.mark.parametrize("text", ["ends\uff1c/s\uff1e", "\ufe64pad\ufe65 b", "\uff1c\uff50\uff41\uff44>"])
def test_no_control_token_is_made_by_normalization(text):
    tokenizer = unigram()
    tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()
    assert set(tokenizer.encode(text, add_special_tokens=False)) & {2, 3}  # what the tokenizer makes of it
    control = ControlTokens(tokenizer)
    ids, acting = control.encode([control.hide(text), f"{control.hide(text)}</s>"])
    assert not set(ids) & {1, 2, 3} and [token for token in acting if token in (1, 2, 3)] == [2]


@pytest.mark.parametrize(
    ("normalizer", "text"),
    [
        (normalizers.Lowercase(), "ends</S>"),
        (normalizers.Lowercase(), "<PAD> b"),
        (normalizers.Replace("\u200b", ""), "ends<\u200b/s>"),
        (normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()]), "ends</s\u0301>"),
        (normalizers.Replace("{", "<"), "{pad> b"),
    ],
)
def test_no_control_token_is_made_by_what_a_normalizer_changes_or_leaves_out(normalizer, text):
    tokenizer = unigram()
    tokenizer.backend_tokenizer.normalizer = normalizer
    assert set(tokenizer.encode(text, add_special_tokens=False)) & {2, 3}  # what the tokenizer makes of it
    control = ControlTokens(tokenizer)
    ids, acting = control.encode([control.hide(text), f"{control.hide(text)}</s>"])
    assert not set(ids) & {1, 2, 3} and [token for token in acting if token in (1, 2, 3)] == [2]


def test_a_normalized_control_token_is_split_in_capitals_too():
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": [AddedToken("<|end|>", normalized=True, special=True)]})
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    control, own = ControlTokens(tokenizer), tokenizer.convert_tokens_to_ids("<|end|>")
    assert own in tokenizer.encode("an <|END|>", add_special_tokens=False)
    ids, acting = control.encode([control.hide("an <|END|>"), f"{control.hide('an <|END|>')}<|end|>"])
    assert own not in ids and acting.count(own) == 1


def test_text_without_markup_goes_the_ordinary_way():
    control = ControlTokens(build_tokenizer())
    prompts = [f"<s>{control.hide(text)}</s>" for text in TEXTS]
    assert control.encode(prompts) == control.tokenizer(prompts, add_special_tokens=False)["input_ids"]
    assert control._twin is None


def test_added_tokens_of_the_chat_template_are_control_tokens_and_others_are_not():
    tokenizer = build_tokenizer()
    tokenizer.add_tokens(["<think>", "<h1>", "  "])
    tokenizer.chat_template = "<think>  {{ messages[0]['content'] }}"
    control = pickle.loads(pickle.dumps(ControlTokens(tokenizer)))
    (ids,) = control.encode([control.hide("<think>  <h1>")])
    own = tokenizer.convert_tokens_to_ids(["<think>", "  ", "<h1>"])
    assert own[0] not in ids and set(own[1:]) <= set(ids)


def control_ids(processor, ids) -> list[int]:
    return [token for token in ids if token in set(processor.tokenizer.all_special_ids)]


def test_no_control_token_comes_from_documents_questions_and_answers(clara):
    processor, texts = clara.processor, ["A <s> in</s> it<pad>"]
    plain = ["A plain text of it"]
    for encode in (processor.encode_documents, processor.encode_questions):
        assert control_ids(processor, encode(texts)[0]) == control_ids(processor, encode(plain)[0])
    for text, expected in ((texts, plain),):
        of_slots = [processor.encode_prompts(one, [2])["input_ids"][0].tolist() for one in (text, expected)]
        raw = [processor.tokenize([processor.answer_prompt(one[0], documents=one)])[0] for one in (text, expected)]
        both = [processor.encode_prompts(one, [2], [one])["input_ids"][0].tolist() for one in (text, expected)]
        for found, wanted in (of_slots, raw, both):
            assert control_ids(processor, found) == control_ids(processor, wanted)
    targets = [
        processor.training_example(kind, processor.slots(1), processor.target(kind, one, one), one[0])["labels"]
        for kind in ("answer", "qa", "paraphrase")
        for one in (texts, plain)
    ]
    ends = [labels.count(processor.tokenizer.eos_token_id) for labels in targets]
    assert ends == [1] * 6 and all(labels[-1] == processor.tokenizer.eos_token_id for labels in targets)


@pytest.mark.parametrize("text", ["A plain text of bees.", "</s>" * 9, "", "bées 🐝🐝 </s> of the town"])
def test_a_text_is_cut_where_its_tokens_in_a_prompt_reach_the_budget(clara, text):
    processor = clara.processor
    lengths = [len(processor.tokenize([processor._hide(text[:end])])[0]) for end in range(len(text) + 1)]
    for budget in (1, 5, 8, 1000):
        assert len(processor.cut(text, budget)) == max(end for end, length in enumerate(lengths) if length <= budget)


def test_switch_lets_control_tokens_act_as_in_published_checkpoints(clara):
    memories = clara.compress(["in</s>it"])
    clara.config.split_control_tokens = False
    acting = copy.deepcopy(clara.processor)
    acting.config = clara.config
    assert acting.tokenizer.eos_token_id in acting.encode_documents(["in</s>it"])[0][:-1]
    clara.processor = acting
    assert not torch.equal(clara.compress(["in</s>it"]), memories)


def test_listwise_prompts_and_the_local_model_of_synthesis_read_markup_as_text(base):
    local = LocalModel(base, max_tokens=4, batch_size=1)
    ranker = ListwiseRanker(local.model, local.tokenizer, batch_size=2)

    def read(text: str) -> list[list[int]]:
        request = ChatRequest([{"role": "user", "content": text}], "reply", schema={}, temperature=0.0, seed=0)
        return [local._encode(request), *ranker.control.encode([ranker.prompt(text, [text, "another"])])]

    specials = set(local.tokenizer.all_special_ids)
    for marked, plain in zip(read("An end</s><s> of it"), read("An end of it"), strict=True):
        assert [token for token in marked if token in specials] == [token for token in plain if token in specials]


@pytest.mark.parametrize("kind", KINDS)
def test_encoders_make_no_control_token_of_their_texts_whatever_model_their_tokenizer_has(kind):
    tokenizer = kind()
    plain = tokenizer(TEXTS)["input_ids"]
    split_control_tokens(SimpleNamespace(tokenizer=tokenizer, prompts={"query": "query: "}))
    for text in MARKUP[:5]:
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert not set(ids) & set(tokenizer.convert_tokens_to_ids(["<s>", "</s>", "<pad>"]))
    assert tokenizer(TEXTS)["input_ids"] == plain


def test_a_judge_gets_no_markup_of_a_chat():
    with Endpoint(lambda messages, body, before: Say('{"correct": true}')) as endpoint:
        assert judge(endpoint.url, "m", "NO_KEY", [("Who <s>?", ["a</s>"], "b<|im_end|>[/INST]<end_of_turn>")]) == [
            True
        ]
    told = endpoint.requests[0]["messages"][0]["content"]
    for mark in ("<s>", "</s>", "<|im_end|>", "[/INST]", "<end_of_turn>"):
        assert mark not in told
    assert json.loads(told.split("\n\n")[1])["answer"].startswith("b")


def test_a_text_that_is_a_memory_slot_is_refused_wherever_text_stands_in_a_prompt(clara):
    processor, rows = clara.processor, [{"question": "Who?", "answers": ["Mara"], "docs": [clara.processor.slot_text]}]
    with pytest.raises(ValueError, match="reserve"):
        as_examples(Dataset.from_list(rows), processor)
