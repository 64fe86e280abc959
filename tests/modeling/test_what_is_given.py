"""What `forward`, `generate` and `compress` are given: taken in the forms that people have, or refused by name."""

import copy
import logging
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TEXTS
from peft import LoraConfig, get_peft_model
from transformers import AutoModel, GenerationConfig

from clara_hf.memory_store import MemoryStore
from modeling_clara import CLaRaConfig, CLaRaForRetrievalGeneration


QUESTIONS = ["Who keeps bees?", "Where is the market?"]


@pytest.fixture(scope="module")
def batch(untouched_clara):
    return untouched_clara.processor(QUESTIONS, [TEXTS[:2], TEXTS[2:4]], ["Mara", "Velholm"])


@pytest.mark.parametrize(
    "change, facts",
    [
        (lambda batch: {"attention_mask": batch["attention_mask"][:, 1:]}, "attention_mask.*input_ids"),
        (lambda batch: {"query_attention_mask": batch["query_attention_mask"][:1]}, "query_attention_mask"),
        (lambda batch: {"query_attention_mask": batch["query_attention_mask"].tolist()}, "query_attention_mask.*list"),
        (lambda batch: {"document_attention_mask": torch.ones(1, 1)}, "document_attention_mask"),
        (lambda batch: {"input_ids": batch["input_ids"].float()}, r"input_ids.*torch\.float32"),
        (lambda batch: {"query_input_ids": batch["query_input_ids"][0]}, r"query_input_ids.*shape \[\d+\]"),
        (lambda batch: {"document_input_ids": batch["document_input_ids"] + 400}, r"document_input_ids hold \d+.*407"),
        (lambda batch: {"input_ids": batch["input_ids"] * -1}, r"input_ids hold -\d+"),
        (lambda batch: {"query_input_ids": batch["query_input_ids"][:1], "query_attention_mask": None}, "1 rows.*2"),
        (lambda batch: {"document_index": batch["document_index"] + 9}, "document_index holds 12"),
        (lambda batch: {"document_index": batch["document_index"].float()}, "document_index.*float32"),
        (lambda batch: {"document_index": batch["document_index"] - 9}, "document_index holds -9"),
        (
            lambda batch: {"query_input_ids": batch["query_input_ids"][:, -2:], "query_attention_mask": None},
            "2 columns",
        ),
        (lambda batch: {"labels": batch["labels"][:, 1:]}, "labels.*input_ids"),
        (lambda batch: {"labels": batch["labels"].float()}, "labels.*float32"),
        (lambda batch: {"labels": batch["labels"].tolist()}, "labels.*list"),
        (lambda batch: {"labels": batch["labels"] + 10**6}, r"labels hold \d+.*407"),
        (lambda batch: {"labels": batch["labels"].clamp(min=-7)}, "labels hold -7.*-100"),
        (lambda batch: {"logits_to_keep": 1}, "logits_to_keep=1"),
        (lambda batch: {"logits_to_keep": "all"}, "logits_to_keep.*'all'"),
    ],
)
def test_tensors_that_do_not_go_together_are_named(change, facts, untouched_clara, batch):
    with pytest.raises(ValueError, match=facts) as refused:
        untouched_clara(**{**batch, **change(batch)})
    assert "\n" not in str(refused.value)


def test_labels_may_be_of_either_whole_type(untouched_clara, batch):
    short = {**batch, "labels": batch["labels"].int()}
    assert torch.equal(untouched_clara(**short).loss, untouched_clara(**batch).loss)


def test_misspelled_argument_of_forward_is_refused(untouched_clara, batch):
    with pytest.raises(TypeError, match="label_ids"):
        untouched_clara(**batch, label_ids=batch["labels"])


