"""The whole demo in a shrunken form: interrupted once, called again, then reused."""

import json
import warnings

import pytest
from transformers import Trainer

from clara_hf.program import UsageError
from recipes.nano import demo, world


SYSTEMS = {"clara", "clara-before-joint", "sup", "bm25", "gold", "text-gold", "no-memory", "wrong-memory"}


@pytest.fixture
def small_world(monkeypatch):
    kinds = {"person": 24, "place": 12, "company": 12, "work": 12}
    monkeypatch.setattr(world, "ENTITIES", {split: kinds for split in world.SPLITS})
    sizes = {"instruct_train": 24, "joint_train": 24, "test": 10, "validation": 6}
    monkeypatch.setattr(world, "QUESTIONS", sizes)


def test_demo_is_interrupted_goes_on_and_is_reused(small_world, base, tmp_path, monkeypatch, capsys, caplog):
    out = tmp_path / "nano"
    arguments = ["--output_dir", str(out), "--start", base, "--base", base, "--max_steps", "2", "--limit", "8"]
    original, calls = Trainer.training_step, []

    def interrupted(self, *args, **kwargs):
        calls.append(1)
        if len(calls) == 4:  # the second step of the second stage
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Trainer, "training_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        demo.main(arguments)
    assert (out / "scp" / "config.json").exists() and not (out / "instruct" / "config.json").exists()
    assert not (out / "results.json").exists()

    assert (
        f"[1/7] Data: documents about an invented world, and questions over them\n{out / 'data'} holds the data.\n"
        in (capsys.readouterr().out)
    )
    with warnings.catch_warnings(record=True) as told:
        demo.main(arguments)
    assert not [one for one in told if "gradient_checkpointing" in str(one.message)]
    printed = capsys.readouterr().out
    assert f"{out / 'data'} holds the data already: they are reused." in printed
    assert "clara-before-joint" in printed and "reused" in caplog.text
    results = json.loads((out / "results.json").read_text())
    systems = results["datasets"]["test"]["systems"]
    assert set(systems) == SYSTEMS
    for metrics in systems.values():
        assert {"value", "low", "high", "n"} <= set(metrics["f1"])
        assert all(
            0 <= m["low"] <= m["value"] <= m["high"] <= 1 and m["n"] == 8 for m in (metrics["f1"], metrics["em"])
        )
    assert {"recall@1", "recall@5"} <= set(systems["clara"]) & set(systems["bm25"])
    assert {"scp", "joint", "evaluation"} <= set(results["stage_seconds"])
    for name in ("table.md", "joint.png", "losses.png"):
        assert (out / name).stat().st_size > 100
    assert "'eval_loss'" in (out / demo.LOG).read_text() and "'eval_loss'" not in printed

    # 2 steps of SCP, 1 + the interrupted one, 1 resumed, 2 each of joint, contrastive and text.
    steps = len(calls)
    demo.main(arguments)
    assert len(calls) == steps
    assert json.loads((out / "results.json").read_text())["datasets"]["test"]["systems"] == systems

    # Another limit evaluates anew, and the stages are reused.
    demo.main([*arguments, "--limit", "6"])
    fewer = json.loads((out / "results.json").read_text())
    assert len(calls) == steps and {
        metrics["f1"]["n"] for metrics in fewer["datasets"]["test"]["systems"].values()
    } == {6}

    with pytest.raises(UsageError, match="other settings"):
        demo.main([*arguments, "--max_steps", "3"])


def test_demo_leaves_a_foreign_folder_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    for option in ([], ["--overwrite", "true"]):
        with pytest.raises(UsageError, match="something else"):
            demo.main(["--output_dir", str(tmp_path), *option])
    assert (tmp_path / "notes.txt").read_text() == "mine"
