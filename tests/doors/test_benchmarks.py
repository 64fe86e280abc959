import json
import subprocess
import sys
from pathlib import Path

import common
import compress
import compression_step
import generate
import joint_step
import pytest
import torch

from modeling_clara import loss_clara
from modeling_clara.adapters_clara import lora_layers


def arguments(kind, **settings):
    return kind(shape="tiny", device="cpu", repeats=1, **settings)


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    monkeypatch.setitem(common.SHAPES, "tiny", {**shape, "num_key_value_heads": 2, "vocab_size": 32000})


def test_documents_have_natural_lengths_within_bounds():
    lengths = torch.tensor([len(text.split()) for text in common.natural_documents(2000)])
    assert lengths.min() == 30 and lengths.max() == 256
    assert 115 < lengths.double().mean() < 123 and lengths.double().std() > 40


def test_all_ways_to_compress_give_the_same_memories():
    args = arguments(compress.CompressArguments, documents=6, batch_size=4)
    model = common.build_model(args)
    ours, *others = (run() for run in compress.make_variants(model, args).values())
    assert len(others) == 5 and ours.shape == (6, 16, 32)
    for theirs in others:
        torch.testing.assert_close(theirs, ours, atol=1e-4, rtol=1e-4)


def without_dropout(model):
    for layer in lora_layers(model.decoder):
        layer.lora_dropout.clear()
        layer.lora_dropout.update({name: torch.nn.Identity() for name in layer.lora_A})


def losses_of(variants, trainers, monkeypatch):
    """What each variant's step has as its loss, with the weights as they are."""
    losses = []
    backward = torch.Tensor.backward
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "backward", lambda loss: losses.append(loss.detach()) or backward(loss))
        for trainer in trainers:
            patch.setattr(trainer.optimizer, "step", lambda: None)
        for run in variants.values():
            run()
    return torch.stack(losses)


def test_all_joint_steps_have_the_same_loss_and_cached_ones_the_least_work(tmp_path, monkeypatch):
    args = arguments(joint_step.StepArguments, batch_size=2, candidates=6)
    variants = joint_step.make_variants(args, str(tmp_path))
    assert list(variants) == ["cached", "cached, all logits", "online", "online, all logits", "as released"]
    trainers = [variants[name].args[0] for name in ("cached", "online")]
    without_dropout(trainers[0].model)
    losses = losses_of(variants, trainers, monkeypatch)
    # Stored memories are rounded to half precision.
    torch.testing.assert_close(losses, losses[0].expand(5), atol=2e-3, rtol=0)
    flops = {name: common.count_flops(run) for name, run in variants.items()}
    assert flops["cached"] < flops["cached, all logits"] < flops["online, all logits"] < flops["as released"]
    assert flops["cached"] < flops["online"] < flops["online, all logits"]


@pytest.mark.parametrize("stage", ["scp", "instruct"])
def test_all_steps_that_train_the_compressor_have_the_same_loss(stage, tmp_path, monkeypatch):
    monkeypatch.setattr(loss_clara, "MOST_LOGITS", 2**18)  # of eight labels
    args = arguments(compression_step.StepArguments, stage=stage, batch_size=3, documents=2)
    variants = compression_step.make_variants(args, str(tmp_path))
    trainer = variants["step"].args[0]
    without_dropout(trainer.model)
    losses = losses_of(variants, [trainer], monkeypatch)
    torch.testing.assert_close(losses, losses[0].expand(8), atol=1e-4, rtol=0)
    flops = {name: common.count_flops(run) for name, run in variants.items()}
    assert flops["step"] <= flops["last layer whole"] < flops["padded to the longest"] < flops["as released"]
    # These rows of the first stage have labels at more than READS_UP_TO of their positions.
    assert (flops["step"] == flops["last layer whole"]) == (stage == "scp")
    assert flops["step"] == flops["all logits at once"]
    assert flops["step"] < flops["checkpointing but attention"] <= flops["checkpointing"]


def test_answers_have_the_asked_for_length_in_every_variant(monkeypatch):
    args = arguments(generate.GenerateArguments, batch_size=2, documents=3, new_tokens=4)
    lengths = []
    variants = generate.make_variants(args)
    decoder = variants["memories"].args[0].decoder
    whole = decoder.generate

    def counting(**options):
        sequences = whole(**options)
        lengths.append(sequences.shape[1] - (options["input_ids"].shape[1] if "input_ids" in options else 0))
        return sequences

    monkeypatch.setattr(decoder, "generate", counting)
    for run in variants.values():
        run()
    assert lengths == [4] * (3 + 2 * args.batch_size)


