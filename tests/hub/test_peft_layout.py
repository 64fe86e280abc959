"""Adapter checkpoints in PEFT's own layout: read by PEFT, by older forms of ours, through links, and merged."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import TEXTS, build_base, build_clara
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from clara_hf.hub.export import export_generator
from clara_hf.program import UsageError
from clara_hf.program.cost import base_config, meta_model
from modeling_clara import CLaRaForRetrievalGeneration
from modeling_clara.adapters_clara import COMPRESSOR, GENERATOR, QUERY_REASONER, use_adapter
from modeling_clara.weights_clara import BASE_SAMPLE, embedding_keys, is_own_weight, read_adapter_checkpoint, saved_rows


IDS = torch.arange(5, 53).view(3, 16)
ROOT = Path(__file__).parents[2]
NANO = ROOT / "recipes/nano/pretrained/scp"


@pytest.fixture(scope="module", params=["llama", "qwen3", "mixtral"])
def checkpoint(request, tmp_path_factory):
    home = tmp_path_factory.mktemp(request.param)
    model = build_clara(build_base(home / "base", request.param), checkpoint_format="adapter")
    model.save_pretrained(home / "clara")
    return home, model


@pytest.mark.parametrize("adapter", [COMPRESSOR, QUERY_REASONER, GENERATOR])
def test_peft_reads_each_adapter_over_the_base(adapter, checkpoint):
    home, model = checkpoint
    base = AutoModelForCausalLM.from_pretrained(home / "base")
    alone = PeftModel.from_pretrained(base, home / "clara", subfolder=adapter).eval()
    with torch.no_grad(), use_adapter(model.decoder, adapter):
        expected, found = model.decoder(IDS).logits, alone(IDS).logits
        without = alone.disable_adapter()
        with without:
            assert not torch.allclose(alone(IDS).logits, found, atol=1e-3)
    assert torch.equal(found, expected[..., : found.shape[-1]])


def test_nothing_of_peft_lies_at_the_root_and_every_adapter_in_a_folder(checkpoint):
    files = {path.name for path in (checkpoint[0] / "clara").iterdir()}
    assert {"clara.safetensors", COMPRESSOR, QUERY_REASONER, GENERATOR, "config.json"} <= files
    assert not {"adapter_config.json", "adapter_model.safetensors", "model.safetensors"} & files
    written = json.loads((checkpoint[0] / "clara/generator/adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == str(checkpoint[0] / "base") and written["task_type"] == "CAUSAL_LM"


def test_saving_again_leaves_nothing_of_before(checkpoint, tmp_path):
    model = CLaRaForRetrievalGeneration.from_pretrained(checkpoint[0] / "clara")
    model.save_pretrained(tmp_path)
    model.remove_query_reasoner()
    model.save_pretrained(tmp_path)
    assert not (tmp_path / QUERY_REASONER).exists() and (tmp_path / COMPRESSOR).exists()
    assert torch.equal(CLaRaForRetrievalGeneration.from_pretrained(tmp_path).compress(TEXTS), model.compress(TEXTS))


@pytest.mark.parametrize("form", ["one file", "shards", "one file beside a stale index"])
def test_checkpoints_in_one_file_and_in_shards_are_read(form, checkpoint, tmp_path):
    """As checkpoints of a run are, and adapter checkpoints were."""
    home, model = checkpoint
    loaded = CLaRaForRetrievalGeneration.from_pretrained(home / "clara", checkpoint_format="flat")
    loaded.save_pretrained(tmp_path, max_shard_size="20KB" if form == "shards" else "1GB")
    assert (tmp_path / "model.safetensors.index.json").exists() == (form == "shards")
    if form.endswith("index"):
        (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": {"gone": "model-1-of-1.safetensors"}}')
    again = CLaRaForRetrievalGeneration.from_pretrained(tmp_path)
    assert torch.equal(again.compress(TEXTS), model.compress(TEXTS)) and again.config.checkpoint_format == "adapter"
    expected, found = model.adapter_state_dict(), read_adapter_checkpoint(tmp_path)
    assert expected.keys() == found.keys() and all(torch.equal(found[key], expected[key]) for key in expected)


def test_max_shard_size_is_passed_over_and_a_variant_refused(checkpoint, tmp_path):
    home, model = checkpoint
    model.save_pretrained(tmp_path / "small", max_shard_size="20KB")
    loaded = CLaRaForRetrievalGeneration.from_pretrained(tmp_path / "small")
    assert torch.equal(loaded.compress(TEXTS), model.compress(TEXTS))
    for loaded.config.checkpoint_format in ("adapter", "flat"):
        with pytest.raises(ValueError, match="variant='fp16'"):
            loaded.save_pretrained(tmp_path / "variant", variant="fp16")
    assert not (tmp_path / "variant").exists()


def test_options_of_the_hub_and_of_reading_weights_are_for_the_base_too(checkpoint, tmp_path):
    _, model = checkpoint
    base = model.config.base_model_name_or_path
    snapshot = tmp_path / "cache" / "models--someone--base" / "snapshots" / "abc"
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(snapshot, variant="fp16")
    refs = snapshot.parents[1] / "refs"
    refs.mkdir()
    (refs / "main").write_text("abc")
    model.config.base_model_name_or_path = "someone/base"
    model.save_pretrained(tmp_path / "clara")
    model.config.base_model_name_or_path = base
    options = {"cache_dir": tmp_path / "cache", "variant": "fp16", "local_files_only": True, "revision": "of adapters"}
    loaded = CLaRaForRetrievalGeneration.from_pretrained(tmp_path / "clara", **options)
    assert torch.equal(loaded.compress(TEXTS), model.compress(TEXTS))


@pytest.mark.parametrize("beside", ["link", "target"])
def test_base_beside_a_link_or_beside_what_it_leads_to_is_found(beside, base, tmp_path, monkeypatch):
    (tmp_path / "store").mkdir()
    (tmp_path / "work").mkdir()
    build_base(tmp_path / ("work" if beside == "link" else "store") / "base")
    model = build_clara(str(tmp_path / ("work" if beside == "link" else "store") / "base"), checkpoint_format="adapter")
    model.config.base_model_name_or_path = "../base"
    model.save_pretrained(tmp_path / "store" / "clara")
    (tmp_path / "work" / "clara").symlink_to(tmp_path / "store" / "clara")
    loaded = CLaRaForRetrievalGeneration.from_pretrained(tmp_path / "work" / "clara")
    assert torch.equal(loaded.compress(TEXTS), model.compress(TEXTS))
    monkeypatch.chdir(tmp_path / "work")
    assert torch.equal(CLaRaForRetrievalGeneration.from_pretrained("clara").compress(TEXTS), model.compress(TEXTS))
    # Another folder of that name, as seen from the working directory, is not the base; named as an argument it is.
    (tmp_path / "base").mkdir(exist_ok=True)
    assert torch.equal(CLaRaForRetrievalGeneration.from_pretrained("clara").compress(TEXTS), model.compress(TEXTS))
    with pytest.raises((OSError, ValueError), match=str(tmp_path / "base")):
        CLaRaForRetrievalGeneration.from_pretrained("clara", base_model_name_or_path="../base")
    # By a link to the link, and as a subfolder.
    (tmp_path / "far").mkdir()
    (tmp_path / "far" / "clara").symlink_to("../work/clara")
    loaded = CLaRaForRetrievalGeneration.from_pretrained(tmp_path / "far" / "clara")
    assert torch.equal(loaded.compress(TEXTS), model.compress(TEXTS))
    inside = CLaRaForRetrievalGeneration.from_pretrained(tmp_path / "work", subfolder="clara")
    assert torch.equal(inside.compress(TEXTS), model.compress(TEXTS))


@pytest.mark.parametrize("name", ["base", "./base", "../work/base"])
def test_a_base_named_from_the_working_directory_is_found_from_others(name, tmp_path, monkeypatch):
    build_base(tmp_path / "work" / "base")
    monkeypatch.chdir(tmp_path / "work")
    model = build_clara(name, checkpoint_format="adapter")
    model.save_pretrained("clara")
    model.config.base_model_name_or_path = "../base"
    model.save_pretrained("runs/beside")
    (tmp_path / "work" / "runs" / "base").symlink_to(tmp_path / "work" / "base")
    CLaRaForRetrievalGeneration.from_pretrained("runs/beside").save_pretrained("again")
    monkeypatch.chdir(tmp_path)
    for folder in ("clara", "again"):
        loaded = CLaRaForRetrievalGeneration.from_pretrained(tmp_path / "work" / folder)
        assert torch.equal(loaded.compress(TEXTS), model.compress(TEXTS))


def test_merged_generator_answers_as_the_adapter_does(checkpoint, tmp_path):
    home, model = checkpoint
    export_generator(str(home / "clara"), str(tmp_path / "plain"))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "plain")
    assert not list((tmp_path / "plain").glob("*.py")) and "clara" not in (tmp_path / "plain/config.json").read_text()
    with torch.no_grad(), use_adapter(model.decoder, GENERATOR):
        assert torch.allclose(plain(IDS).logits, model.decoder(IDS).logits, atol=1e-5)
    assert plain.generation_config.eos_token_id == model.config.eos_token_id
    text = model.processor.answer_prompt("Who keeps bees?", 1)
    assert tokenizer(text)["input_ids"] == model.processor.tokenizer(text)["input_ids"]
    with pytest.raises(UsageError, match="plain"):
        export_generator(str(home / "clara"), str(tmp_path / "plain"))


def test_merged_nano_generator_gives_the_same_ids_for_24_questions(tmp_path):
    model = CLaRaForRetrievalGeneration.from_pretrained(NANO)
    export_generator(str(NANO), str(tmp_path / "plain"))
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "plain")
    documents = [
        f"{name} works as a {work} in {place}." for name, work, place in zip(NAMES, WORKS, PLACES, strict=True)
    ]
    questions = [f"What does {name} do?" for name in NAMES] + [f"Where does {name} work?" for name in NAMES]
    questions += [f"Who is the {work}?" for work in WORKS]
    assert len(questions) == 24
    memories = model.compress(documents)
    expected = model.generate(questions, memories=memories, n_docs=2, max_new_tokens=12)
    prompts = model.processor.encode_prompts(questions, [2] * 24)
    with torch.no_grad():
        embeddings = model._prompt_embeddings(prompts["input_ids"], memories[expected.indices].flatten(0, 1))
        found = plain.generate(inputs_embeds=embeddings, attention_mask=prompts["attention_mask"], max_new_tokens=12)
    assert torch.equal(found, expected.sequences)


def stored_values(model) -> int:
    """How many values an adapter checkpoint of `model` holds, by shapes alone; those that tell its base left out."""
    own = sum(value.numel() for key, value in model.state_dict().items() if is_own_weight(key))
    matrices = sum(key is not None for key in embedding_keys(model.decoder))
    return own + matrices * len(saved_rows(model.config)) * model.config.hidden_size


def test_adapters_over_mistral_7b_take_less_than_900_mb(checkpoint):
    """Whether trained in float32, or converted in bfloat16 with all embedding rows; the count is that of real files."""
    home, model = checkpoint
    saved = read_adapter_checkpoint(str(home / "clara"))
    assert stored_values(model) == sum(value.numel() for key, value in saved.items() if key != BASE_SAMPLE)
    geometry = yaml.safe_load((ROOT / "recipes/mistral-7b/scp.yaml").read_text())["clara_config"]
    for rows, size, megabytes in (("added", 2, 252), ("added", 4, 504), ("all", 2, 776)):
        large = meta_model(
            base_config("mistralai/Mistral-7B-Instruct-v0.2"), "joint", **geometry, saved_embedding_rows=rows
        )
        assert large.adapter_names == [COMPRESSOR, GENERATOR, QUERY_REASONER]
        assert round(stored_values(large) * size / 1e6) == megabytes < 900


NAMES = ["Mara Brandel", "Oren Tasil", "Ilva Korr", "Tom Wexel", "Anna Lund", "Pim Aldo", "Rhea Stone", "Jon Falk"]
WORKS = ["banker", "baker", "teacher", "painter", "nurse", "sailor", "farmer", "tailor"]
PLACES = ["Velholm", "Aumstadt", "Norwick", "Halvex", "Tarn", "Orlby", "Kesten", "Dunmar"]


def test_tokenizer_alone_is_the_same_however_it_is_loaded_and_asks_only_without_a_choice(checkpoint):
    """transformers asks before it reads `tokenizer_config.json`; nobody can answer here, and nobody needs to."""
    code = (
        "import sys; sys.modules['modeling_clara'] = None\n"
        "from transformers import AutoTokenizer, PreTrainedTokenizerFast\n"
        "loaded = [PreTrainedTokenizerFast.from_pretrained(sys.argv[1])]\n"
        "loaded += [AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=trust) for trust in (False, True)]\n"
        "print(end='asked: ', flush=True)\n"
        "loaded.append(AutoTokenizer.from_pretrained(sys.argv[1]))\n"
        "print([len(one) for one in loaded], len({str(one(sys.argv[2])['input_ids']) for one in loaded}))"
    )
    command = [sys.executable, "-c", code, str(checkpoint[0] / "clara"), f"{TEXTS[0]}<ENC>"]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    before, _, after = done.stdout.partition("asked: ")
    assert "[y/N]" not in before
    assert after.splitlines()[-1].endswith(f"{[len(checkpoint[1].processor.tokenizer)] * 4} 1")