@pytest.mark.parametrize(
    "options, facts",
    [
        ({"num_return_sequences": 0.5}, "num_return_sequences.*0.5"),
        ({"num_beams": GenerationConfig}, "num_beams.*GenerationConfig"),
        ({"max_new_tokens": 0}, "max_new_tokens.*0"),
        ({"do_sample": 1}, "do_sample.*1"),
        ({"temperature": "hot", "do_sample": True}, "temperature.*hot"),
        ({"generation_config": {"num_beams": 1.5}}, "num_beams.*1.5"),
        ({"repetition_penalty": "high"}, "repetition_penalty.*high"),
        ({"repetition_penalty": -1.0}, "repetition_penalty.*-1.0"),
        ({"length_penalty": [1]}, "length_penalty.*1"),
        ({"length_penalty": 10**400, "num_beams": 2, "max_new_tokens": 3}, "length_penalty.*1000"),
        ({"max_length": "long"}, "max_length.*long"),
        ({"output_scores": 0.5}, "output_scores.*0.5"),
        ({"guidance_scale": 1.5}, "guidance_scale"),
        ({"encoder_repetition_penalty": 1.5}, "encoder_repetition_penalty"),
        ({"token_healing": True}, "token_healing"),
        ({"suppress_tokens": "a"}, "suppress_tokens.*'a'"),
        ({"suppress_tokens": [None]}, "suppress_tokens.*None"),
        ({"eos_token_id": [3, 10**20]}, "eos_token_id.*1000"),
        ({"forced_eos_token_id": {}}, "forced_eos_token_id.*{}"),
        ({"top_p": "a" * 3000}, "^top_p.{,150}$"),
        ({"assistant_model": object()}, "assistant_model"),
        ({"attention_mask": torch.ones(2, 4)}, "attention_mask"),
        ({"inputs_embeds": torch.ones(2, 4, 32)}, "inputs_embeds"),
        ({"n_docs": 1.5}, "n_docs.*1.5"),
    ],
)
def test_options_of_generate_that_cannot_work_are_named(options, facts, untouched_clara):
    with pytest.raises(ValueError, match=facts):
        untouched_clara.generate(QUESTIONS, memories=torch.zeros(2, 4, 32), **options)


def test_generation_config_may_be_a_dictionary(untouched_clara):
    memories = untouched_clara.compress(TEXTS)
    given = untouched_clara.generate(QUESTIONS, memories=memories, generation_config={"max_new_tokens": 3})
    assert given.texts == untouched_clara.generate(QUESTIONS, memories=memories, max_new_tokens=3).texts
    with pytest.raises(ValueError, match="generation_config.*'max_new_token'"):
        untouched_clara.generate(QUESTIONS, memories=memories, generation_config={"max_new_token": 3})
    with pytest.raises(TypeError, match="generation_config.*int"):
        untouched_clara.generate(QUESTIONS, memories=memories, generation_config=3)


def test_top_k_is_sampling_s_where_one_samples_and_else_the_number_of_documents(untouched_clara, caplog):
    memories = untouched_clara.compress(TEXTS)
    options = {"memories": memories, "max_new_tokens": 4}
    greedy = untouched_clara.generate(QUESTIONS, n_docs=2, **options)
    sampled = untouched_clara.generate(QUESTIONS, do_sample=True, top_k=1, temperature=9.0, **options)
    assert sampled.texts == greedy.texts and sampled.indices.shape == (2, untouched_clara.config.top_k)
    logging.Logger.warning_once.cache_clear()  # another test may have had the warning
    with caplog.at_level("WARNING"):
        assert untouched_clara.generate(QUESTIONS, top_k=1, **options).indices.shape == (2, 1)
        assert untouched_clara.retrieve(QUESTIONS, memories, top_k=3).indices.shape == (2, 3)
    assert "n_docs" in caplog.text
    with pytest.raises(ValueError, match="n_docs=1.*top_k=2"):
        untouched_clara.retrieve(QUESTIONS, memories, n_docs=1, top_k=2)


class Store:
    """Memories by key, searched as a memory store is."""

    def __init__(self, model, texts):
        self.texts, self.memories = texts, model.compress(texts)

    def search(self, queries, top_k):
        scores = torch.cosine_similarity(queries.flatten(1)[:, None], self.memories.flatten(1)[None], dim=-1)
        best = scores.sort(descending=True, stable=True)
        keys = [[f"key {row}" for row in rows[:top_k]] for rows in best.indices.tolist()]
        return SimpleNamespace(scores=best.values[:, :top_k], keys=keys)

    def get(self, keys):
        return self.memories[[int(key.split()[1]) for key in keys]]


def test_a_store_is_asked_in_place_of_memories(untouched_clara):
    store = Store(untouched_clara, TEXTS)
    expected = untouched_clara.retrieve(QUESTIONS, store.memories, n_docs=3)
    found = untouched_clara.retrieve(QUESTIONS, store, n_docs=3)
    assert found.keys == [[f"key {row}" for row in rows] for rows in expected.indices.tolist()]
    assert torch.allclose(found.scores, expected.scores)
    answers = untouched_clara.generate(QUESTIONS, store=store, n_docs=2, max_new_tokens=4)
    wanted = untouched_clara.generate(QUESTIONS, memories=store.memories, n_docs=2, max_new_tokens=4)
    assert answers.texts == wanted.texts and [keys[0] for keys in answers.keys] == [keys[0] for keys in found.keys]


def columns() -> list:
    datasets, pandas = pytest.importorskip("datasets"), pytest.importorskip("pandas")
    return [datasets.Dataset.from_dict({"text": TEXTS})["text"], pandas.Series(TEXTS), np.array(TEXTS), tuple(TEXTS)]


