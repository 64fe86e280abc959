"""`push_to_hub=True` of our trainers and programs against the Hub of the tests: checkpoints, the model, its card."""

import inspect
import json
import re
import subprocess
import sys

import pytest
import torch
from conftest import TEXTS, build_base
from hub_server import TOKEN, environment_of, hub_server
from huggingface_hub import ModelCard
from test_publish import NEEDED, PULL, equal, outputs


WEIGHTS = {"clara.safetensors", "compressor/adapter_model.safetensors", "generator/adapter_model.safetensors"}


TRAIN = (
    f"{inspect.getsource(outputs)}\n\n"
    + """
import json, sys
import torch
from datasets import Dataset
from clara_hf.cli import call
from modeling_clara import CLaRaForRetrievalGeneration
from trainers import SCPConfig, SCPTrainer
token, rows, texts = sys.argv[1], [json.loads(line) for line in open("rows.jsonl")], json.loads(sys.argv[2])
FIELDS = {"doc_max_length": 32, "compression_rate": 8, "lora_r": 4}
SETTINGS = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "push_to_hub": True, "hub_always_push": True}
SETTINGS |= {"hub_token": token, "use_cpu": True, "disable_tqdm": True, "save_total_limit": 1}
def trainer(name, base, form, **options):
    model = CLaRaForRetrievalGeneration.from_base(base, **FIELDS, checkpoint_format=form)
    args = SCPConfig(name, hub_model_id=f"me/{name}", learning_rate=0.01, **SETTINGS, **options)
    return SCPTrainer(model, args, Dataset.from_list(rows))
found = {}
for name, base, form, strategy in (
    ("adapters", "some-org/some-base", "adapter", "all_checkpoints"),
    ("local", "base", "full", "checkpoint"),
    ("branch", "some-org/some-base", "adapter", "end"),
):
    revision = "next" if name == "branch" else None
    trained = trainer(name, base, form, hub_strategy=strategy, hub_revision=revision)
    trained.train()
    trained.push_to_hub(license="mit")
    found[name] = outputs(trained.model.eval(), texts)
closed = trainer("closed", "some-org/some-base", "adapter", hub_strategy="every_save")
closed.train()
try:
    closed.push_to_hub()
except OSError as error:
    print("closed:", error)
try:
    trainer("refused", "base", "adapter")
except ValueError as error:
    print("refused:", error)
arguments = [f"--{name}={str(value).lower() if value is True else value}" for name, value in SETTINGS.items()]
arguments += ["--clara_config", json.dumps({**FIELDS, "checkpoint_format": "adapter"}), "--output_dir", "program"]
call("scp", ["--model_name_or_path", "some-org/some-base", "--train_file", "rows.jsonl", "--hub_model_id", "me/program"]
    + arguments)
found["program"] = outputs(CLaRaForRetrievalGeneration.from_pretrained("program"), texts)
torch.save(found, "trained.pt")
"""
)
ROWS = [
    {"data_type": "qa", "question": ["Who keeps bees?"] * 2, "answers": ["Mara Brandel"] * 2, "docs": [TEXTS[i % 4]]}
    for i in range(8)
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    home = tmp_path_factory.mktemp("trained")
    build_base(home / "base")
    (home / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    with hub_server() as server:
        server.add("some-org/some-base", home / "base")
        server.closed.add("me/closed")
        # The token is known to the arguments alone.
        environment = environment_of(server, home / "cache", token=None)
        command = [sys.executable, "-c", TRAIN, TOKEN, json.dumps(TEXTS)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=home)
        assert done.returncode == 0, done.stderr[-3000:]
        yield home, server, done


def test_checkpoints_are_uploaded_as_the_strategy_says_and_the_model_replaces_them(trained):
    home, server, _ = trained
    commits = list(server.repositories["me/adapters"].commits.values())
    assert len(commits) == 4  # made, two checkpoints, the model
    assert set(commits[1]) >= NEEDED | {"model.safetensors", "checkpoint-1/optimizer.pt", "checkpoint-1/config.json"}
    assert "checkpoint-2/trainer_state.json" in commits[2] and not WEIGHTS & set(commits[2])
    assert set(commits[3]) >= NEEDED | WEIGHTS and "model.safetensors" not in commits[3]
    for path in (home / "adapters" / "checkpoint-2").iterdir():  # all that resuming needs
        assert path.name == "config.json" or commits[2][f"checkpoint-2/{path.name}"] == path.read_bytes()
    local = list(server.repositories["me/local"].commits.values())
    assert "config.json" not in local[2] and "last-checkpoint/optimizer.pt" in local[2]  # nobody has the base
    assert json.loads(local[2]["last-checkpoint/trainer_state.json"])["global_step"] == 2
    assert set(local[3]) >= NEEDED | {"model.safetensors"}
    branch = server.repositories["me/branch"]
    assert len(branch.commits) == 2 and set(branch.files()) == {".gitattributes"}  # made, and the model
    assert set(branch.files("next")) >= NEEDED | WEIGHTS


def test_nothing_of_the_run_is_at_the_root_and_no_token_anywhere(trained):
    home, server, done = trained
    for name, repository in server.repositories.items():
        for files in repository.commits.values():
            at_root = {path for path in files if "/" not in path}
            assert not {"training_args.bin", "optimizer.pt", "run.json", "log.jsonl", "rows.jsonl"} & at_root
            assert not any(TOKEN.encode() in data for data in files.values()), name
            assert name == "some-org/some-base" or str(home).encode() not in files.get("config.json", b"")
    assert TOKEN not in done.stdout + done.stderr
    for path in home.rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes(), path
    assert not list(home.rglob(".upload-*"))


def test_what_was_trained_is_pulled_in_a_fresh_process(trained):
    home, server, _ = trained
    names = ("adapters", "local", "branch", "program")
    wanted = {name: (f"me/{name}", {"revision": "next"} if name == "branch" else {}) for name in names}
    command = [sys.executable, "-c", PULL, json.dumps(wanted), str(home / "pulled.pt"), json.dumps(TEXTS)]
    environment = environment_of(server, home / "cache")
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    found, expected = torch.load(home / "pulled.pt"), torch.load(home / "trained.pt")
    assert all(equal(found[name], expected[name]) for name in names)


def test_cards_tell_of_the_training(trained):
    home, server, _ = trained
    card = ModelCard(server.repositories["me/adapters"].files()["README.md"].decode())
    assert card.data.license == "mit" and card.data.base_model == "some-org/some-base"
    assert "2 steps of 8 rows" in card.text and "| `learning_rate` | 0.01 |" in card.text
    recorded = json.loads((home / "program" / "run.json").read_text())
    assert recorded["stage"] == "scp" and recorded["digests"]["rows.jsonl"].startswith("xxh3:")
    text = server.repositories["me/program"].files()["README.md"].decode()
    assert f"| `rows.jsonl` | all | {recorded['digests']['rows.jsonl']} |" in text and "stage 1" in text


def test_adapters_over_a_local_base_are_refused_before_a_repository_is_made(trained):
    _, server, done = trained
    assert re.search("refused: base_model_name_or_path is '.*/base'", done.stdout)
    assert "me/refused" not in server.repositories


def test_an_upload_that_fails_stops_no_training_and_says_how_to_repeat_it(trained):
    home, server, done = trained
    assert done.stderr.count("not uploaded to me/closed") == 2 and (home / "closed" / "checkpoint-2").is_dir()
    assert "clara publish closed me/closed" in done.stdout and (home / "closed" / "clara.safetensors").is_file()
    assert set(server.repositories["me/closed"].files()) == {".gitattributes"}