@pytest.mark.parametrize("keeps", [True, pytest.param(False, marks=pytest.mark.long)])
def test_peak_memory_counts_what_a_run_holds_and_not_what_was_before(keeps):
    """Also where the process keeps what it frees, as every program of ours does."""
    code = f"""
import torch
import common
from clara_hf.program.machine import keep_freed_memory

if {keeps}:
    keep_freed_memory()
torch.ones(64 * 2**20).sum()
found = common.peak_memory(lambda: torch.ones(32 * 2**20).sum(), "cpu")
print(found["peak"] - found["before"])
"""
    folder = Path(common.__file__).parent
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=folder)
    assert 0.9 * 128 * 2**20 < int(done.stdout) < 1.5 * 128 * 2**20


def test_unknown_settings_are_refused_by_name():
    with pytest.raises(ValueError, match="shape is 'huge'"):
        common.BenchmarkArguments(shape="huge")
    with pytest.raises(ValueError, match="clock is 'sun'"):
        common.BenchmarkArguments(clock="sun")
    with pytest.raises(ValueError, match="variant is 'none'"):
        common.run_benchmark("", arguments(common.BenchmarkArguments, variants="some; none"), [], {"some": print})
    with pytest.raises(ValueError, match="variant is 'none'"):
        common.run_benchmark("", arguments(common.BenchmarkArguments, variant="none"), [], {"some": print})


def test_two_variants_of_a_run_are_compared_in_a_sentence():
    rows = {
        "a": {"speed_over_reference": 6.0, "peak_memory_bytes": 10},
        "b": {"speed_over_reference": 1.5, "peak_memory_bytes": 40},
    }
    told = common.against({"variants": rows}, "a", "b")
    assert told == "a against b: 4.0 times the speed, 0.25 of the peak memory."


@pytest.mark.long
def test_a_benchmark_prints_a_table_and_writes_its_figures(tmp_path, capsys, monkeypatch):
    output = tmp_path / "runs" / "benchmarks" / "compress.json"
    settings = ["--documents", "4", "--batch_size", "2"]
    monkeypatch.setattr("sys.argv", ["compress.py"])
    monkeypatch.chdir(tmp_path)
    compress.main(["--shape", "tiny", "--device", "cpu", "--repeats", "1", *settings])
    figures = json.loads(output.read_text())
    ours, theirs = figures["variants"]["compress"], figures["variants"][figures["reference"]]
    assert theirs["speed_over_reference"] == theirs["peak_memory_over_reference"] == 1
    assert ours["flop"] < theirs["flop"] and ours["peak_memory_bytes"] < theirs["peak_memory_bytes"]
    assert ours["flop_per_second"] / figures["matmul_flop_per_second"] == pytest.approx(ours["share_of_matmul_rate"])
    assert "| compress |" in capsys.readouterr().out
    assert not list(output.parent.glob("*.unfinished"))


def test_growth_is_measured_for_every_verb_and_drawn(tmp_path, monkeypatch, capsys):
    for name, values in {"DOCUMENTS": (4, 8, 16), "STORES": (8, 16), "QUESTIONS": (1, 2, 3)}.items():
        monkeypatch.setattr(joint_step, name, values)
    figures, plot = tmp_path / "growth.json", tmp_path / "growth.svg"
    options = [
        "--growth",
        str(plot),
        "--output",
        str(figures),
        "--candidates",
        "3",
        "--repeats",
        "1",
        "--device",
        "cpu",
    ]
    joint_step.main(["--shape", "tiny", *options])
    found = json.loads(figures.read_text())
    assert {verb: len(rows) for verb, rows in found.items()} == {"compress": 3, "add": 3, "joint step": 6, "answer": 6}
    assert all(row["seconds"] > 0 for rows in found.values() for row in rows)
    told = capsys.readouterr().out.splitlines()
    assert len(told) == 6 and told[0].startswith("compress: ") and "ms per document" in told[0]
    assert all(verb in plot.read_text() for verb in found) and plot.stat().st_size < 100_000


def test_a_line_is_found_with_its_constant():
    rows = [{"questions": count, "seconds": 0.25 + 0.5 * count} for count in (1, 4, 16)]
    start, slope, error = joint_step.linear(rows, "questions")
    assert (start, slope) == pytest.approx((0.25, 0.5)) and error < 1e-9
