"""Several processes give the numbers of one: DDP, ZeRO and FSDP, every stage, on two CPU processes."""

import json
import os
import random
import socket
import subprocess
import sys
from pathlib import Path

import distributed_worker
import pytest
import torch
from conftest import TEXTS, build_clara
from processes import LIMIT, in_processes
from safetensors.torch import load_file
from transformers import AutoModel


pytest.importorskip("deepspeed", reason='ZeRO needs DeepSpeed: pip install "clara-hf[deepspeed]"')
pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[3]
CONFIGS = ROOT / "recipes" / "accelerate"
TOLERANCE = 1e-5
STEPS, SAVE_STEPS, ROWS = 20, 5, 24
KINDS = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
RESUMED = ("zero2", "zero3", "fsdp2")


def each(kinds):
    """ZeRO-3, which has the others' difficulties and more, in every run of the tests; the others in long ones."""
    return [pytest.param(kind, marks=[] if kind == "zero3" else pytest.mark.long) for kind in kinds]


CHECKPOINTING = {
    "kept": {},
    "reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "not-reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
}
QUESTIONS = [
    ("Who keeps bees?", "Mara Brandel"),
    ("What does Halvex Works sell?", "copper lanterns"),
    ("When is the market of Velholm?", "on Thursdays"),
]


def scp_rows() -> list[dict]:
    """Rows with one to three documents, some of them in several rows, and targets of different lengths."""
    rows = []
    for row in range(ROWS):
        docs = [TEXTS[(row + step) % 5] for step in range(1 + row % 3)]
        if row % 4 == 3:
            rows.append({"data_type": "paraphrase", "question": [], "answers": docs[:1], "docs": docs})
        else:
            pairs = [QUESTIONS[(row + step) % 3] for step in range(1 + row % 2)]
            questions, answers = zip(*pairs, strict=True)
            rows.append({"data_type": "qa", "question": questions, "answers": answers, "docs": docs})
    return rows


def qa_rows() -> list[dict]:
    """Questions with three to five candidates."""
    rows = []
    for row in range(ROWS):
        question, answer = QUESTIONS[row % 3]
        docs = [TEXTS[(row + step) % 5] for step in range(3 + row % 3)]
        rows.append({"question": question, "answers": [answer], "docs": docs, "pos_index": [row % 3]})
    return rows


def make_job(name: str, stage: str, model: str, rows: Path, processes: int, **arguments) -> dict:
    """Twenty steps over a global batch of 8, whatever the number of processes; in micro-batches where targets differ
    most in length, or the loss has two parts."""
    micro_batches = 2 if stage in ("scp", "joint") else 1
    settings = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 8 // micro_batches // processes,
        "per_device_eval_batch_size": 4 // processes,
        "gradient_accumulation_steps": micro_batches,
        "learning_rate": 1e-3,
        "save_strategy": "no",
        "logging_steps": 1,
        "use_cpu": True,
        "disable_tqdm": True,
        "generation_max_new_tokens": 4,
    }
    rows = rows / ("scp.json" if stage == "scp" else "qa.json")
    return {"name": name, "stage": stage, "model": model, "rows": str(rows), "arguments": {**settings, **arguments}}


def launch(kind: str, jobs: list[dict], out: Path) -> tuple[int, str, str]:
    """Run `jobs` in two processes, under the shipped configuration of that name; exit code, stdout and stderr."""
    out.mkdir(exist_ok=True)
    job_file = out / "jobs.json"
    request = {"out": str(out), "jobs": jobs}
    if kind == "fsdp2":
        request["fsdp"] = str(CONFIGS / "fsdp2.yaml")
    job_file.write_text(json.dumps(request))
    if kind in ("ddp", "fsdp2"):
        # accelerate launch has no CPU configuration for them: --cpu starts one process.
        ended = in_processes(2, distributed_worker.run_in_job, out, str(job_file))
        stdout = "".join((out / f"stdout{rank}").read_text() for rank in range(2))
        return int(ended != [None, None]), stdout, str(ended)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    own = CONFIGS / f"cpu_{kind}.yaml"
    config = own if own.exists() else CONFIGS / f"{kind}.yaml"
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config), "--num_processes", "2"]
    command += ["--main_process_port", port, str(ROOT / "tests" / "distributed_worker.py"), str(job_file)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, **pipes)
    try:
        stdout, stderr = process.communicate(timeout=LIMIT)
    except BaseException:
        process.terminate()  # upon which the launcher ends its workers
        process.wait(60)
        raise
    return process.returncode, stdout, stderr