def test_columns_arrays_and_tuples_are_lists_of_texts(untouched_clara):
    expected = untouched_clara.compress(TEXTS)
    for texts in columns():
        assert torch.equal(untouched_clara.compress(texts), expected)
        assert untouched_clara.generate(texts[:1], documents=[texts[1:3]], max_new_tokens=2).texts
    for wrong in (set(TEXTS), dict.fromkeys(TEXTS), "one text", (text for text in TEXTS)):
        with pytest.raises(TypeError, match=f"documents.*{type(wrong).__name__}"):
            untouched_clara.compress(wrong)
    table = pytest.importorskip("pandas").DataFrame({"text": TEXTS})
    for wrong in (table, np.array([TEXTS])):
        with pytest.raises(TypeError, match=f"documents.*{type(wrong).__name__}"):
            untouched_clara.compress(wrong)


@pytest.mark.parametrize(
    "option",
    [
        {"streamer": 3},
        {"eos_token_id": "x"},
        {"pad_token_id": 10**20},
        {"logits_processor": 5},
        {"forced_eos_token_id": 10**5},
    ],
)
def test_options_that_fail_within_transformers_are_named(option, untouched_clara):
    ((name, value),) = option.items()
    with pytest.raises((TypeError, ValueError), match=f"{name}={value!r}"):
        untouched_clara.generate(QUESTIONS[:1], documents=[TEXTS[:2]], **option)


def test_a_long_value_of_an_option_is_not_told_whole(untouched_clara):
    with pytest.raises(ValueError, match="early_stopping") as told:
        untouched_clara.generate(QUESTIONS[:1], documents=[TEXTS[:2]], early_stopping="a" * 3000)
    assert len(str(told.value)) < 500


def test_stop_strings_end_an_answer(untouched_clara):
    arguments = {"questions": QUESTIONS[:1], "documents": [TEXTS[:2]], "max_new_tokens": 12}
    (text,) = untouched_clara.generate(**arguments).texts
    word = re.search("[a-z]{3}", text, re.IGNORECASE)[0]  # random weights write broken characters too
    (stopped,) = untouched_clara.generate(**arguments, stop_strings=[word]).texts
    assert stopped and len(stopped) < len(text) and text.startswith(stopped)


def test_peft_is_refused(clara):
    config = LoraConfig(target_modules="all-linear")
    for attempt in (lambda: get_peft_model(clara, config), lambda: clara.add_adapter(config, "mine")):
        with pytest.raises(ValueError, match="adapters of its own"):
            attempt()
    with pytest.raises(ValueError, match="adapters of its own"):
        clara.load_adapter("folder")


def test_processor_takes_what_every_processor_takes(untouched_clara, batch):
    processor, texts = untouched_clara.processor, (QUESTIONS, [TEXTS[:2], TEXTS[2:4]], ["Mara", "Velholm"])
    found = processor(*texts, padding=True, return_tensors="pt")
    assert all(torch.equal(found[name], batch[name]) for name in batch)
    with pytest.raises(ValueError, match="return_tensors='np'"):
        processor(*texts, return_tensors="np")
    with pytest.raises(ValueError, match="padding=False"):
        processor(*texts, padding=False)


def test_vocabulary_is_not_resized_and_a_configuration_without_ids_is_told(untouched_clara):
    with pytest.raises(ValueError, match="from_base"):
        untouched_clara.resize_token_embeddings(500)
    config = CLaRaConfig(decoder_config=copy.deepcopy(untouched_clara.config.decoder_config))
    with pytest.raises(ValueError, match="memory_token_ids"):
        CLaRaForRetrievalGeneration(config)
    config = copy.deepcopy(untouched_clara.config)
    config.pad_token_id = None
    with pytest.raises(ValueError, match="pad_token_id"):
        CLaRaForRetrievalGeneration(config)


@pytest.mark.parametrize(
    ("name", "value"),
    [("memory_token_ids", True), ("ae_token_id", "x"), ("eos_token_id", [1, None]), ("decoder_config", 1e23)],
)
def test_ids_and_decoders_of_a_configuration_are_of_their_types(name, value):
    with pytest.raises(ValueError, match=name):
        CLaRaConfig(**{name: value})


