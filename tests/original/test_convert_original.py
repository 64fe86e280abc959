"""Conversion of published checkpoints, both ways, on random ones of several decoders."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from original_checkpoint import (
    ADAPTERS,
    EXTRA_TOKENS,
    PROMPTS,
    build_original_base,
    write_code,
    write_original,
    write_prompts,
)
from processes import exit_code

from clara_hf.original.convert import convert, main
from clara_hf.original.export import to_original
from clara_hf.original.methods import OriginalCLaRa
from modeling_clara import CLaRaConfig, CLaRaForRetrievalGeneration
from modeling_clara.configuration_clara import DEFAULT_PROMPTS


ROOT = Path(__file__).parents[2]
CONFIG, ADAPTERS_FILE, LAYERS_FILE = "config.json", "adapters.pth", "decoder_first_last_layers.pth"
DOCUMENTS = [
    ["The fox sleeps.", "Copper lanterns are sold.", "A market is held."],
    ["A novel.", "A keeper.", "Velholm."],
]
QUESTIONS = ["Where does the fox sleep?", "Who keeps bees?"]


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder of bases, and beside them the published checkpoints that name them."""
    home = tmp_path_factory.mktemp("home")
    build_original_base(home / "mistral")
    build_original_base(home / "tiny-Qwen", "qwen3", padded_rows=40)
    build_original_base(home / "phi", "phi3", padded_rows=2)
    write_original(home / "joint", home / "mistral")
    write_original(home / "stage1", home / "mistral", adapters=ADAPTERS[:2], copies=ADAPTERS[:2], stage="stage1")
    write_original(home / "instruct", home / "mistral", adapters=ADAPTERS[:2], copies=ADAPTERS[:1], stage="stage1_2")
    write_original(home / "shared-token", home / "mistral", distinct=False, sep=False)
    write_original(home / "tied", home / "tiny-Qwen", copies=ADAPTERS[:1])
    write_original(home / "fused", home / "phi", rank=2)
    return home


@pytest.fixture(scope="module")
def converted(home, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("converted") / "joint"
    convert(str(home / "joint"), str(out), prompts=str(write_prompts(home / "prompts.json")))
    return out


def load(path, **options) -> CLaRaForRetrievalGeneration:
    return CLaRaForRetrievalGeneration.from_pretrained(path, **options)


def answers(model) -> tuple[list[str], list[list[int]]]:
    output = model.generate(questions=QUESTIONS, documents=DOCUMENTS, max_new_tokens=6)
    return output.texts, output.sequences.tolist()


def assert_same_files(one: Path, other: Path) -> None:
    assert json.loads((one / CONFIG).read_text()) == json.loads((other / CONFIG).read_text())
    ours, theirs = (torch.load(path / ADAPTERS_FILE, weights_only=True) for path in (one, other))
    assert list(ours) == list(theirs)
    states = [(ours[name], theirs[name]) for name in ours]
    layers = [torch.load(path / LAYERS_FILE, weights_only=True) for path in (one, other)]
    assert all(isinstance(value, torch.nn.Parameter) for value in layers[0].values())
    for ours, theirs in [*states, layers]:
        assert set(ours) == set(theirs)
        for key, value in ours.items():
            assert value.dtype == theirs[key].dtype and torch.equal(value, theirs[key]), key


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("name", ["joint", "stage1", "instruct", "shared-token", "tied", "fused"])
def test_back_and_forth_keeps_every_tensor(home, tmp_path, name, full):
    report = convert(str(home / name), str(tmp_path / "ours"), full=full)
    assert json.loads((home / name / CONFIG).read_text())["training_stage"] in report
    to_original(str(tmp_path / "ours"), str(tmp_path / "theirs"))
    assert_same_files(home / name, tmp_path / "theirs")


@pytest.mark.parametrize("name", ["joint", "tied", "fused"])
def test_full_and_adapter_only_output_hold_the_same_weights(home, tmp_path, name):
    for full in (False, True):
        convert(str(home / name), str(tmp_path / str(full)), full=full)
    models = [load(tmp_path / str(full)) for full in (False, True)]
    states = [model.state_dict() for model in models]
    assert set(states[0]) == set(states[1])
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])
    assert all(model.dtype == torch.bfloat16 for model in models)
    assert answers(models[0]) == answers(models[1])


