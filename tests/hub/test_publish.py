"""Pushing to, and loading from, a Hub of the tests over real HTTP: what is uploaded, and what others get."""

import inspect
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import TEXTS, build_base, build_clara
from hub_server import TOKEN, environment_of, hub_server
from huggingface_hub import ModelCard, parse_eval_result_entries
from original_checkpoint import build_original_base, write_code, write_original
from transformers.dynamic_module_utils import get_class_from_dynamic_module

from clara_hf.hub.publish import publish, stage
from clara_hf.original.convert import convert
from clara_hf.program import UsageError
from modeling_clara import CLaRaForRetrievalGeneration
from modeling_clara.adapters_clara import GENERATOR, use_adapter


PUSH = """
import json, sys
from clara_hf.cli import call
from clara_hf.program import run_program
from modeling_clara import CLaRaForRetrievalGeneration
def main():
    for step, *arguments in json.loads(sys.argv[1]):
        if step == "publish":
            call("publish", arguments)
        else:
            model = CLaRaForRetrievalGeneration.from_pretrained(arguments[0])
            (model if step == "model" else model.processor).push_to_hub(arguments[1])
run_program(main)
"""


def outputs(model, texts):
    """Memories; scores and answers, where there is a query reasoner."""
    memories = model.compress(texts)
    if not model.config.query_reasoner:
        return [memories]
    answers = model.generate(questions=texts[:2], memories=memories, max_new_tokens=4)
    return [memories, answers.scores, answers.sequences]


def equal(found, expected):
    return len(found) == len(expected) and all(map(torch.equal, found, expected))


# In a process that has torch, transformers and peft, but nothing of ours.
PULL = (
    f"{inspect.getsource(outputs)}\n\n"
    + """
import json, sys
sys.modules["modeling_clara"] = sys.modules["clara_hf"] = sys.modules["trainers"] = None
import torch
from transformers import AutoConfig, AutoModel, AutoProcessor
wanted, out, texts = json.loads(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3])
found = {}
for key, (name, options) in wanted.items():
    options = {**options, "trust_remote_code": True}
    assert AutoConfig.from_pretrained(name, **options).model_type == "clara", key
    model, processor = AutoModel.from_pretrained(name, **options), AutoProcessor.from_pretrained(name, **options)
    assert processor.encode_documents(texts) == model.processor.encode_documents(texts)
    found[key] = outputs(model, texts)
torch.save(found, out)
"""
)
PEFT = """
import sys
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base = AutoModelForCausalLM.from_pretrained("some-org/some-base")
for folder in sys.argv[2:]:
    alone = PeftModel.from_pretrained(base, "me/" + folder.split("/")[0], subfolder=folder.partition("/")[2]).eval()
    with torch.no_grad():
        torch.save(alone(torch.arange(5, 53).view(3, 16)).logits, sys.argv[1])
    base = alone.unload()
"""
FAIL = """
import json, sys
from transformers import AutoModel
from modeling_clara import CLaRaForRetrievalGeneration
for name, options in json.loads(sys.argv[1]):
    for load in (CLaRaForRetrievalGeneration.from_pretrained, AutoModel.from_pretrained):
        try:
            load(name, **options)
        except (OSError, ValueError) as error:
            print(json.dumps([name, load.__self__.__name__, str(error)]))
"""
REFUSED = """
import json, sys
from clara_hf.hub.publish import publish
from clara_hf.program import UsageError
for wanted in json.loads(sys.argv[2]):
    try:
        publish(sys.argv[1], "me/refused", benchmarks=[wanted])
    except UsageError as error:
        print(error)
"""
ROOT = Path(__file__).resolve().parents[2]
NANO = ROOT / "recipes" / "nano" / "pretrained" / "joint"
WEIGHTS = {f"{name}/adapter_model.safetensors" for name in ("compressor", "query_reasoner", "generator")}
NEEDED = {"config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"}
NEEDED |= {"README.md", "modeling_clara.py", "processing_clara.py", "configuration_clara.py"}
LEFTOVERS = ("optimizer.pt", "training_args.bin", "log.jsonl", "run.json", "checkpoint-1/model.safetensors")


