"""Time of one joint training step: memories read from the store against candidates compressed in the step.

    python benchmarks/joint_step.py
    python benchmarks/joint_step.py --model runs/nano/instruct --steps 20 --batch_size 32

Both kinds take the same batches of nano questions with 20 candidates, alternating, forward, backward and optimizer
included, after one step each to warm up. The cached step includes reading the store; filling it once is timed apart.
"""

import resource
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path


ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[0] = str(ROOT)

import torch
from datasets import Dataset
from transformers import HfArgumentParser, set_seed

from recipes.common import load_questions
from recipes.nano import world
from trainers.cli import CLaRaModelArguments, load_model, run, write_json
from trainers.joint import JointConfig, JointTrainer


@dataclass
class BenchmarkArguments:
    """What is measured."""

    model: str = field(default="recipes/nano/pretrained/base", metadata={"help": "CLaRa checkpoint or base decoder."})
    data: str = field(default="runs/nano/data", metadata={"help": "Folder of the nano world's data."})
    steps: int = field(default=10, metadata={"help": "Steps of each kind."})
    batch_size: int = field(default=32, metadata={"help": "Questions per step."})
    output: str | None = field(default=None, metadata={"help": "JSON file for the figures."})


def make_trainer(args: BenchmarkArguments, rows: Dataset, online: bool, folder: str) -> JointTrainer:
    set_seed(0)
    clara = {"doc_max_length": 64, "compression_rate": 16, "query_max_length": 64, "lora_r": 32, "lora_alpha": 64}
    model = load_model(CLaRaModelArguments(args.model, prompts_file="recipes/nano/prompts.json", clara_config=clara))
    config = JointConfig(
        output_dir=folder,
        online=online,
        per_device_train_batch_size=args.batch_size,
        max_steps=args.steps + 1,
        learning_rate=1e-4,
        save_strategy="no",
    )
    trainer = JointTrainer(model=model, args=config, train_dataset=rows)
    trainer.create_optimizer()
    return trainer


def step(trainer: JointTrainer, rows: list[dict]) -> float:
    """Seconds of one training step, data collation included."""
    began = time.perf_counter()
    trainer.model.train()
    inputs = trainer._prepare_inputs(trainer.data_collator(rows))
    trainer.compute_loss(trainer.model, inputs).backward()
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter() - began


def main(arguments: list[str] | None = None) -> None:
    (args,) = HfArgumentParser(BenchmarkArguments).parse_args_into_dataclasses(arguments)
    world.ensure(args.data)
    count = args.batch_size * (args.steps + 1)
    rows = Dataset.from_list(load_questions(str(Path(args.data, "joint_train.jsonl")))[:count])
    seconds: dict[str, list[float]] = {"cached": [], "online": []}
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        trainers = {kind: make_trainer(args, rows, kind == "online", folder) for kind in seconds}
        prepared = time.perf_counter() - began
        for number in range(args.steps + 1):
            chosen = range(number * args.batch_size, min(len(rows), (number + 1) * args.batch_size))
            for kind, trainer in trainers.items():
                taken = step(trainer, [trainer.train_dataset[row] for row in chosen])
                if number:
                    seconds[kind].append(taken)
    medians = {kind: statistics.median(values) for kind, values in seconds.items()}
    figures = {
        "seconds_per_step": medians,
        "online_over_cached": medians["online"] / medians["cached"],
        "preparation_seconds": prepared,
        "peak_rss_gib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "settings": {"batch_size": args.batch_size, "candidates": 20, "steps": args.steps, "model": args.model},
        "threads": torch.get_num_threads(),
    }
    print(
        f"cached {medians['cached']:.3f} s, online {medians['online']:.3f} s per step of {args.batch_size} questions: "
        f"cached is {figures['online_over_cached']:.1f} times faster (medians of {args.steps} steps, one run)."
    )
    if args.output:
        write_json(Path(args.output), figures)


if __name__ == "__main__":
    run(main)
