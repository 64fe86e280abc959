"""A new model over a base: vocabulary, frozen weights, fresh adapters, and the verbs on every architecture."""

import copy
import json
import shutil

import pytest
import torch
from conftest import ARCHITECTURES, build_base, build_clara
from transformers import AutoModelForCausalLM, AutoTokenizer, PhiConfig

from modeling_clara import CLaRaForRetrievalGeneration
from modeling_clara.adapters_clara import COMPRESSOR, GENERATOR, QUERY_REASONER, adapter_parameters
from modeling_clara.modeling_clara import MEMORY_EMBEDDINGS


FIELDS = {"doc_max_length": 32, "compression_rate": 8, "lora_r": 4, "lora_alpha": 8, "top_k": 2}
QUESTIONS = ["Where does the glassblower live?", "What is sold to sailors?"]
ANSWERS = ["In Velholm.", "Copper lanterns."]


def base_weights(model):
    """The decoder's weights under the base's names, adapters left out."""
    state = model.decoder.state_dict()
    return {key.replace(".base_layer", ""): value for key, value in state.items() if ".lora_" not in key}


def assert_base_is_unchanged(model, folder, added):
    """Every weight of the base is bit-equal, embedding rows of added tokens aside."""
    base = AutoModelForCausalLM.from_pretrained(folder)
    found = base_weights(model)
    assert found.keys() == base.state_dict().keys()
    for key, value in base.state_dict().items():
        if value.shape[0] == base.config.vocab_size and key.startswith(("model.embed", "lm_head")):
            kept = [row for row in range(len(value)) if row not in added]
            assert torch.equal(found[key][kept], value[kept]), key
        else:
            assert torch.equal(found[key], value), key


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
@pytest.mark.parametrize("padded_rows", [0, 3, 7, 40])
def test_added_tokens_take_padding_rows_first_and_a_padded_vocabulary_never_shrinks(
    tmp_path, architecture, padded_rows
):
    folder = build_base(tmp_path / "base", architecture, padded_rows=padded_rows)
    length = len(AutoTokenizer.from_pretrained(folder))
    model = CLaRaForRetrievalGeneration.from_base(folder, **FIELDS)
    added = model.config.added_token_ids
    assert added == list(range(length, length + 7))
    assert model.config.vocab_size == length + max(7, padded_rows)
    assert model.get_input_embeddings().weight.shape[0] == model.config.vocab_size
    assert model.get_output_embeddings().weight.shape[0] == model.config.vocab_size
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert tied == (architecture == "qwen3")
    assert_base_is_unchanged(model, folder, added)
    tokenizer = model.processor.tokenizer
    assert tokenizer.convert_ids_to_tokens(added) == [*(f"<MEM{i}>" for i in range(4)), "<AE>", "<ENC>", "<SEP>"]
    assert all(len(tokenizer.encode(token, add_special_tokens=False)) == 1 for token in model.processor.reserved_texts)


def test_a_bias_of_the_output_head_grows_with_the_vocabulary(tmp_path, base):
    tokenizer = AutoTokenizer.from_pretrained(base)
    config = PhiConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    model = CLaRaForRetrievalGeneration.from_base(str(tmp_path), **FIELDS)
    assert model.get_output_embeddings().bias.shape == (len(tokenizer) + 7,)
    assert len(model.generate(questions=QUESTIONS, documents=[["a"], ["b"]], max_new_tokens=2).texts) == 2


def test_a_new_model_is_the_base_under_every_adapter_frozen_and_in_evaluation_mode(base):
    model = CLaRaForRetrievalGeneration.from_base(base, **FIELDS, query_reasoner=True)
    assert not model.training and not any(module.training for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.parameters())
    for name in (COMPRESSOR, QUERY_REASONER, GENERATOR):
        weights = dict(model.decoder.named_parameters())
        high = [weight for key, weight in weights.items() if f".lora_B.{name}." in key]
        low = [weight for key, weight in weights.items() if f".lora_A.{name}." in key]
        assert len(high) == len(low) == 14
        assert not any(weight.any() for weight in high) and all(weight.std() > 0.01 for weight in low)
    assert model.config.base_model_name_or_path == base
    assert model.config.lora_dropout == 0.1 and model.config.num_memory_tokens == 4