@pytest.mark.parametrize("checkpoint_format", ["full", "adapter"])
def test_loading_options_are_the_same_for_both_kinds_of_checkpoints(checkpoint_format, clara, tmp_path):
    clara.config.checkpoint_format = checkpoint_format
    clara.save_pretrained(tmp_path)
    options = {"ignore_mismatched_sizes": True, "key_mapping": {"^unknown": "known"}}
    loaded = CLaRaForRetrievalGeneration.from_pretrained(tmp_path, torch_dtype=torch.float64, **options)
    assert loaded.dtype == torch.float64
    assert torch.allclose(loaded.compress(TEXTS).float(), clara.compress(TEXTS), atol=1e-5)
    for load in (CLaRaForRetrievalGeneration, AutoModel):
        assert load.from_pretrained(tmp_path, torch_dtype="float16", dtype="float64").dtype == torch.float64
    with pytest.raises(TypeError, match="torch_dtpye"):
        CLaRaForRetrievalGeneration.from_pretrained(tmp_path, torch_dtpye=torch.float64)
    for dtype in ("float8_e4m3fn", "flaot32", torch.int8):
        with pytest.raises(ValueError, match=f"dtype.*{dtype}"):
            CLaRaForRetrievalGeneration.from_pretrained(tmp_path, dtype=dtype)


def test_a_store_that_a_model_in_another_dtype_opens_is_refused_with_the_dtype(clara, tmp_path):
    clara.save_pretrained(tmp_path / "clara")
    MemoryStore.open(tmp_path / "store", clara).add(TEXTS, show_progress=False)
    loaded = CLaRaForRetrievalGeneration.from_pretrained(tmp_path / "clara", dtype="bfloat16")
    with pytest.raises(ValueError, match="dtype bfloat16"):
        MemoryStore.open(tmp_path / "store", loaded)


@pytest.mark.parametrize("checkpoint_format", ["adapter", "flat"])
def test_adapters_have_no_variant(checkpoint_format, clara, tmp_path):
    clara.config.checkpoint_format = checkpoint_format
    with pytest.raises(ValueError, match="variant='fp16'"):
        clara.save_pretrained(tmp_path / "saved", variant="fp16")
    assert not (tmp_path / "saved").exists()


def test_offloaded_layers_compress_the_same_and_are_named_where_their_values_are_needed(clara, tmp_path):
    expected = clara.compress(TEXTS)
    clara.save_pretrained(tmp_path / "clara")
    places = {"memory_embeddings": "cpu", "decoder.lm_head": "cpu", "decoder.model.embed_tokens": "cpu"}
    places |= {"decoder.model.norm": "cpu", "decoder.model.rotary_emb": "cpu", "decoder.model.layers.0": "cpu"}
    places["decoder.model.layers.1"] = "disk"
    loaded = CLaRaForRetrievalGeneration.from_pretrained(
        tmp_path / "clara", device_map=places, offload_folder=tmp_path / "offload"
    )
    torch.testing.assert_close(loaded.compress(TEXTS), expected)
    own = clara.adapter_state_dict()
    for refused in (loaded.compressor_fingerprint, lambda: loaded.load_adapter_state_dict(own)):
        with pytest.raises(ValueError, match=r"layers\.1.*device_map"):
            refused()
    loaded.config.checkpoint_format = "adapter"
    with pytest.raises(ValueError, match=r"layers\.1.*device_map"):
        loaded.save_pretrained(tmp_path / "again")
    assert not (tmp_path / "again").exists()
    loaded.remove_query_reasoner()
    with pytest.raises(ValueError, match=r"layers\.1.*device_map"):
        loaded.add_query_reasoner()
    with pytest.raises(ValueError, match=r"layers\.1.*device_map"):
        CLaRaForRetrievalGeneration.from_base(
            clara.config.base_model_name_or_path, device_map=places, offload_folder=tmp_path / "base"
        )


@pytest.mark.parametrize("checkpoint_format", ["full", "adapter"])
@pytest.mark.parametrize("places", [{"": "disk"}, {"decoder": "cpu", "memory_embeddings": "disk"}, "some"])
def test_offloaded_models_retrieve_and_answer_the_same(places, checkpoint_format, clara, tmp_path):
    clara.config.checkpoint_format = checkpoint_format
    clara.save_pretrained(tmp_path / "clara")
    options = {"device_map": places} if places != "some" else {"device_map": "auto", "max_memory": {"cpu": "200KB"}}
    loaded = CLaRaForRetrievalGeneration.from_pretrained(tmp_path / "clara", offload_folder=tmp_path / "o", **options)
    assert "disk" in loaded.hf_device_map.values()
    questions = ["Who keeps bees?", "Where is the market of Velholm held on Thursdays?"]
    torch.testing.assert_close(loaded.compress(TEXTS), clara.compress(TEXTS))
    for rest in ({}, {"num_beams": 2}):
        expected, found = (model.generate(questions, documents=[TEXTS] * 2, **rest) for model in (clara, loaded))
        assert found.texts == expected.texts and torch.equal(found.indices, expected.indices)