def test_adapter_only_output_leaves_out_the_base(home, converted):
    assert not any(path.suffix == ".safetensors" and path.stat().st_size > 200_000 for path in converted.iterdir())
    assert load(converted).config.saved_embedding_rows == "added"


def test_published_behaviour_becomes_configuration(home, converted):
    config = CLaRaConfig.from_pretrained(converted)
    assert (config.doc_max_length, config.compression_rate, config.query_max_length) == (32, 8, 32)
    assert (config.top_k, config.temperature, config.topk_taken_mask) == (2, 0.02, "published")
    assert (config.lora_r, config.lora_alpha) == (4, 8)
    assert not config.keep_end_token and not config.exact_prompt_end and config.separated_slots
    assert config.base_model_name_or_path == str(home / "mistral")


def test_missing_query_reasoner_is_a_copy_of_the_compressor(home, tmp_path):
    convert(str(home / "stage1"), str(tmp_path / "ours"))
    model = load(tmp_path / "ours")
    pairs = zip(model.part_parameters("query_reasoner"), model.part_parameters("compressor"), strict=True)
    assert model.config.query_reasoner and all(torch.equal(one, other) for one, other in pairs)


def test_query_reasoner_that_was_trained_since_goes_back(home, tmp_path):
    convert(str(home / "stage1"), str(tmp_path / "ours"))
    model = load(tmp_path / "ours")
    with torch.no_grad():
        model.part_parameters("query_reasoner")[0].add_(1)
        model.memory_embeddings.weight.add_(1)
    model.save_pretrained(tmp_path / "trained")
    to_original(str(tmp_path / "trained"), str(tmp_path / "theirs"))
    adapters = torch.load(tmp_path / "theirs" / ADAPTERS_FILE, weights_only=True)
    assert "query_reasoner_adapter" in adapters
    assert json.loads((tmp_path / "theirs" / CONFIG).read_text())["training_stage"] == "stage2"
    layers = torch.load(tmp_path / "theirs" / LAYERS_FILE, weights_only=True)
    rows = layers["model.embed_tokens.weight"][model.config.memory_token_ids]
    assert torch.equal(rows, model.memory_embeddings.weight)


def test_model_made_here_survives_the_published_layout(bases, tmp_path):
    settings = {"doc_max_length": 32, "compression_rate": 8, "lora_r": 4, "lora_alpha": 8, "top_k": 2}
    fixed = {
        "keep_end_token": False,
        "exact_prompt_end": False,
        "split_control_tokens": False,
        "topk_taken_mask": "published",
        "query_reasoner": True,
    }
    model = CLaRaForRetrievalGeneration.from_base(bases["mistral"], **settings, **fixed)
    for name in ("compressor", "query_reasoner", "generator"):
        for parameter in model.part_parameters(name):
            torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(tmp_path / "ours")
    assert "lost" not in to_original(str(tmp_path / "ours"), str(tmp_path / "theirs"))
    prompts = tmp_path / "prompts.json"
    prompts.write_text(json.dumps(model.config.prompts))
    convert(str(tmp_path / "theirs"), str(tmp_path / "again"), prompts=str(prompts))
    assert answers(load(tmp_path / "again")) == answers(model)


def test_settings_that_the_published_code_has_fixed_are_told(bases, tmp_path):
    model = CLaRaForRetrievalGeneration.from_base(bases["mistral"], lora_r=4, lora_alpha=8)
    model.save_pretrained(tmp_path / "ours")
    assert "keep_end_token True" in to_original(str(tmp_path / "ours"), str(tmp_path / "theirs"))
    model.config.lora_alpha = 4
    model.save_pretrained(tmp_path / "ours")
    with pytest.raises(ValueError, match="lora_alpha is 4"):
        to_original(str(tmp_path / "ours"), str(tmp_path / "other"))


def test_embedding_rows_that_differ_from_the_base_are_kept(home, tmp_path):
    shutil.copytree(home / "joint", home / "drifted")
    layers = torch.load(home / "drifted" / LAYERS_FILE, weights_only=True)
    with torch.no_grad():
        layers["lm_head.weight"][5] += 1
    torch.save(layers, home / "drifted" / LAYERS_FILE)
    report = convert(str(home / "drifted"), str(tmp_path / "ours"))
    assert "lm_head.weight differs" in report
    assert torch.equal(load(tmp_path / "ours").decoder.lm_head.weight, layers["lm_head.weight"])
    to_original(str(tmp_path / "ours"), str(tmp_path / "theirs"))
    assert_same_files(home / "drifted", tmp_path / "theirs")


