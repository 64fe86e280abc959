"""The configuration: derived values, and one sentence for every value out of range."""

import pytest
from transformers import LlamaConfig

from modeling_clara import CLaRaConfig


DECODER = {"model_type": "llama", "hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 99}
ANSWER = {"system": None, "user": "{docs}\n{question}", "assistant": "{answer}"}


@pytest.mark.parametrize("rate, count", [(4, 64), (16, 16), (32, 8), (64, 4), (128, 2), (256, 1)])
def test_the_number_of_memory_tokens_is_the_budget_over_the_rate(rate, count):
    assert CLaRaConfig(doc_max_length=256, compression_rate=rate).num_memory_tokens == count


def test_width_and_vocabulary_are_the_decoders_given_as_dict_or_configuration():
    for decoder in (DECODER, LlamaConfig(**{key: value for key, value in DECODER.items() if key != "model_type"})):
        config = CLaRaConfig(decoder_config=decoder)
        assert isinstance(config.decoder_config, LlamaConfig)
        assert (config.hidden_size, config.vocab_size) == (32, 99)
    assert DECODER["model_type"] == "llama"


def test_a_configuration_comes_back_from_its_file(tmp_path):
    config = CLaRaConfig(
        decoder_config=DECODER,
        doc_max_length=64,
        compression_rate=32,
        distinct_memory_tokens=False,
        topk_taken_mask="published",
        temperature=0.1,
        prompts={"answer": ANSWER},
        memory_token_ids=[90],
        ae_token_id=91,
        enc_token_id=92,
        sep_token_id=93,
        eos_token_id=[1, 2],
    )
    config.save_pretrained(tmp_path)
    loaded = CLaRaConfig.from_pretrained(tmp_path)
    for name in ("doc_max_length", "compression_rate", "distinct_memory_tokens", "topk_taken_mask", "temperature"):
        assert getattr(loaded, name) == getattr(config, name)
    assert loaded.decoder_config.to_dict() == config.decoder_config.to_dict()
    assert loaded.eos_token_id == [1, 2]
    assert loaded.added_token_ids == [90, 91, 92, 93]
    assert loaded.prompts["answer"] == ANSWER and loaded.prompts["qa"]["system"]


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"doc_max_length": 0}, "doc_max_length must be a whole number of at least 1, got 0"),
        ({"doc_max_length": 64.0}, r"doc_max_length must be a whole number of at least 1, got 64\.0"),
        ({"top_k": True}, "top_k must be a whole number of at least 1, got True"),
        ({"top_k": -1}, "top_k must be a whole number of at least 1, got -1"),
        ({"query_max_length": 0}, "query_max_length must be"),
        ({"lora_r": 0}, "lora_r must be"),
        ({"compression_rate": 24}, "compression_rate must divide doc_max_length, got 24 and 256"),
        ({"compression_rate": 512}, "compression_rate must divide doc_max_length, got 512 and 256"),
        ({"temperature": 0}, "temperature must be positive, got 0"),
        ({"lora_alpha": -2}, "lora_alpha must be positive, got -2"),
        ({"lora_dropout": 1.0}, r"lora_dropout must be at least 0 and below 1, got 1\.0"),
        ({"mse_weight": -0.1}, r"mse_weight must be at least 0, got -0\.1"),
        ({"temperature": "0.02"}, "temperature must be positive, got '0.02'"),
        ({"temperature": float("inf")}, "temperature must be finite, got inf"),
        ({"temperature": float("nan")}, "temperature must be finite, got nan"),
        ({"mse_weight": float("inf")}, "mse_weight must be finite, got inf"),
        ({"keep_end_token": "false"}, "keep_end_token must be True or False, got 'false'"),
        ({"distinct_memory_tokens": "no"}, "distinct_memory_tokens must be True or False, got 'no'"),
        ({"query_reasoner": "false"}, "query_reasoner must be True or False, got 'false'"),
        ({"separated_slots": 1}, "separated_slots must be True or False, got 1"),
        ({"exact_prompt_end": None}, "exact_prompt_end must be True or False, got None"),
        ({"document_start": 5}, "document_start must be a text or None, got 5"),
        ({"topk_taken_mask": "soft"}, "topk_taken_mask must be one of .*'exact', 'published'.*, got 'soft'"),
        ({"checkpoint_format": "lora"}, "checkpoint_format must be one of .*'full', 'adapter'.*, got 'lora'"),
        ({"lora_target_modules": 3}, "lora_target_modules must be a string or a list of strings, got 3"),
        ({"lora_target_modules": []}, r"lora_target_modules must be a string or a list of strings, got \[\]"),
        ({"lora_target_modules": ["q_proj", 3]}, "lora_target_modules must be a string or a list of strings"),
        ({"prompts": "a" * 3000}, "^prompts.{,200}$"),
        ({"prompts": "hello"}, "prompts must be a dictionary with keys of .*'answer', .*, got 'hello'"),
        ({"prompts": {"answer": "hello"}}, r"prompts\['answer'\] must be a dictionary, got 'hello'"),
        ({"prompts": {"answer": {**ANSWER, "system": 3}}}, r"prompts\['answer'\] needs texts for system \(or None\)"),
        ({"prompts": {"answer": {**ANSWER, "user": 3}}}, r"prompts\['answer'\]\['user'\] needs {docs}"),
        ({"prompts": {"chat": ANSWER}}, r"prompts has unknown kinds \['chat'\]"),
        ({"prompts": {"answer": {"user": "{docs}"}}}, r"prompts\['answer'\] needs system, user and assistant"),
        ({"prompts": {"answer": {**ANSWER, "user": "{question}"}}}, r"prompts\['answer'\]\['user'\] needs {docs}"),
        ({"prompts": {"answer": {**ANSWER, "user": []}}}, r"prompts\['answer'\]\['user'\] needs {docs}"),
        ({"decoder_config": {"hidden_size": 4}}, r"decoder_config needs a model_type, got the keys \['hidden_size'\]"),
    ],
)
def test_a_value_out_of_range_is_named_with_what_it_is(fields, message):
    with pytest.raises(ValueError, match=message):
        CLaRaConfig(**fields)


def test_a_configuration_of_another_model_is_refused_in_one_sentence(tmp_path, caplog):
    LlamaConfig(hidden_size=32).save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match="holds a llama model and no CLaRa checkpoint: .*from_base makes one"
    ) as refused:
        CLaRaConfig.from_pretrained(tmp_path)
    assert "\n" not in str(refused.value) and not caplog.records


def test_a_configuration_without_a_decoder_says_what_to_set():
    with pytest.raises(AttributeError, match="neither decoder_config nor base_model_name_or_path"):
        _ = CLaRaConfig().hidden_size
