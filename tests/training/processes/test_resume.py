"""A run that is killed goes on to the numbers of an uninterrupted one, and never from half a checkpoint."""

import json
import random
import signal
from pathlib import Path

import pytest
import torch
from conftest import TEXTS, build_clara
from processes import in_process, killed_at
from safetensors.torch import load_file
from test_trainers import QUESTIONS, SCP_ROWS, make_trainer
from transformers.trainer_utils import get_last_checkpoint

from clara_hf.program import UsageError
from clara_hf.program.training import is_finished, last_complete_checkpoint, save_stage
from recipes import joint, scp
from trainers import checkpoints


STEPS, SAVE_STEPS, ACCUMULATED = 10, 3, 2
RECIPES = {"scp": (scp, SCP_ROWS), "joint": (joint, QUESTIONS)}


@pytest.fixture(scope="module")
def model(base, tmp_path_factory) -> str:
    folder = str(tmp_path_factory.mktemp("start"))
    build_clara(base, lora_dropout=0.1).save_pretrained(folder)
    return folder


def write_config(stage: str, model: str, folder: Path) -> list[str]:
    """Arguments of a recipe in which everything that must be restored takes part: dropout, accumulation, schedule."""
    data = folder / "train.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in RECIPES[stage][1]))
    values = {
        "model_name_or_path": model,
        "train_file": str(data),
        "max_steps": STEPS,
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": ACCUMULATED,
        "learning_rate": 1e-2,
        "save_strategy": "steps",
        "save_steps": SAVE_STEPS,
        "logging_steps": 1,
        "use_cpu": True,
        "disable_tqdm": True,
    }
    (folder / "config.yaml").write_text(json.dumps(values))
    return ["--config", str(folder / "config.yaml"), "--output_dir"]


def outcome(folder: Path) -> tuple[list[dict], dict[str, torch.Tensor]]:
    log = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    names = ("step", "loss", "grad_norm", "learning_rate", "mse_loss")
    steps = [{name: row[name] for name in names if name in row} for row in log if "loss" in row]
    return steps, load_file(folder / "model.safetensors")


def assert_same_outcome(whole: Path, resumed: Path) -> None:
    (expected_log, expected), (found_log, found) = outcome(whole), outcome(resumed)
    assert [row["step"] for row in found_log] == list(range(1, STEPS + 1))
    assert found_log == expected_log
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)
    assert not (resumed / checkpoints.PARTIAL_FOLDER).exists()