def test_memory_embeddings_start_distinct_near_the_mean_token_and_equal_in_every_process(base):
    first = CLaRaForRetrievalGeneration.from_base(base, **FIELDS)
    torch.manual_seed(1234)
    second = CLaRaForRetrievalGeneration.from_base(base, **FIELDS)
    rows = first.memory_embeddings.weight
    assert torch.equal(rows, second.memory_embeddings.weight)
    assert torch.unique(rows, dim=0).shape[0] == 4 and rows.std() > 0.01
    assert CLaRaForRetrievalGeneration.from_base(
        base, **FIELDS, distinct_memory_tokens=False
    ).memory_embeddings.weight.shape == (1, 32)


@pytest.mark.parametrize("later", [True, False])
def test_a_query_reasoner_starts_as_a_copy_of_the_compressor(base, later):
    if later:
        model = build_clara(base, query_reasoner=False)
        questions = model.encode_questions(QUESTIONS)
        model.add_query_reasoner()
        assert torch.equal(model.encode_questions(QUESTIONS), questions)
    else:
        model = CLaRaForRetrievalGeneration.from_base(base, **FIELDS, query_reasoner=True)
    pairs = zip(model.part_parameters(QUERY_REASONER), model.part_parameters(COMPRESSOR), strict=True)
    assert all(torch.equal(new, old) and new.data_ptr() != old.data_ptr() for new, old in pairs)
    assert model.config.query_reasoner
    assert not any(parameter.requires_grad for parameter in model.parameters()) and not model.training
    with torch.no_grad():
        model.part_parameters(QUERY_REASONER)[0].add_(1.0)
    kept = model.part_parameters(QUERY_REASONER)[0].clone()
    model.add_query_reasoner()
    assert torch.equal(model.part_parameters(QUERY_REASONER)[0], kept)


def test_a_tokenizer_that_has_a_marker_already_is_refused(base, tmp_path):
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_tokens(["<SEP>"])
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"the tokenizer already has the tokens \['<SEP>'\]"):
        CLaRaForRetrievalGeneration.from_base(str(tmp_path), **FIELDS)


@pytest.mark.parametrize(
    "fields, name",
    [
        ({"compresion_rate": 16}, "compresion_rate"),
        ({"eos_token_id": 1}, "eos_token_id"),
        ({"top_p": 1, "chunks": 2}, "chunks, top_p"),
    ],
)
def test_an_argument_that_from_base_does_not_know_is_refused_by_name(base, fields, name):
    with pytest.raises(ValueError, match=f"from_base takes no {name}: give fields of CLaRaConfig"):
        CLaRaForRetrievalGeneration.from_base(base, **fields)


def test_from_base_takes_the_options_of_loading_and_writes_none_of_them(base, tmp_path):
    options = {"revision": "main", "token": "secret", "use_safetensors": True, "device_map": "cpu"}
    model = CLaRaForRetrievalGeneration.from_base(
        base, dtype=torch.bfloat16, attn_implementation="eager", **options, **FIELDS
    )
    assert model.dtype == torch.bfloat16 and model.decoder.config._attn_implementation == "eager"
    model.save_pretrained(tmp_path)
    assert not set(json.loads((tmp_path / "config.json").read_text())) & set(options)
    assert not [path for path in tmp_path.glob("*.json") if "secret" in path.read_text()]


def test_a_base_that_is_a_clara_checkpoint_or_not_there_is_told(clara, tmp_path):
    clara.save_pretrained(tmp_path / "clara")
    with pytest.raises(ValueError, match="clara is a CLaRa checkpoint and no base: from_pretrained loads it"):
        CLaRaForRetrievalGeneration.from_base(tmp_path / "clara")
    with pytest.raises(OSError, match=r"the base model '.*gone' could not be loaded: .*\(there is no such folder\)"):
        CLaRaForRetrievalGeneration.from_base(tmp_path / "gone")


def test_a_base_whose_configuration_contradicts_itself_is_told(bases, tmp_path):
    shutil.copytree(bases["qwen3"], tmp_path / "odd")
    path = tmp_path / "odd" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_hidden_layers": 3}))
    with pytest.raises(ValueError, match=r"base model '.*odd' has no sound config.json \(`num_hidden_layers` \(3\)"):
        CLaRaForRetrievalGeneration.from_base(tmp_path / "odd")