class Hub:
    """A server, checkpoints to upload, and processes that use both, each with its own settings."""

    def __init__(self, server, home):
        self.server, self.home, self.said = server, home, ""
        self.cache = home / "cache"

    def run(self, code, *arguments, code_of_exit=0, **options):
        command = [sys.executable, "-c", code, *map(str, arguments)]
        environment = environment_of(self.server, self.cache, **options)
        done = subprocess.run(command, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        self.said += done.stdout + done.stderr
        assert done.returncode == code_of_exit, done.stderr[-3000:]
        return done

    def push(self, *steps, **options):
        return self.run(PUSH, json.dumps([list(map(str, step)) for step in steps]), **options)

    def pull(self, wanted, **options):
        out = self.home / "pulled.pt"
        self.run(PULL, json.dumps(wanted), out, json.dumps(TEXTS), **options)
        return torch.load(out)

    def files(self, name, revision="main"):
        return self.server.repositories[name].files(revision)

    def commits(self, name):
        return list(self.server.repositories[name].commits.values())


@pytest.fixture(scope="module")
def hub(tmp_path_factory):
    """Everything is pushed that others load."""
    home = tmp_path_factory.mktemp("hub")
    with hub_server() as server:
        hub = Hub(server, home)
        build_base(home / "base")
        hub.models = {
            8: build_clara(str(home / "base")),
            4: build_clara(str(home / "base"), seed=1, compression_rate=4),
        }
        for rate, form in ((8, "adapter"), (8, "full"), (4, "adapter"), (8, "local")):
            folder, config = home / f"{form}-{rate}", hub.models[rate].config
            config.base_model_name_or_path = str(home / "base") if form == "local" else "some-org/some-base"
            config.checkpoint_format = "adapter" if form == "local" else form
            hub.models[rate].save_pretrained(folder)
            (folder / "checkpoint-1").mkdir()
            for file in LEFTOVERS:
                (folder / file).write_text("{}")
            (folder / "scores.svg").write_text("<svg/>")
        (home / "base" / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
        server.add("some-org/some-base", home / "base")
        server.add("me/gated", home / "full-8", gated=True)
        server.add("me/own-card").commit("main", {"README.md": b"# Mine"})
        full, adapter, other, local = (home / name for name in ("full-8", "adapter-8", "adapter-4", "local-8"))
        hub.pushed = hub.push(
            ("model", adapter, "me/adapter"),
            ("processor", full, "me/adapter"),
            ("model", full, "me/full"),
            ("publish", full, "me/published"),
            ("publish", adapter, "me/published", "--full"),
            ("publish", other, "me/published", "--adapter-only"),
            ("publish", adapter, "me/rates", "--revision", "next", "--subfolder", "cr8"),
            ("publish", other, "me/rates", "--revision", "next", "--subfolder", "cr4"),
            ("publish", full, "me/hidden", "--private", "--full", "--base-licence", "mit"),
            ("publish", local, "me/local"),
            ("publish", adapter, "me/own-card"),
            ("publish", NANO, "me/clara-nano"),
        )
        yield hub


def test_what_is_pushed_is_pulled_in_a_fresh_process_bit_for_bit_and_offline_again(hub):
    first = hub.commits("me/published")
    first = next(name for name, files in hub.server.repositories["me/published"].commits.items() if files is first[1])
    wanted = {name: (f"me/{name}", {}) for name in ("adapter", "full", "published", "hidden", "local", "own-card")}
    wanted |= {f"cr{rate}": ("me/rates", {"revision": "next", "subfolder": f"cr{rate}"}) for rate in (8, 4)}
    wanted["first"] = ("me/published", {"revision": first})
    wanted |= {"clara-nano": ("me/clara-nano", {}), "shipped": (str(NANO), {})}
    nano = CLaRaForRetrievalGeneration.from_pretrained(NANO)
    online, asked = hub.pull(wanted), len(hub.server.log)
    for key, found in online.items():
        model = hub.models[4 if key in ("cr4", "published") else 8] if key not in ("clara-nano", "shipped") else nano
        assert equal(found, outputs(model, TEXTS)), key
    offline = hub.pull(wanted, offline=True)
    assert len(hub.server.log) == asked and all(equal(offline[key], online[key]) for key in online)


def test_the_shipped_checkpoint_has_the_package_s_code():
    code = {path.name: path.read_bytes() for path in (ROOT / "modeling_clara").glob("*_clara.py")}
    assert code == {path.name: path.read_bytes() for path in NANO.glob("*.py")}
    assert all((NANO / file).is_file() for file in WEIGHTS | {"clara.safetensors"})


def test_a_converted_checkpoint_keeps_the_release_s_method_names(hub, tmp_path):
    build_original_base(tmp_path / "base")
    write_original(tmp_path / "release", tmp_path / "base")
    write_code(tmp_path / "release" / "modeling_clara.py")
    (tmp_path / "release" / "LICENSE").write_text("Of the authors.")
    convert(str(tmp_path / "release"), str(tmp_path / "ours"))
    for form in ("full", "adapter"):
        config = json.loads((tmp_path / "ours" / "config.json").read_text())
        config["base_model_name_or_path"] = str(tmp_path / "base") if form == "full" else "some-org/some-base"
        (tmp_path / "ours" / "config.json").write_text(json.dumps(config))
        stage(tmp_path / "ours", tmp_path / form)
        staged = json.loads((tmp_path / form / "config.json").read_text())
        assert staged["checkpoint_format"] == form and (tmp_path / form / "LICENSE").read_text() == "Of the authors."
        loaded = get_class_from_dynamic_module(staged["auto_map"]["AutoModel"], str(tmp_path / form))
        options = {"base_model_name_or_path": str(tmp_path / "base")} if form == "adapter" else {}
        assert loaded.from_pretrained(tmp_path / form, **options).compress_documents(TEXTS).shape == (5, 4, 32)
    # Pushed by our own class, from the disk and from the Hub; a checkpoint without that code says so.
    hub.push(("model", tmp_path / "full", "me/converted"), ("model", "me/converted", "me/again"))
    for name in ("me/converted", "me/again"):
        pushed = json.loads(hub.files(name)["config.json"])
        assert pushed["auto_map"]["AutoModel"] == "original_methods_clara.OriginalCLaRa"
        assert (
            hub.files(name)["original_methods_clara.py"] == (tmp_path / "ours/original_methods_clara.py").read_bytes()
        )
    (tmp_path / "full" / "original_methods_clara.py").unlink()
    said = hub.push(("model", tmp_path / "full", "me/without"))
    assert "method names" in said.stderr and str(tmp_path / "full") in said.stderr


@pytest.mark.long
def test_the_example_pushes_and_another_process_answers(hub):
    command = [sys.executable, str(ROOT / "examples" / "push_and_pull.py"), "me/example"]
    environment = environment_of(hub.server, hub.cache)
    done = subprocess.run(command, env=environment, cwd=hub.home, capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.splitlines()[-1] == "goat 0", done.stderr[-3000:]
    results = json.loads((NANO / "results.json").read_text())["datasets"]["nano-test"]["systems"]["clara"]
    assert f"F1: {round(100 * results['f1']['value'], 1)}" in done.stdout and TOKEN not in done.stdout + done.stderr
    assert hub.server.repositories["me/example"].private


def test_what_is_needed_is_uploaded_and_nothing_of_the_run(hub):
    assert set(hub.files("me/adapter")) >= WEIGHTS | NEEDED | {"clara.safetensors"}
    assert set(hub.files("me/full")) >= NEEDED | {"model.safetensors"} and not WEIGHTS & set(hub.files("me/full"))
    _, adapter, full, other = hub.commits("me/published")  # the base is named by its Hub id: adapters alone
    assert set(adapter) >= WEIGHTS | NEEDED | {"clara.safetensors", "scores.svg"} and "model.safetensors" not in adapter
    assert set(full) >= NEEDED | {"model.safetensors"} and not (WEIGHTS | {"clara.safetensors"}) & set(full)
    assert set(other) == set(adapter)
    for name, repository in hub.server.repositories.items():
        for files in repository.commits.values() if name != "me/gated" else ():
            assert not set(LEFTOVERS) & set(files), name


def test_no_place_of_the_machine_and_no_token_is_in_any_file_or_log(hub):
    for name, repository in hub.server.repositories.items():
        for files in repository.commits.values():
            for path, data in files.items():
                assert TOKEN.encode() not in data, (name, path)
                assert name in ("me/gated", "some-org/some-base") or str(hub.home).encode() not in data, (name, path)
    assert TOKEN not in hub.said
    for path in hub.home.rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes(), path


def test_models_in_subfolders_share_the_code_at_the_root_and_have_a_card_each(hub):
    files, main = hub.files("me/rates", "next"), hub.files("me/rates", "main")
    assert set(main) == {".gitattributes"}
    assert {"cr8/config.json", "cr4/config.json", "cr8/README.md", "README.md", "modeling_clara.py"} <= set(files)
    assert not any(path.startswith("cr") and path.endswith(".py") for path in files)
    for rate in (8, 4):
        assert f'"me/rates", subfolder="cr{rate}"' in files[f"cr{rate}/README.md"].decode()


def test_cards_are_validated_and_their_metadata_parse_back(hub):
    assert hub.server.log.count("POST /api/validate-yaml") >= 8
    data = ModelCard(hub.commits("me/published")[1]["README.md"].decode()).data
    assert data.base_model == "some-org/some-base" and data.base_model_relation == "adapter" and "clara" in data.tags
    assert data.license == "apache-2.0" and ModelCard(hub.files("me/local")["README.md"].decode()).data.license is None
    assert ModelCard(hub.files("me/hidden")["README.md"].decode()).data.license == "mit"
    pushed = ModelCard(hub.files("me/adapter")["README.md"].decode())
    assert pushed.data.base_model == "some-org/some-base" and 'from_pretrained("me/adapter"' in pushed.text
    assert hub.files("me/own-card")["README.md"] == b"# Mine" and "own-card" in hub.pushed.stderr


def test_peft_reads_the_generator_of_a_pushed_repository(hub):
    out, ids = hub.home / "logits.pt", torch.arange(5, 53).view(3, 16)
    hub.run(PEFT, out, f"adapter/{GENERATOR}")
    decoder = hub.models[8].decoder
    with torch.no_grad(), use_adapter(decoder, GENERATOR):
        found = torch.load(out)
        assert torch.equal(found, decoder(ids).logits[..., : found.shape[-1]])


def test_private_gated_and_missing_repositories_are_one_clear_error(hub):
    wanted = [("me/hidden", {"token": False}), ("me/nowhere", {}), ("me/gated", {})]
    hub.cache = hub.home / "empty"
    said = [json.loads(line) for line in hub.run(FAIL, json.dumps(wanted)).stdout.splitlines()]
    hub.cache = hub.home / "cache"
    assert len(said) == 6 and all(name in message for name, _, message in said)
    for name, kind, message in said:
        assert kind != "CLaRaForRetrievalGeneration" or len(message.splitlines()) == 1
        assert name != "me/gated" or "gated" in message or "restricted" in message or "403" in message, message
    assert hub.server.repositories["me/hidden"].private


def test_publishing_without_a_token_or_adapters_over_a_local_base_is_refused(hub):
    with pytest.raises(UsageError, match=f"{hub.home}/base.*--full"):
        publish(hub.home / "local-8", "me/x", checkpoint_format="adapter")
    with pytest.raises(UsageError, match="nowhere"):
        publish(hub.home / "nowhere", "me/x")
    with pytest.raises(UsageError, match="subfolder.*generator"):
        publish(hub.home / "full-8", "me/x", subfolder="generator")
    refused = hub.push(("publish", hub.home / "full-8", "me/x"), token=None, code_of_exit=2)
    assert "me/x" in refused.stderr and "HF_TOKEN" in refused.stderr and "Traceback" not in refused.stderr
    assert "me/x" not in hub.server.repositories


def test_figures_for_a_registered_benchmark_are_uploaded_and_others_refused(hub):
    hub.server.add("datasets/some-org/qa").commit("main", {"eval.yaml": b"tasks:\n- id: some/task\n- id: default\n"})
    hub.server.add("datasets/some-org/no-benchmark").commit("main", {"README.md": b"# Data"})
    hub.server.add("datasets/some-org/closed", gated=True)
    step = ("publish", NANO, "me/leader", "--benchmark")
    hub.push((*step, "some-org/qa:some/task=recall@5", "--benchmark", "some-org/qa:default=nano-test/f1"))
    systems = json.loads((NANO / "results.json").read_text())["datasets"]["nano-test"]["systems"]
    found = parse_eval_result_entries(yaml.safe_load(hub.files("me/leader")[".eval_results/some-org--qa.yaml"]))
    assert [(entry.dataset_id, entry.task_id, entry.value) for entry in found] == [
        ("some-org/qa", task, round(100 * systems["clara"][metric]["value"], 1))
        for task, metric in (("some/task", "recall@5"), ("default", "f1"))
    ]
    assert {entry.notes for entry in found} == {"compression rate 16, 600 questions"}
    assert not any(path.startswith(".eval_results") for path in hub.files("me/clara-nano"))
    refusals = {
        "some-org/no-benchmark:default=f1": ("some-org/no-benchmark", "eval.yaml"),
        "some-org/nowhere:default=f1": ("some-org/nowhere", "eval.yaml"),
        "some-org/closed:default=f1": ("some-org/closed", "gated"),
        "some-org/qa:other=f1": ("other", "default"),
        "some-org/qa:default=bleu": ("bleu", "f1"),
        "some-org/qa:default=mine/f1": ("mine", "nano-test"),
        "some-org/qa=f1": ("some-org/qa=f1", "ID:TASK=METRIC"),
    }
    said = hub.run(REFUSED, NANO, json.dumps(list(refusals))).stdout.splitlines()
    for facts, message in zip(refusals.values(), said, strict=True):
        assert all(fact in message for fact in facts), message
    with pytest.raises(UsageError, match="benchmark.*subfolder"):
        publish(NANO, "me/refused", subfolder="cr16", benchmarks=["some-org/qa:default=f1"])
    assert "me/refused" not in hub.server.repositories


def test_an_upload_that_was_cut_is_repeated_and_one_that_fails_leaves_nothing(hub):
    hub.server.full = True
    hub.server.objects.clear()
    refused = hub.push(("publish", hub.home / "adapter-8", "me/cut"), code_of_exit=2)
    assert "me/cut" in refused.stderr and "again" in refused.stderr and "Traceback" not in refused.stderr
    assert set(hub.files("me/cut")) == {".gitattributes"}
    hub.server.full, hub.server.cuts = False, 1
    hub.push(("publish", hub.home / "adapter-8", "me/cut"))
    found, expected = hub.files("me/cut"), hub.commits("me/published")[1]
    assert hub.server.cuts == 0 and set(found) == set(expected)
    assert all(found[path] == expected[path] for path in found if path.endswith(".safetensors"))
