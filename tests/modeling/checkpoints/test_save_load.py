"""Checkpoints: written, loaded bit-equal where the package is not installed, and refused when they do not fit."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import TEXTS, build_base, build_clara
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoProcessor

from modeling_clara import CLaRaConfig, CLaRaForRetrievalGeneration, CLaRaProcessor
from modeling_clara.adapters_clara import COMPRESSOR, GENERATOR, QUERY_REASONER
from modeling_clara.modeling_clara import MEMORY_EMBEDDINGS
from modeling_clara.weights_clara import read_adapter_checkpoint


QUESTIONS = ["Where does the glassblower live?", "What is sold to sailors?"]
DOCUMENTS = [TEXTS[:4], TEXTS[2:]]
CHECKPOINTS = {
    "full-untied": ("llama", {"checkpoint_format": "full"}),
    "full-tied": ("qwen3", {"checkpoint_format": "full"}),
    "adapter-untied": ("llama", {"checkpoint_format": "adapter"}),
    "adapter-tied": ("qwen3", {"checkpoint_format": "adapter"}),
    "without-query-reasoner": ("llama", {"checkpoint_format": "full", "query_reasoner": False}),
    "adapter-shared-token": ("llama", {"checkpoint_format": "adapter", "distinct_memory_tokens": False}),
    "adapter-bfloat16": ("llama", {"checkpoint_format": "adapter", "dtype": torch.bfloat16}),
}
FRESH_PROCESS = """
import json, os, sys
sys.modules["modeling_clara"] = sys.modules["clara_hf"] = None  # as where the package is not installed
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModel, AutoProcessor