def test_the_special_tokens_of_the_base_stay(base, tmp_path):
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<tool>"]})
    tokenizer.save_pretrained(tmp_path)
    model = CLaRaForRetrievalGeneration.from_base(str(tmp_path), **FIELDS)
    assert model.processor.tokenizer.extra_special_tokens[0] == "<tool>"
    assert model.config.memory_token_ids[0] == len(tokenizer)


@pytest.mark.parametrize(
    "change, differs",
    [
        (lambda model: model.part_parameters(COMPRESSOR)[-1].add_(1e-3), True),
        (lambda model: model.part_parameters(MEMORY_EMBEDDINGS)[0].mul_(1.01), True),
        (lambda model: model.get_input_embeddings().weight.add_(1e-3), True),
        (lambda model: setattr(model.config, "lora_alpha", 99), True),
        (lambda model: setattr(model.config, "doc_max_length", 64), True),
        (lambda model: setattr(model.config, "keep_end_token", False), True),
        (lambda model: model.part_parameters(GENERATOR)[-1].add_(1.0), False),
        (lambda model: model.part_parameters(QUERY_REASONER)[-1].add_(1.0), False),
        (lambda model: setattr(model.config, "top_k", 1), False),
        (lambda model: model.train_only(GENERATOR), False),
    ],
    ids=["compressor", "memory", "base", "alpha", "length", "end", "generator", "reasoner", "top_k", "flags"],
)
def test_the_compressors_fingerprint_follows_what_shapes_a_memory_and_nothing_else(clara, change, differs):
    before = clara.compressor_fingerprint()
    assert before == clara.compressor_fingerprint() and int(before, 16) > 0
    with torch.no_grad():
        change(clara)
    assert (clara.compressor_fingerprint() != before) == differs


@pytest.mark.parametrize("architecture", list(ARCHITECTURES))
def test_every_architecture_compresses_retrieves_answers_and_trains(bases, texts, architecture):
    model = build_clara(bases[architecture])
    added = model.config.added_token_ids
    assert_base_is_unchanged(model, bases[architecture], added)

    memories = model.compress(texts)
    assert memories.shape == (5, 4, 32) and torch.isfinite(memories).all()
    assert (memories - model.compress(texts[::-1], batch_size=2).flip(0)).abs().max() < 1e-5
    found = model.retrieve(QUESTIONS, memories)
    assert found.indices.shape == (2, 2) and (found.scores.abs() <= 1 + 1e-6).all()
    documents = [texts[:4], texts[2:]]
    answers = model.generate(questions=QUESTIONS, documents=documents, max_new_tokens=4)
    cached = model.generate(questions=QUESTIONS, memories=[memories[:4], memories[2:]], max_new_tokens=4)
    assert torch.equal(answers.indices, cached.indices) and answers.texts == cached.texts

    parts = (COMPRESSOR, QUERY_REASONER, GENERATOR, MEMORY_EMBEDDINGS)
    model.train_only(*parts)
    model.train()
    output = model(**model.processor(QUESTIONS, documents, ANSWERS))
    output.loss.backward()
    assert torch.isfinite(output.loss) and output.mse_loss > 0
    for part in parts:
        for parameter in model.part_parameters(part):
            assert torch.isfinite(parameter.grad).all() and parameter.grad.abs().max() > 0
    trained = {id(parameter) for part in parts for parameter in model.part_parameters(part)}
    assert all(parameter.grad is None for parameter in model.parameters() if id(parameter) not in trained)


def test_architectures_carry_adapters_on_every_linear_layer_but_the_output_head(bases):
    layers = {"llama": 14, "phi3": 8}
    for architecture, count in layers.items():
        model = build_clara(bases[architecture])
        assert len(list(adapter_parameters(model.decoder, COMPRESSOR))) == 2 * count
        assert not [key for key, _ in model.named_parameters() if "lm_head" in key and "lora" in key]


def test_a_copied_model_computes_the_same_and_shares_nothing(clara, texts):
    other = copy.deepcopy(clara)
    expected = clara.compress(texts)
    assert torch.equal(other.compress(texts), expected)
    with torch.no_grad():
        other.memory_embeddings.weight.add_(1.0)
    assert torch.equal(clara.compress(texts), expected) and not torch.equal(other.compress(texts), expected)