@pytest.mark.slow
@pytest.mark.parametrize("stage", RECIPES)
def test_run_killed_at_a_random_step_resumes_bit_for_bit(stage, model, tmp_path):
    arguments = write_config(stage, model, tmp_path)
    micro_batch = random.SystemRandom().randrange(ACCUMULATED * SAVE_STEPS + 1, ACCUMULATED * STEPS + 1)
    killed = [*arguments, str(tmp_path / "killed")]
    recipe, _ = RECIPES[stage]
    step = ("transformers.Trainer", "training_step", micro_batch)
    assert in_process(killed_at, tmp_path, *step, recipe.main, killed) == -signal.SIGKILL
    recipe.main([*arguments, str(tmp_path / "killed"), "--resume", "true"])
    recipe.main([*arguments, str(tmp_path / "whole")])
    assert_same_outcome(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.slow
def test_run_killed_while_it_saves_resumes_from_the_checkpoint_before(model, tmp_path):
    arguments = write_config("scp", model, tmp_path)
    # Each checkpoint calls torch.save for its arguments, optimizer, scheduler and random states.
    killed = [*arguments, str(tmp_path / "killed")]
    assert in_process(killed_at, tmp_path, "torch", "save", 6, scp.main, killed) == -signal.SIGKILL
    partial = tmp_path / "killed" / checkpoints.PARTIAL_FOLDER / "checkpoint-6"
    assert (partial / "model.safetensors").exists() and not (partial / "trainer_state.json").exists()
    assert get_last_checkpoint(str(tmp_path / "killed")) == str(tmp_path / "killed" / "checkpoint-3")
    scp.main([*arguments, str(tmp_path / "killed"), "--resume", "true"])
    scp.main([*arguments, str(tmp_path / "whole")])
    assert_same_outcome(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.parametrize("where", ["_save_optimizer_and_scheduler", "_save_rng_state", "put_in_place"])
def test_checkpoint_appears_only_when_it_is_whole(where, base, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def kill(*arguments, **options):
        raise Killed

    owner = checkpoints if where == "put_in_place" else checkpoints.CheckpointTrainer
    trainer = make_trainer("scp", base, tmp_path, max_steps=2, save_strategy="steps", save_steps=1)
    monkeypatch.setattr(owner, where, kill)
    with pytest.raises(Killed):
        trainer.train()
    assert get_last_checkpoint(str(tmp_path)) is None
    monkeypatch.undo()
    make_trainer("scp", base, tmp_path, max_steps=2, save_strategy="steps", save_steps=1).train()
    assert sorted(path.name for path in tmp_path.glob("checkpoint*")) == ["checkpoint-1", "checkpoint-2"]


def test_a_run_killed_behind_its_last_checkpoint_trains_no_step_more(base, tmp_path):
    options = {"max_steps": 2, "save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "constant"}
    make_trainer("scp", base, tmp_path, **options).train()
    resumed = make_trainer("scp", base, tmp_path, **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    saved = load_file(tmp_path / "checkpoint-2" / "model.safetensors")
    state = resumed.model.adapter_state_dict()
    assert resumed.state.global_step == 2 and all(torch.equal(saved[key], state[key]) for key in saved)


def test_checkpoint_replaces_a_broken_one_of_its_step(base, tmp_path):
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / "model.safetensors").write_bytes(b"cut off")
    make_trainer("scp", base, tmp_path, max_steps=1, save_strategy="steps", save_steps=1).train()
    assert load_file(tmp_path / "checkpoint-1" / "model.safetensors")


def test_checkpoints_are_adapter_only_and_the_final_model_is_as_configured(base, tmp_path):
    from modeling_clara import CLaRaForRetrievalGeneration

    trainer = make_trainer("scp", base, tmp_path, max_steps=2, save_strategy="steps", save_steps=2)
    trainer.train()
    trainer.save_model(str(tmp_path / "final"))
    half, final = (load_file(tmp_path / name / "model.safetensors") for name in ("checkpoint-2", "final"))
    assert not any("base_layer" in key for key in half) and any("base_layer" in key for key in final)
    assert trainer.model.config.checkpoint_format == "full"
    loaded = CLaRaForRetrievalGeneration.from_pretrained(tmp_path / "checkpoint-2")
    assert torch.equal(loaded.compress(TEXTS[:2]), trainer.model.compress(TEXTS[:2]))
    optimizer = torch.load(tmp_path / "checkpoint-2" / "optimizer.pt", weights_only=True)
    trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
    assert len(optimizer["state"]) == len(trained)


def test_best_checkpoint_is_kept_and_loaded(base, tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    trainer = make_trainer(
        "scp",
        base,
        tmp_path,
        eval_rows=SCP_ROWS.select(range(4)),
        max_steps=4,
        save_total_limit=2,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        # The later, the worse: the first checkpoint stays the best.
        greater_is_better=True,
        **options,
    )
    trainer.train()
    losses = [row["eval_loss"] for row in trainer.state.log_history if "eval_loss" in row]
    best = 1 + max(range(4), key=losses.__getitem__)
    assert trainer.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {f"checkpoint-{best}", "checkpoint-4"}
    kept = load_file(tmp_path / f"checkpoint-{best}" / "model.safetensors")
    state = trainer.model.adapter_state_dict()
    assert all(torch.equal(kept[key], state[key]) for key in kept)


def test_a_model_without_the_run_s_state_is_not_taken_for_a_finished_run(base, tmp_path):
    trainer = make_trainer("scp", base, tmp_path, max_steps=1)
    trainer.train()
    trainer.save_model(str(tmp_path))
    assert (tmp_path / "config.json").exists() and not is_finished(tmp_path)
    save_stage(trainer)
    assert is_finished(tmp_path)
    (tmp_path / "final.partial").mkdir()
    assert not is_finished(tmp_path)


def test_checkpoint_of_other_adapters_is_refused(base, tmp_path):
    make_trainer("scp", base, tmp_path, max_steps=1, save_strategy="steps", save_steps=1).train()
    trainer = make_trainer("joint", base, tmp_path / "joint", max_steps=1)
    with pytest.raises(ValueError, match="query_reasoner"):
        trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))


def test_damaged_checkpoints_are_passed_over_and_those_of_the_model_alone_refused(base, tmp_path):
    make_trainer("scp", base, tmp_path, max_steps=3, save_strategy="steps", save_steps=1).train()
    one, two, three = (tmp_path / f"checkpoint-{step}" for step in (1, 2, 3))
    assert last_complete_checkpoint(tmp_path) == str(three)
    file = three / "optimizer.pt"
    file.write_bytes(file.read_bytes()[:-1000])
    assert last_complete_checkpoint(tmp_path) == str(two)
    file = two / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    assert last_complete_checkpoint(tmp_path) == str(one)
    file = one / "optimizer.pt"
    content = file.read_bytes()
    middle = len(content) // 2
    file.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    with pytest.raises(UsageError, match="no checkpoint in .* is whole: pass --overwrite true"):
        last_complete_checkpoint(tmp_path)
    (three / "optimizer.pt").unlink()
    with pytest.raises(UsageError, match="checkpoint-3 holds the model alone, as with save_only_model"):
        last_complete_checkpoint(tmp_path)


def test_what_a_kill_left_of_a_first_checkpoint_keeps_no_run_from_starting(tmp_path):
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / "adapter_config.json").write_text("{}")
    assert last_complete_checkpoint(tmp_path) is None
    (tmp_path / "checkpoint-1" / "trainer_state.json").touch()
    assert last_complete_checkpoint(tmp_path) is None