folder, out = sys.argv[1:]
request = json.load(open(os.path.join(folder, "request.json")))
results, tensors = {}, {}
for name in request["checkpoints"]:
    path = os.path.join(folder, name)
    model = AutoModel.from_pretrained(path, trust_remote_code=True)
    again = os.path.join(out, name)
    model.save_pretrained(again)
    saved = AutoModel.from_pretrained(again, trust_remote_code=True)
    AutoProcessor.from_pretrained(again, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(path, trust_remote_code=True)
    processor.save_pretrained(os.path.join(out, name + "-processor"))
    AutoProcessor.from_pretrained(os.path.join(out, name + "-processor"), trust_remote_code=True)
    config = AutoConfig.from_pretrained(path, trust_remote_code=True)
    for label, one in (("loaded", model), ("resaved", saved)):
        answers = one.generate(questions=request["questions"], documents=request["documents"], max_new_tokens=5)
        found = {
            "memories": one.compress(request["texts"]),
            "scores": answers.scores,
            "indices": answers.indices,
            "sequences": answers.sequences,
        }
        tensors |= {f"{name}.{label}.{key}": value.contiguous() for key, value in found.items()}
    results[name] = {
        "modules": sorted({type(thing).__module__.split(".")[0] for thing in (model, processor, config)}),
        "classes": [type(thing).__name__ for thing in (model, processor, config)],
        "ids": processor.encode_documents(request["texts"]),
        "num_memory_tokens": config.num_memory_tokens,
        "texts": answers.texts,
        "fingerprint": model.compressor_fingerprint(),
        "training": any(module.training for module in model.modules()),
        "requires_grad": any(parameter.requires_grad for parameter in model.parameters()),
        "files": sorted(os.listdir(again)),
    }
path = os.path.join(folder, "adapter-untied")
other = {"dtype": torch.bfloat16, "base_model_name_or_path": request["other_base"]}
model = AutoModel.from_pretrained(path, trust_remote_code=True, **other)
results["overridden"] = [str(model.dtype), model.config.base_model_name_or_path]
save_file(tensors, os.path.join(out, "tensors.safetensors"))
json.dump(results, open(os.path.join(out, "results.json"), "w"))
"""


def observe(model):
    answers = model.generate(questions=QUESTIONS, documents=DOCUMENTS, max_new_tokens=5)
    return {
        "memories": model.compress(TEXTS),
        "scores": answers.scores,
        "indices": answers.indices,
        "sequences": answers.sequences,
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def models(bases, folder):
    """The models, in memory and saved in `folder` under their names."""
    models = {}
    for name, (architecture, fields) in CHECKPOINTS.items():
        models[name] = build_clara(bases[architecture], **fields)
        models[name].save_pretrained(folder / name)
    return models


@pytest.fixture(scope="module")
def fresh(models, folder, bases, tmp_path_factory):
    """What a process that can only import the published packages makes of the checkpoints."""
    out = tmp_path_factory.mktemp("fresh")
    request = {"checkpoints": list(models), "questions": QUESTIONS, "documents": DOCUMENTS, "texts": TEXTS}
    request["other_base"] = shutil.copytree(bases["llama"], str(out / "other_base"))
    (folder / "request.json").write_text(json.dumps(request))
    (out / "fresh.py").write_text(FRESH_PROCESS)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(out / "modules"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-I", str(out / "fresh.py"), str(folder), str(out)]
    done = subprocess.run(command, cwd=out, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == "", "a process that trusts the code must not be asked about it"
    return out, json.loads((out / "results.json").read_text()), load_file(out / "tensors.safetensors")


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_fresh_process_without_the_package_gets_bit_equal_memories_scores_and_answers(models, fresh, name):
    _, results, tensors = fresh
    result = results[name]
    assert result["modules"] == ["transformers_modules"]
    assert result["classes"] == ["CLaRaForRetrievalGeneration", "CLaRaProcessor", "CLaRaConfig"]
    assert not result["training"] and not result["requires_grad"]
    assert result["ids"] == models[name].processor.encode_documents(TEXTS)
    assert result["num_memory_tokens"] == 4 and len(result["texts"]) == 2
    assert result["fingerprint"] == models[name].compressor_fingerprint()
    for key, expected in observe(models[name]).items():
        assert expected.dtype == tensors[f"{name}.loaded.{key}"].dtype
        assert torch.equal(tensors[f"{name}.loaded.{key}"], expected), key


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_checkpoint_saved_again_by_such_a_process_is_the_same(models, fresh, folder, name):
    out, results, tensors = fresh
    for key, expected in observe(models[name]).items():
        assert torch.equal(tensors[f"{name}.resaved.{key}"], expected), key
    assert results[name]["files"] == sorted(os.listdir(folder / name))
    loaded = CLaRaForRetrievalGeneration.from_pretrained(out / name)
    assert torch.equal(loaded.compress(TEXTS), models[name].compress(TEXTS))


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_the_package_loads_its_checkpoints_bit_equal_frozen_and_without_dropout(models, folder, name):
    model = AutoModel.from_pretrained(folder / name)
    assert type(model) is CLaRaForRetrievalGeneration
    assert not any(module.training for module in model.modules()) and model.config.lora_dropout > 0
    assert not any(parameter.requires_grad for parameter in model.parameters())
    expected = models[name].state_dict()
    assert model.state_dict().keys() == expected.keys()
    for key, value in model.state_dict().items():
        assert value.dtype == expected[key].dtype and torch.equal(value, expected[key]), key
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert tied == (CHECKPOINTS[name][0] == "qwen3")
    assert type(AutoConfig.from_pretrained(folder / name)) is CLaRaConfig
    assert type(AutoProcessor.from_pretrained(folder / name)) is CLaRaProcessor


def test_base_and_dtype_can_be_overridden_there(fresh):
    out, results, _ = fresh
    assert results["overridden"] == ["torch.bfloat16", str(out / "other_base")]


def test_a_checkpoint_carries_its_code_flat_and_no_store(models, folder):
    files = os.listdir(folder / "full-untied")
    assert {
        "modeling_clara.py",
        "configuration_clara.py",
        "processing_clara.py",
        "functional_clara.py",
        "adapters_clara.py",
    } <= set(files)
    assert not {"memory_store.py", "memory_table.py", "adapter_config.json"} & set(files)
    assert not [file for file in files if os.path.isdir(folder / "full-untied" / file)]


@pytest.mark.parametrize("name", ["adapter-untied", "adapter-tied"])
def test_an_adapter_only_file_holds_adapters_memory_embeddings_and_added_rows_only(models, folder, name):
    state = read_adapter_checkpoint(folder / name)
    rows = {key for key in state if key.startswith("added_rows.")}
    assert rows == {"added_rows.input"} | ({"added_rows.output"} if name == "adapter-untied" else set())
    assert all(state[key].shape == (7, 32) for key in rows)
    lora = {key for key in state if ".lora_A." in key or ".lora_B." in key}
    assert state.keys() == lora | rows | {"memory_embeddings.weight", "base_sample"}
    for adapter in (COMPRESSOR, GENERATOR, QUERY_REASONER):
        assert sum(f".{adapter}." in key for key in lora) == 2 * 14
    own = load_file(folder / name / "clara.safetensors")
    assert own.keys() == rows | {"memory_embeddings.weight", "base_sample"}
    size = sum(path.stat().st_size for path in (folder / name).rglob("*.safetensors"))
    assert size < os.path.getsize(folder / name.replace("adapter", "full") / "model.safetensors") / 2


def test_a_checkpoint_without_query_reasoner_gets_one_for_joint_training_as_a_copy_of_the_compressor(
    models, folder, tmp_path
):
    model = CLaRaForRetrievalGeneration.from_pretrained(folder / "without-query-reasoner")
    assert not model.config.query_reasoner and QUERY_REASONER not in model.adapter_names
    asked = model.encode_questions(QUESTIONS)
    model.add_query_reasoner()
    assert torch.equal(model.encode_questions(QUESTIONS), asked)
    model.train_only(QUERY_REASONER, GENERATOR)
    model.save_pretrained(tmp_path)
    loaded = CLaRaForRetrievalGeneration.from_pretrained(tmp_path)
    assert loaded.config.query_reasoner and torch.equal(loaded.encode_questions(QUESTIONS), asked)
    for new, old in zip(loaded.part_parameters(QUERY_REASONER), model.part_parameters(COMPRESSOR), strict=True):
        assert torch.equal(new, old)


def test_a_loaded_model_trains_memory_embeddings_again(models, folder):
    model = CLaRaForRetrievalGeneration.from_pretrained(folder / "adapter-untied")
    model.train_only(COMPRESSOR, GENERATOR, MEMORY_EMBEDDINGS)
    batch = model.processor(QUESTIONS, DOCUMENTS, ["In Velholm.", "Lanterns."])
    model(**batch).loss.backward()
    assert (model.memory_embeddings.weight.grad.abs().amax(dim=1) > 0).all()


def test_a_full_checkpoint_in_several_files_loads(models, tmp_path):
    models["full-untied"].save_pretrained(tmp_path, max_shard_size="60KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    assert torch.equal(AutoModel.from_pretrained(tmp_path).compress(TEXTS), models["full-untied"].compress(TEXTS))


@pytest.mark.parametrize("name", ["full-untied", "adapter-untied"])
def test_dtype_and_loading_info_are_as_asked(models, folder, name):
    model, info = CLaRaForRetrievalGeneration.from_pretrained(
        folder / name, dtype=torch.bfloat16, output_loading_info=True
    )
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert CLaRaForRetrievalGeneration.from_pretrained(folder / name, dtype="auto").dtype == torch.float32


# A base elsewhere


@pytest.fixture
def moved(models, folder, bases, tmp_path):
    """An adapter-only checkpoint whose base is not where it was, and the base's new place."""
    checkpoint, base = tmp_path / "checkpoint", tmp_path / "base"
    shutil.copytree(folder / "adapter-untied", checkpoint)
    shutil.copytree(bases["llama"], base)
    change_config(checkpoint, base_model_name_or_path=str(tmp_path / "gone"))
    return checkpoint, base


def change_config(checkpoint, decoder=None, **fields):
    path = checkpoint / "config.json"
    values = json.loads(path.read_text())
    values["decoder_config"].update(decoder or {})
    path.write_text(json.dumps({**values, **fields}))


def test_a_base_that_is_gone_is_told_with_the_way_to_name_another(moved):
    with pytest.raises(OSError, match="the base model '.*gone' could not be loaded: pass base_model_name_or_path="):
        AutoModel.from_pretrained(moved[0])


def test_a_moved_base_is_named_when_loading_and_from_then_on(models, moved, tmp_path):
    checkpoint, base = moved
    model = AutoModel.from_pretrained(checkpoint, base_model_name_or_path=str(base))
    assert torch.equal(model.compress(TEXTS), models["adapter-untied"].compress(TEXTS))
    model.save_pretrained(tmp_path / "again")
    assert json.loads((tmp_path / "again" / "config.json").read_text())["base_model_name_or_path"] == str(base)
    assert torch.equal(AutoModel.from_pretrained(tmp_path / "again").compress(TEXTS), model.compress(TEXTS))


def test_a_full_checkpoint_does_not_need_its_base(models, folder, tmp_path):
    shutil.copytree(folder / "full-untied", tmp_path / "moved")
    change_config(tmp_path / "moved", base_model_name_or_path=str(tmp_path / "gone"))
    model = AutoModel.from_pretrained(tmp_path / "moved")
    assert torch.equal(model.compress(TEXTS), models["full-untied"].compress(TEXTS))


@pytest.mark.parametrize(
    "change, message",
    [
        ({"hidden_size": 64}, "made for a decoder of hidden size 32, but the base '.*other' has 64: pass base_model"),
        ({"num_hidden_layers": 1}, "over the base '.*other': 9 weights are missing, .*for another decoder"),
        ({"num_hidden_layers": 3}, "over the base '.*other': 9 weights are not in the configuration's decoder"),
        ({"intermediate_size": 64}, "over the base '.*other': 6 weights are of another shape"),
        ({"tie_word_embeddings": True}, "made for a decoder with untied embeddings, but the base '.*other' has tied"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_adapters_over_another_base_are_refused_in_one_sentence(moved, tmp_path, caplog, change, message):
    config = AutoConfig.from_pretrained(moved[1])
    for key, value in change.items():
        setattr(config, key, value)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match=message) as refused:
        AutoModel.from_pretrained(moved[0], base_model_name_or_path=str(tmp_path / "other"))
    assert "\n" not in str(refused.value) and "LOAD REPORT" not in caplog.text


@pytest.mark.parametrize("again", [False, True], ids=["as saved", "saved again"])
def test_adapters_over_other_weights_of_the_same_shape_are_refused(moved, tmp_path, again):
    checkpoint, base = moved
    if again:
        AutoModel.from_pretrained(checkpoint, base_model_name_or_path=str(base)).save_pretrained(tmp_path / "again")
        checkpoint = tmp_path / "again"
    other = AutoModelForCausalLM.from_pretrained(base)
    with torch.no_grad():
        other.model.layers[1].mlp.up_proj.weight.mul_(1.02)  # a little more than bfloat16 rounds
    other.save_pretrained(tmp_path / "other")
    with pytest.raises(ValueError, match="was made over another base: the weights of '.*other' are not those"):
        AutoModel.from_pretrained(checkpoint, base_model_name_or_path=str(tmp_path / "other"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_adapters_know_their_base_in_another_precision(moved, tmp_path, dtype):
    checkpoint, base = moved
    AutoModelForCausalLM.from_pretrained(base, dtype=dtype).save_pretrained(tmp_path / "half")
    for name, wanted in ((str(base), dtype), (str(tmp_path / "half"), torch.float32)):
        assert AutoModel.from_pretrained(checkpoint, base_model_name_or_path=name, dtype=wanted).dtype == wanted


@pytest.mark.parametrize("name", ["full-untied", "adapter-untied"])
def test_an_argument_that_from_pretrained_does_not_know_is_refused(models, folder, name):
    with pytest.raises(TypeError, match="unexpected .*argument 'dtyp'"):
        CLaRaForRetrievalGeneration.from_pretrained(folder / name, dtyp=torch.bfloat16)


# Overridden fields


@pytest.mark.parametrize("load", [AutoModel.from_pretrained, CLaRaForRetrievalGeneration.from_pretrained])
@pytest.mark.parametrize("name, other", [("full-untied", "adapter"), ("adapter-tied", "full")])
def test_the_format_to_save_in_is_not_taken_for_the_one_that_was_saved(models, folder, tmp_path, load, name, other):
    model = load(folder / name, checkpoint_format=other)
    assert torch.equal(model.compress(TEXTS), models[name].compress(TEXTS))
    model.save_pretrained(tmp_path)
    assert (tmp_path / "clara.safetensors").exists() == (other == "adapter")
    assert (tmp_path / "model.safetensors").exists() == (other == "full")
    config = CLaRaConfig.from_pretrained(folder / name, checkpoint_format=other)
    assert CLaRaForRetrievalGeneration.from_pretrained(folder / name, config=config).config.checkpoint_format == other
    with pytest.raises(ValueError, match="checkpoint_format must be one of .*, got 'lora'"):
        load(folder / name, checkpoint_format="lora")


@pytest.mark.parametrize("load", [AutoModel.from_pretrained, CLaRaForRetrievalGeneration.from_pretrained])
@pytest.mark.parametrize("name", ["full-untied", "adapter-untied"])
@pytest.mark.parametrize(
    "fields, message",
    [
        ({"doc_max_length": 64}, "has 4 memory_token_ids, but .*doc_max_length=64, compression_rate=8 ask for 8"),
        ({"compression_rate": 16}, "has 4 memory_token_ids, but .*compression_rate=16 ask for 2: leave .*from_base"),
        ({"distinct_memory_tokens": False}, "has 4 memory_token_ids, but distinct_memory_tokens=False, .* ask for 1"),
        ({"top_k": "five"}, "top_k must be a whole number of at least 1, got 'five'"),
        ({"top_k": 0}, "top_k must be a whole number of at least 1, got 0"),
        ({"temperature": -1}, "temperature must be positive, got -1"),
        ({"topk_taken_mask": "foo"}, "topk_taken_mask must be one of .*, got 'foo'"),
        ({"prompts": "hello"}, "prompts must be a dictionary with keys of .*, got 'hello'"),
        ({"lora_target_modules": 3}, "lora_target_modules must be a string or a list of strings, got 3"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_an_overridden_field_is_checked_when_loading(models, folder, load, name, fields, message):
    with pytest.raises(ValueError, match=message):
        load(folder / name, **fields)


def test_a_configuration_that_the_caller_changed_is_checked_and_kept_as_it_is(models, folder):
    config = CLaRaConfig.from_pretrained(folder / "full-untied")
    config.prompts = {"answer": config.prompts["answer"]}
    model = CLaRaForRetrievalGeneration.from_pretrained(folder / "full-untied", config=config)
    assert set(model.config.prompts) == {"answer", "qa", "paraphrase"} and set(config.prompts) == {"answer"}
    config.doc_max_length = 64
    with pytest.raises(ValueError, match="has 4 memory_token_ids, but .*doc_max_length=64"):
        CLaRaForRetrievalGeneration.from_pretrained(folder / "full-untied", config=config)


def test_a_geometry_with_as_many_memories_or_a_shared_token_with_any_number_can_be_overridden(models, folder):
    load = CLaRaForRetrievalGeneration.from_pretrained
    longer = load(folder / "full-untied", doc_max_length=64, compression_rate=16)
    assert longer.compress(TEXTS).shape == (5, 4, 32)
    assert load(folder / "adapter-shared-token", compression_rate=4).compress(TEXTS).shape == (5, 8, 32)


# Broken checkpoints


def weights_file(folder: Path, name: str, key: str = "") -> Path:
    """The file of a checkpoint that holds the weight `key`."""
    if name.startswith("full"):
        return folder / "model.safetensors"
    adapter = next((one for one in (COMPRESSOR, GENERATOR, QUERY_REASONER) if f".{one}." in key), None)
    return folder / "clara.safetensors" if adapter is None else folder / adapter / "adapter_model.safetensors"


@pytest.mark.parametrize("name", ["full-untied", "adapter-untied"])
def test_a_folder_without_weights_is_told(models, folder, tmp_path, name):
    shutil.copytree(folder / name, tmp_path / "broken")
    weights_file(tmp_path / "broken", name).unlink()
    with pytest.raises(
        OSError, match=r"broken has no weights \(model.safetensors\): saving was interrupted, or .*; give"
    ):
        AutoModel.from_pretrained(tmp_path / "broken")


@pytest.mark.parametrize("name", ["full-untied", "adapter-untied"])
def test_a_file_that_was_not_written_to_its_end_is_told(models, folder, tmp_path, name):
    shutil.copytree(folder / name, tmp_path / "broken")
    path = weights_file(tmp_path / "broken", name)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(OSError, match="the weights of .*broken, or of its base, are damaged or were not written to"):
        AutoModel.from_pretrained(tmp_path / "broken")


def test_a_folder_without_a_configuration_is_told(tmp_path):
    with pytest.raises(OSError, match="holds no CLaRa checkpoint: its config.json, if any, has no decoder_config"):
        CLaRaForRetrievalGeneration.from_pretrained(tmp_path)


def test_a_folder_that_is_not_there_is_told(tmp_path):
    with pytest.raises(OSError, match=r"no CLaRa checkpoint at '.*gone': give .* \(there is no such folder\)"):
        CLaRaForRetrievalGeneration.from_pretrained(tmp_path / "gone")
    with pytest.raises(
        OSError, match="'runs/gone': give .*no such folder, nor could it be had from the Hub"
    ) as refused:
        CLaRaForRetrievalGeneration.from_pretrained("runs/gone")
    assert "\n" not in str(refused.value) and isinstance(refused.value.__cause__, OSError)


def test_a_folder_of_a_plain_decoder_is_told(base, caplog):
    with pytest.raises(ValueError, match="holds a llama model and no CLaRa checkpoint: .*from_base makes one"):
        CLaRaForRetrievalGeneration.from_pretrained(base)
    assert not caplog.records


@pytest.mark.parametrize("name", ["full-untied", "adapter-untied"])
@pytest.mark.parametrize("key", ["lora_B.compressor", "memory_embeddings", "lora_A.generator"])
def test_a_missing_weight_is_named(models, folder, tmp_path, caplog, name, key):
    shutil.copytree(folder / name, tmp_path / "broken")
    dropped = next(one for one in sorted(models[name].state_dict()) if key in one)
    path, key = weights_file(tmp_path / "broken", name, dropped), dropped
    if name.startswith("adapter") and ".lora_" in dropped:
        key = re.sub(r"^decoder\.(.*)\.\w+\.weight$", r"base_model.model.\1.weight", dropped)
    state = load_file(path)
    del state[key]
    save_file(state, path, metadata={"format": "pt"})
    with pytest.raises(
        ValueError, match=f"1 weights are missing, '{dropped}' among them; the checkpoint is incomplete"
    ):
        AutoModel.from_pretrained(tmp_path / "broken")
    assert "LOAD REPORT" not in caplog.text


@pytest.mark.parametrize(
    "decoder, message",
    [
        ({"hidden_size": 64}, "64 weights are of another shape than the configuration says"),
        ({"num_hidden_layers": 3}, "51 weights are missing"),
        ({"num_hidden_layers": 1}, "51 weights are not in the configuration's decoder"),
        ({"vocab_size": 500}, "2 weights are of another shape"),
    ],
    ids=["hidden_size", "deeper", "shallower", "vocabulary"],
)
def test_a_configuration_of_another_decoder_is_refused_in_one_sentence(
    models, folder, tmp_path, caplog, decoder, message
):
    shutil.copytree(folder / "full-untied", tmp_path / "other")
    change_config(tmp_path / "other", decoder)
    with pytest.raises(ValueError, match=f"{message}.* among them; .* for another decoder: use config.json") as refused:
        AutoModel.from_pretrained(tmp_path / "other")
    assert "\n" not in str(refused.value) and "LOAD REPORT" not in caplog.text


@pytest.mark.parametrize(
    "decoder, message",
    [
        ({"num_hidden_layers": 3}, r"`num_hidden_layers` \(3\) must be equal to .*\): use config.json as it was saved"),
        ({"hidden_size": "wide"}, "'hidden_size' expected int, got str"),
        ({"model_type": "nope"}, "the model_type 'nope', which this version of transformers does not know"),
    ],
    ids=["layer_types", "type", "model_type"],
)
def test_a_configuration_that_contradicts_itself_is_told_with_its_folder(models, folder, tmp_path, decoder, message):
    shutil.copytree(folder / "full-tied", tmp_path / "odd")
    change_config(tmp_path / "odd", decoder)
    for load in (
        AutoModel.from_pretrained,
        CLaRaForRetrievalGeneration.from_pretrained,
        CLaRaProcessor.from_pretrained,
    ):
        with pytest.raises(ValueError, match=f"odd: decoder_config .*{message}") as refused:
            load(tmp_path / "odd")
        assert "\n" not in str(refused.value)


@pytest.mark.parametrize("damaged", [False, True])
def test_a_tokenizer_that_is_missing_or_damaged_is_told_with_the_folder(models, folder, tmp_path, damaged):
    shutil.copytree(folder / "full-untied", tmp_path / "broken")
    for path in (tmp_path / "broken").glob("tokenizer*"):
        path.write_text("{") if damaged else path.unlink()
    model = AutoModel.from_pretrained(tmp_path / "broken")
    with pytest.raises(OSError, match=r"broken has no tokenizer that can be loaded \(.*\): .* save the") as told:
        model.compress(TEXTS)
    assert "\n" not in str(told.value)
    model.name_or_path = ""
    with pytest.raises(OSError, match="was loaded from no checkpoint: set model.processor to a CLaRaProcessor"):
        model.compress(TEXTS)


def test_saving_over_an_older_checkpoint_replaces_it(models, base, tmp_path):
    models["full-untied"].save_pretrained(tmp_path)
    other = build_clara(base, seed=5, checkpoint_format="adapter", top_k=1)
    other.save_pretrained(tmp_path)
    loaded = AutoModel.from_pretrained(tmp_path)
    assert loaded.config.checkpoint_format == "adapter" and loaded.config.top_k == 1
    assert torch.equal(loaded.compress(TEXTS), other.compress(TEXTS))


@pytest.mark.parametrize("now", ["full", "adapter", "flat"])
@pytest.mark.parametrize("before", ["full", "adapter", "flat"])
def test_of_an_older_checkpoint_in_another_form_or_number_of_files_nothing_is_read(base, tmp_path, before, now):
    older, newer = (build_clara(base, seed=seed) for seed in (0, 5))
    expected = newer.compress(TEXTS)
    for sizes in (("20KB", "1GB"), ("1GB", "20KB"), ("60KB", "20KB")):
        for model, form, size in zip((older, newer), (before, now), sizes, strict=True):
            model.config.checkpoint_format = form
            model.save_pretrained(tmp_path, max_shard_size=size)
        assert torch.equal(CLaRaForRetrievalGeneration.from_pretrained(tmp_path).compress(TEXTS), expected), sizes
        indices, single = list(tmp_path.glob("*.index.json")), (tmp_path / "model.safetensors").exists()
        assert len(indices) + single == (now != "adapter") and (tmp_path / "clara.safetensors").exists() != (
            now != "adapter"
        )


@pytest.mark.parametrize("form", ["full", "adapter", "flat"])
def test_whoever_may_read_a_configuration_may_read_its_weights(base, tmp_path, form):
    build_clara(base, checkpoint_format=form).save_pretrained(tmp_path)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {path.stat().st_mode for path in files} == {(tmp_path / "config.json").stat().st_mode}


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read all")
def test_weights_that_this_user_may_not_read_are_told(base, tmp_path):
    build_clara(base).save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").chmod(0)
    with pytest.raises(PermissionError, match="model.safetensors"):
        CLaRaForRetrievalGeneration.from_pretrained(tmp_path)


def test_a_base_in_a_subfolder_is_found_again_and_on_the_hub_refused_for_adapters_alone(base, tmp_path):
    shutil.copytree(base, tmp_path / "deep" / "base")
    settings = {"subfolder": "deep/base", "checkpoint_format": "adapter", "doc_max_length": 32, "compression_rate": 8}
    model = CLaRaForRetrievalGeneration.from_base(str(tmp_path), **settings)
    model.save_pretrained(tmp_path / "clara")
    loaded = CLaRaForRetrievalGeneration.from_pretrained(tmp_path / "clara")
    assert torch.equal(loaded.compress(TEXTS), model.compress(TEXTS))
    with pytest.raises(ValueError, match="checkpoint_format.*'adapter'.*subfolder 'deep/base' of user/base"):
        CLaRaForRetrievalGeneration.from_base("user/base", **settings)


def test_a_variant_leaves_what_lies_beside_it(base, tmp_path):
    plain, variant = (build_clara(base, seed=seed) for seed in (0, 5))
    plain.save_pretrained(tmp_path, max_shard_size="60KB")
    variant.save_pretrained(tmp_path, variant="fp16")
    variant.save_pretrained(tmp_path, variant="fp16", max_shard_size="60KB")
    for options, model in (({}, plain), ({"variant": "fp16"}, variant)):
        loaded = CLaRaForRetrievalGeneration.from_pretrained(tmp_path, **options)
        assert torch.equal(loaded.compress(TEXTS), model.compress(TEXTS))


@pytest.mark.parametrize("form", ["full", "flat"])
@pytest.mark.parametrize("index", ["{", "[]", '{"weight_map": {"a": 3}}', '{"weight_map": {"a": "gone.safetensors"}}'])
def test_a_damaged_index_is_told(base, tmp_path, form, index):
    model = build_clara(base, checkpoint_format=form)
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(OSError, match=str(tmp_path)) as told:
        CLaRaForRetrievalGeneration.from_pretrained(tmp_path)
    assert "\n" not in str(told.value)


def test_adapters_over_a_base_with_a_padded_vocabulary_come_back(tmp_path):
    base = build_base(tmp_path / "base", padded_rows=20)
    model = build_clara(base, checkpoint_format="adapter")
    model.save_pretrained(tmp_path / "checkpoint")
    loaded = AutoModel.from_pretrained(tmp_path / "checkpoint")
    for key, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[key], value), key


def test_base_is_found_relative_to_the_checkpoint_s_folder(tmp_path, monkeypatch):
    build_base(tmp_path / "both" / "base")
    model = build_clara(str(tmp_path / "both" / "base"), checkpoint_format="adapter")
    memories = model.compress(["a document"])
    model.config.base_model_name_or_path = "../base"
    model.save_pretrained(tmp_path / "both" / "clara")
    (tmp_path / "both").rename(tmp_path / "moved")
    monkeypatch.chdir(tmp_path)
    loaded = CLaRaForRetrievalGeneration.from_pretrained(tmp_path / "moved" / "clara")
    assert torch.equal(loaded.compress(["a document"]), memories)
    whole = CLaRaForRetrievalGeneration.from_pretrained(tmp_path / "moved" / "clara", checkpoint_format="full")
    whole.save_pretrained(tmp_path / "whole")
    assert "decoder.model.embed_tokens.weight" in load_file(tmp_path / "whole" / "model.safetensors")
    loaded.save_pretrained(tmp_path / "elsewhere" / "again")
    again = CLaRaForRetrievalGeneration.from_pretrained(tmp_path / "elsewhere" / "again")
    assert torch.equal(again.compress(["a document"]), memories)