class Runs:
    """What each way of training made of the same jobs; each way runs once, when it is first asked for."""

    def __init__(self, folder: Path, base: str):
        self.folder = folder
        self.model = str(folder / "model")
        build_clara(base, lora_dropout=0.0).save_pretrained(self.model)
        (folder / "scp.json").write_text(json.dumps(scp_rows()))
        (folder / "qa.json").write_text(json.dumps(qa_rows()))
        self.logs: dict[str, str] = {}
        # Not the last steps, after which there would be nothing left to lose.
        self.killed_at = random.SystemRandom().randrange(SAVE_STEPS + 1, STEPS - 1)

    def job(self, name: str, stage: str, processes: int, **arguments) -> dict:
        return make_job(name, stage, self.model, self.folder, processes, **arguments)

    def ensure(self, kind: str) -> None:
        if kind in self.logs:
            return
        out = self.folder / kind
        processes = 1 if kind == "one" else 2
        jobs = [self.job(stage, stage, processes) | {"evaluate": True} for stage in distributed_worker.STAGES]
        if kind == "one":
            out.mkdir()
            for job in jobs:
                distributed_worker.run(job, out)
            self.logs[kind] = ""
            return
        if kind == "zero3":
            self.kill(out)
            jobs += self.zero3_jobs()
        elif kind in RESUMED:
            saved = self.job("joint", "joint", 2, save_strategy="steps", save_steps=STEPS // 2, save_total_limit=2)
            jobs = [saved | {"evaluate": True, "save": True} if job["name"] == "joint" else job for job in jobs]
            jobs.append(self.job("resumed", "joint", 2) | {"checkpoint": str(self.checkpoint(kind))})
        code, self.logs[kind], stderr = launch(kind, jobs, out)
        assert code == 0, stderr[-4000:]

    def kill(self, out: Path) -> None:
        """Joint training under ZeRO-3, all processes of which are killed in a step."""
        saving = {"save_strategy": "steps", "save_steps": SAVE_STEPS}
        code, _, stderr = launch(
            "zero3", [self.job("resumed", "joint", 2, **saving) | {"kill_at": self.killed_at}], out
        )
        assert code != 0 and "SIGKILL" in stderr and not (out / "resumed.json").exists()

    def checkpoint(self, kind: str) -> Path:
        """Where joint training of that kind is resumed from."""
        if kind == "zero3":
            last = (self.killed_at - 1) // SAVE_STEPS * SAVE_STEPS
            return self.folder / kind / "resumed" / f"checkpoint-{last}"
        return self.folder / kind / "joint" / f"checkpoint-{STEPS // 2}"

    def zero3_jobs(self) -> list[dict]:
        jobs = [self.job("resumed", "joint", 2) | {"checkpoint": str(self.checkpoint("zero3"))}]
        for stage in ("scp", "joint"):
            jobs += [
                self.job(f"{stage}-{name}", stage, 2, max_steps=1, **options) | {"gradients": True}
                for name, options in CHECKPOINTING.items()
            ]
        return jobs

    def __call__(self, kind: str, name: str) -> tuple[dict, dict[str, torch.Tensor]]:
        self.ensure(kind)
        record = json.loads((self.folder / kind / f"{name}.json").read_text())
        return record, load_file(self.folder / kind / f"{name}.safetensors")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, base) -> Runs:
    return Runs(tmp_path_factory.mktemp("distributed"), base)


def logged(record: dict, name: str) -> list[float]:
    return [row[name] for row in record["log"] if "loss" in row]


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    distances = {key: (found[key] - expected[key]).abs().max().item() for key in expected}
    worst = max(distances, key=distances.get)
    assert distances[worst] <= tolerance, (worst, distances[worst])


@pytest.mark.parametrize("stage", distributed_worker.STAGES)
@pytest.mark.parametrize("kind", each(KINDS))
def test_two_processes_equal_one_at_the_same_global_batch(kind, stage, runs):
    (alone, expected), (together, found) = runs("one", stage), runs(kind, stage)
    assert (alone["processes"], together["processes"]) == (1, 2)
    names = ["loss", "learning_rate"] + (["mse_loss"] if stage in ("scp", "instruct") else [])
    for name in names:
        assert len(logged(alone, name)) == STEPS
        assert logged(together, name) == pytest.approx(logged(alone, name), abs=TOLERANCE), name
    # At the temperature of 0.02, rounding of the scores is multiplied by fifty in the query reasoner's gradient.
    norms = sorted(name for name in alone["log"][0] if name.startswith("grad_norm"))
    assert len(norms) == {"scp": 4, "instruct": 4, "joint": 3, "contrastive": 2}[stage]
    for name in norms:
        assert logged(together, name) == pytest.approx(logged(alone, name), rel=1e-3), name
    assert_close(found, expected, TOLERANCE)
    start = load_file(Path(runs.model) / "model.safetensors")
    moved = [key for key in expected if key in start and (expected[key] - start[key]).abs().max() > 100 * TOLERANCE]
    assert moved, "the weights must move by far more than they may differ"


@pytest.mark.parametrize("stage", distributed_worker.STAGES)
@pytest.mark.parametrize("kind", each(KINDS))
def test_evaluation_with_generation_gives_the_metrics_of_one_process(kind, stage, runs):
    (alone, _), (together, _) = runs("one", stage), runs(kind, stage)
    scores = {"f1", "em", "token_accuracy", "recall@1", "recall@3"}
    names = [name for name in alone["metrics"] if name.removeprefix("eval_") in scores]
    assert names
    for name in names:
        assert together["metrics"][name] == pytest.approx(alone["metrics"][name], abs=1e-6), name