@pytest.mark.parametrize("index", [False, True])
def test_base_without_weights_on_this_machine_is_enough_to_convert(home, tmp_path, index):
    shutil.copytree(home / "mistral", tmp_path / "light", ignore=shutil.ignore_patterns("*.safetensors"))
    if index:
        weight_map = {"model.embed_tokens.weight": "model-1.safetensors", "lm_head.weight": "model-2.safetensors"}
        (tmp_path / "light" / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    report = convert(str(home / "joint"), str(tmp_path / "ours"), base=str(tmp_path / "light"))
    assert "all rows kept" in report
    to_original(str(tmp_path / "ours"), str(tmp_path / "theirs"))
    assert_same_files(home / "joint", tmp_path / "theirs")
    model = load(tmp_path / "ours", base_model_name_or_path=str(home / "mistral"))
    assert answers(model)[1]


def test_qwen_without_beginning_token_takes_its_first_extra_token(home, tmp_path):
    convert(str(home / "tied"), str(tmp_path / "ours"))
    processor = load(tmp_path / "ours").processor
    ids = processor.encode_documents(["A fox."])[0]
    assert processor.tokenizer.convert_ids_to_tokens(ids[:2]) == ["<ENC>", EXTRA_TOKENS[0]]


def test_padded_vocabulary_is_cut_to_the_tokenizer(home, tmp_path):
    convert(str(home / "tied"), str(tmp_path / "ours"))
    model = load(tmp_path / "ours")
    assert model.config.vocab_size == len(model.processor.tokenizer) == max(model.config.added_token_ids) + 1
    assert model.get_input_embeddings().weight.shape[0] == model.config.vocab_size
    assert model.decoder.lm_head.weight is model.get_input_embeddings().weight


def test_prompts_come_from_a_file(converted):
    assert CLaRaConfig.from_pretrained(converted).prompts == PROMPTS


def test_remarks_and_differently_named_users_of_a_prompts_file_are_understood(home, tmp_path):
    values = {
        "note": "read me",
        "qa": {**PROMPTS["qa"], "assistant": PROMPTS["qa"]["assistant"] + "   (pairs joined by newlines)"},
        "paraphrase": {"system": None, "user_seen": PROMPTS["paraphrase"]["user"]},
    }
    (tmp_path / "prompts.json").write_text(json.dumps(values))
    convert(str(home / "joint"), str(tmp_path / "ours"), prompts=str(tmp_path / "prompts.json"))
    prompts = CLaRaConfig.from_pretrained(tmp_path / "ours").prompts
    assert prompts["qa"] == PROMPTS["qa"] and prompts["answer"] == DEFAULT_PROMPTS["answer"]
    assert prompts["paraphrase"] == {**PROMPTS["paraphrase"], "system": None}


def test_prompts_are_read_from_the_checkpoint_s_code_which_is_not_run(home, tmp_path):
    shutil.copytree(home / "joint", home / "with-code")
    write_code(home / "with-code" / "modeling_clara.py")
    assert "modeling_clara.py" in convert(str(home / "with-code"), str(tmp_path / "ours"))
    assert CLaRaConfig.from_pretrained(tmp_path / "ours").prompts == PROMPTS


def test_missing_prompts_are_warned_of(home, tmp_path, caplog):
    report = convert(str(home / "joint"), str(tmp_path / "ours"))
    assert "this package's own" in report
    assert "--prompts" in caplog.text
    assert CLaRaConfig.from_pretrained(tmp_path / "ours").prompts == DEFAULT_PROMPTS


def test_subfolders_are_found_and_named(home, tmp_path, capsys):
    shutil.copytree(home / "joint", home / "repo" / "compression-8")
    arguments = [str(home / "repo"), str(tmp_path / "ours")]
    assert exit_code(main, arguments) == 1 and "--subfolder, one of compression-8" in capsys.readouterr().err
    assert exit_code(main, [*arguments, "--subfolder", "compression-8", "--base", str(home / "mistral")]) == 0
    assert "8: documents of 32 tokens to 4 memory vectors" in capsys.readouterr().out


def test_settings_that_are_missing_are_assumed_aloud(home, tmp_path):
    shutil.copytree(home / "joint", home / "terse")
    values = json.loads((home / "terse" / CONFIG).read_text())
    (home / "terse" / CONFIG).write_text(json.dumps({k: v for k, v in values.items() if k not in ("sep", "lora_r")}))
    report = convert(str(home / "terse"), str(tmp_path / "ours"))
    assert "sep is missing: True" in report and "lora_r is missing: 4" in report


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-400])


def edit_adapters(folder: Path, change) -> None:
    adapters = torch.load(folder / ADAPTERS_FILE, weights_only=True)
    change(adapters)
    torch.save(adapters, folder / ADAPTERS_FILE)


def edit_config(folder: Path, **values) -> None:
    (folder / CONFIG).write_text(json.dumps({**json.loads((folder / CONFIG).read_text()), **values}))


class Trap:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


FIRST_LORA = "model.layers.0.self_attn.q_proj.lora_A.weight"
BROKEN = {
    "adapters cut": (lambda folder: cut(folder / ADAPTERS_FILE), "adapters.pth is truncated"),
    "layers cut": (lambda folder: cut(folder / LAYERS_FILE), "layers.pth is truncated"),
    "adapters missing": (lambda folder: (folder / ADAPTERS_FILE).unlink(), "adapters.pth is missing"),
    "config missing": (lambda folder: (folder / CONFIG).unlink(), "config.json is missing"),
    "config no JSON": (lambda folder: cut(folder / CONFIG), "config.json is no JSON file"),
    "another model": (lambda folder: edit_config(folder, model_type="mistral"), "model_type 'mistral'"),
    "no length": (lambda folder: edit_config(folder, doc_max_length=None), "whole number doc_max_length"),
    "another rate": (lambda folder: edit_config(folder, compr_rate=4), "rows, but the tokenizer"),
    "another rank": (lambda folder: edit_config(folder, lora_r=16), "rank {4}"),
    "another base": (lambda folder: edit_config(folder, decoder_model_name="phi"), "made for another one"),
    "base nowhere": (lambda folder: edit_config(folder, decoder_model_name="no/such/base"), "pass --base"),
    "object in the file": (
        lambda folder: torch.save(Trap(folder.parent / "sprung"), folder / ADAPTERS_FILE),
        "no PyTorch file of tensors",
    ),
    "foreign names": (lambda folder: torch.save({"x": torch.ones(2)}, folder / ADAPTERS_FILE), "got ['x']"),
    "weight missing": (
        lambda folder: edit_adapters(folder, lambda adapters: adapters["encoder_adapter"].pop(FIRST_LORA)),
        "incomplete",
    ),
    "weight missing everywhere": (
        lambda folder: edit_adapters(folder, lambda adapters: [value.pop(FIRST_LORA) for value in adapters.values()]),
        "incomplete",
    ),
    "copy that differs": (
        lambda folder: edit_adapters(
            folder, lambda adapters: adapters["decoder_adapter"].update({"lm_head.weight": torch.ones(2, 2)})
        ),
        "holds lm_head.weight",
    ),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_files_give_one_error_and_no_output(home, tmp_path, capsys, kind):
    damage, message = BROKEN[kind]
    folder = home / f"broken {kind}"
    shutil.copytree(home / "joint", folder)
    damage(folder)
    assert exit_code(main, [str(folder), str(tmp_path / "new" / "ours")]) == 1
    captured = capsys.readouterr()
    error = captured.err.strip().split("\n")[-1]
    assert ": error: " in error and message in error and captured.out == ""
    assert not (tmp_path / "new").exists() and not (home / "sprung").exists()


def test_existing_output_is_left_alone(home, tmp_path, capsys):
    (tmp_path / "ours").mkdir()
    (tmp_path / "ours" / "notes").write_text("mine")
    assert exit_code(main, [str(home / "joint"), str(tmp_path / "ours")]) == 2
    assert "exists" in capsys.readouterr().err
    assert [path.name for path in tmp_path.rglob("*")] == ["ours", "notes"]


def test_interrupted_conversion_leaves_nothing(home, tmp_path, capsys, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("clara_hf.original.convert.write_weights", interrupt)
    assert exit_code(main, [str(home / "joint"), str(tmp_path / "ours"), "--full"]) == 130
    assert not list(tmp_path.iterdir())


def test_loading_a_published_folder_says_how_to_convert(home):
    for loader in (CLaRaForRetrievalGeneration, CLaRaConfig):
        with pytest.raises(ValueError, match="convert it first: python -m clara_hf.original.convert .*joint OUT"):
            loader.from_pretrained(home / "joint")


def test_a_checkpoint_of_this_package_is_no_source(converted, tmp_path, capsys):
    assert exit_code(main, [str(converted), str(tmp_path / "ours")]) == 1
    assert "'clara'" in capsys.readouterr().err
    assert exit_code(main, [str(converted.parent), str(tmp_path / "theirs"), "--to-original"]) == 1
    assert "config.json is missing" in capsys.readouterr().err


def hub_cache(folder: Path, source: Path, name: str, subfolder: str) -> None:
    """Put `source` where the Hub client keeps what it has downloaded."""
    repository = folder / f"models--{name.replace('/', '--')}"
    shutil.copytree(source, repository / "snapshots" / "0123456789" / subfolder)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("0123456789")


def test_hub_ids_convert_and_load_in_a_fresh_process(home, converted, tmp_path):
    cache = tmp_path / "cache"
    hub_cache(cache, home / "joint", "someone/joint", "compression-8")
    hub_cache(cache, home / "mistral", "someone/base", "")
    environment = {
        **os.environ,
        "HF_HUB_CACHE": str(cache),
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "HF_HUB_OFFLINE": "1",
    }
    options = ["--subfolder", "compression-8", "--base", "someone/base", "--prompts", str(home / "prompts.json")]
    command = [
        sys.executable,
        "-m",
        "clara_hf.original.convert",
        "someone/joint",
        str(tmp_path / "ours"),
        *options,
    ]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "base        someone/base" in done.stdout and "added tokens kept" in done.stdout
    code = (
        "import json, sys\n"
        "sys.modules['modeling_clara'] = sys.modules['clara_hf'] = None  # as where neither is installed\n"
        "from transformers import AutoModel\n"
        "model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)\n"
        "questions, documents = json.loads(sys.argv[2])\n"
        "texts, indices = model.generate_from_questions(questions=questions, documents=documents, max_new_tokens=6)\n"
        "print(json.dumps([texts, indices.tolist()]))"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "ours"), json.dumps([QUESTIONS, DOCUMENTS])]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    model = OriginalCLaRa.from_pretrained(converted)
    texts, indices = model.generate_from_questions(questions=QUESTIONS, documents=DOCUMENTS, max_new_tokens=6)
    assert json.loads(done.stdout) == [texts, indices.tolist()]


# The published method names


def test_published_methods_are_the_verbs_under_other_names(converted):
    model = OriginalCLaRa.from_pretrained(converted)
    flat = [text for row in DOCUMENTS for text in row]
    assert torch.equal(model.compress_documents(flat), model.compress(flat))
    generated = model.generate(questions=QUESTIONS, documents=DOCUMENTS, max_new_tokens=6)
    texts, indices = model.generate_from_questions(questions=QUESTIONS, documents=DOCUMENTS, max_new_tokens=6)
    assert [text.strip() for text in texts] == generated.texts and torch.equal(indices, generated.indices)
    generated = model.generate(questions=QUESTIONS, documents=DOCUMENTS, rerank=False, max_new_tokens=6)
    texts = model.generate_from_text(questions=QUESTIONS, documents=DOCUMENTS, max_new_tokens=6)
    assert [text.strip() for text in texts] == generated.texts


def test_published_methods_change_neither_top_k_nor_the_mode(converted):
    model = OriginalCLaRa.from_pretrained(converted)
    model.train()
    first = model.generate_from_text(questions=QUESTIONS, documents=DOCUMENTS, max_new_tokens=6)
    assert model.generate_from_text(questions=QUESTIONS, documents=DOCUMENTS, max_new_tokens=6) == first
    model.generate_from_paraphrase(questions=["", ""], documents=DOCUMENTS, max_new_tokens=6)
    assert model.training and model.config.top_k == 2


def test_paraphrases_read_no_question_but_one_is_needed_for_each_entry(converted):
    model = OriginalCLaRa.from_pretrained(converted)
    assert len(model.generate_from_paraphrase(questions=["", ""], documents=DOCUMENTS, max_new_tokens=3)) == 2
    with pytest.raises(ValueError, match="2 lists for 1 questions"):
        model.generate_from_paraphrase(questions=[""], documents=DOCUMENTS)