@pytest.mark.parametrize("kind", each(KINDS))
def test_nothing_is_printed_once_per_process(kind, runs):
    runs.ensure(kind)
    lines = [line for line in runs.logs[kind].splitlines() if "'grad_norm'" in line]
    gradient_jobs = 2 * len(CHECKPOINTING) if kind == "zero3" else 0
    resumed = STEPS - int(runs.checkpoint(kind).name.rpartition("-")[2]) if kind in RESUMED else 0
    assert len(lines) == STEPS * len(distributed_worker.STAGES) + gradient_jobs + resumed


@pytest.mark.parametrize("kind", each(RESUMED))
def test_resumed_run_has_the_numbers_of_the_uninterrupted_one(kind, runs):
    (whole, expected), (resumed, found) = runs(kind, "joint"), runs(kind, "resumed")
    assert logged(resumed, "loss") == pytest.approx(logged(whole, "loss"), abs=TOLERANCE), runs.checkpoint(kind)
    assert_close(found, expected, TOLERANCE)


@pytest.mark.parametrize("stage", ["scp", "joint"])
@pytest.mark.parametrize("name", ["reentrant", "not-reentrant"])
def test_activation_checkpointing_keeps_the_gradients_under_zero3(name, stage, runs):
    _, expected = runs("zero3", f"{stage}-kept")
    _, found = runs("zero3", f"{stage}-{name}")
    parts = {key.split(".lora_")[-1].split(".")[1] if ".lora_" in key else key for key in expected}
    wanted = {"scp": {"compressor", "generator", "memory_embeddings.weight"}, "joint": {"query_reasoner", "generator"}}
    assert parts == wanted[stage]
    assert all(gradient.abs().max() > 0 for gradient in expected.values())
    assert_close(found, expected, 0.0)


@pytest.mark.parametrize("kind", each(["zero2", "zero3"]))
def test_deepspeed_checkpoint_holds_once_what_trains_and_nothing_frozen(kind, runs):
    runs.ensure(kind)
    folder = runs.checkpoint(kind)
    weights = load_file(folder / "model.safetensors")
    assert weights and not any("base_layer" in key or "embed_tokens" in key for key in weights)
    trained = sum(weights[key].numel() for key in weights if ".query_reasoner." in key or ".generator." in key)
    written = [tensor for path in folder.rglob("*.pt") for tensor in tensors_in(path) if tensor.is_floating_point()]
    # The optimizer's copy and two moments, divided between the processes, with a few values of padding.
    assert sum(tensor.numel() for tensor in written) == pytest.approx(3 * trained, rel=0.01)


@pytest.mark.parametrize("kind", each(["zero2", "fsdp2"]))
def test_saved_models_load_with_the_code_that_is_saved_with_them(kind, runs):
    _, trained = runs(kind, "joint")
    for folder in (runs.checkpoint(kind), runs.folder / kind / "joint-model"):
        loaded = AutoModel.from_pretrained(folder, trust_remote_code=True)
        assert type(loaded).__name__ == "CLaRaForRetrievalGeneration"
    assert_close({key: value for key, value in loaded.adapter_state_dict().items() if key in trained}, trained, 0.0)


@pytest.mark.long
def test_dro_under_zero2_equals_one_process_by_labels_and_resumes_with_lists_that_it_draws(base, tmp_path):
    (tmp_path / "qa.json").write_text(json.dumps(qa_rows()))
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "top_k": 2, "num_lists": 3, "lora_r": 4}

    def job(name: str, processes: int, **more) -> dict:
        return make_job(name, "dro", base, tmp_path, processes, **{**options, **more})

    (tmp_path / "one").mkdir()
    distributed_worker.run(job("labels", 1, supervised_steps=4), tmp_path / "one")
    resumed = job("resumed", 2, save_strategy="no") | {"checkpoint": str(tmp_path / "zero2" / "drawn" / "checkpoint-2")}
    code, _, stderr = launch(
        "zero2", [job("labels", 2, supervised_steps=4), job("drawn", 2), resumed], tmp_path / "zero2"
    )
    assert code == 0, stderr[-4000:]

    def outcome(kind: str, name: str) -> tuple[list[float], dict[str, torch.Tensor]]:
        record = json.loads((tmp_path / kind / f"{name}.json").read_text())
        return logged(record, "loss"), load_file(tmp_path / kind / f"{name}.safetensors")

    for expected, found in ((("one", "labels"), ("zero2", "labels")), (("zero2", "drawn"), ("zero2", "resumed"))):
        (losses, weights), (own_losses, own_weights) = outcome(*expected), outcome(*found)
        assert len(losses) == 4 and own_losses == pytest.approx(losses, abs=TOLERANCE)
        assert_close(own_weights, weights, TOLERANCE)
    assert max(weights[key].abs().max() for key in weights if ".lora_B." in key) > 100 * TOLERANCE


def tensors_in(path: Path) -> list[torch.Tensor]:
    def walk(value):
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, dict):
            for each in value.values():
                yield from walk(each)
        elif isinstance(value, (list, tuple)):
            for each in value:
                yield from walk(each)

    return list(walk(torch.load(path, map_location="cpu", weights_only=False)))
