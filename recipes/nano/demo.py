"""The whole of CLaRa on the nano world: SCP, instruction tuning, joint training, evaluation, one table.

    make demo                                  # or: python recipes/nano/demo.py
    python recipes/nano/demo.py --output_dir runs/quick --max_steps 20 --limit 50

A second call goes on where an interrupted one stopped, and says what it reuses. `--overwrite true` starts again.
"""

import contextlib
import shutil
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import world
from datasets import disable_progress_bars
from tqdm.auto import tqdm
from transformers.utils import logging

from clara_hf.evaluation.results import Results
from clara_hf.evaluation.run import EvalSettings
from clara_hf.evaluation.run import run as evaluate
from clara_hf.program import UsageError, option, parse, read_json, run_program, stages, text_lora, write_json
from clara_hf.program.machine import choose_threads
from clara_hf.program.training import TRAINER_STATE_NAME


matplotlib.use("Agg")
from matplotlib import pyplot as plt  # noqa: E402 (after the backend is chosen)


NANO = Path(__file__).resolve().parent
STAGES = {
    "scp": stages.scp,
    "instruct": stages.instruct,
    "joint": stages.joint,
    "contrastive": stages.contrastive,
    "text-lora": text_lora.main,
}
TITLES = {
    "data": "Data: documents about an invented world, and questions over them",
    "scp": "SCP: learning to compress",
    "instruct": "Instruction tuning: answering from given memories",
    "joint": "Joint training: retrieval learned from answers alone",
    "contrastive": "Supervised baseline: the same retriever, learned from relevance labels",
    "text-lora": "Baseline: the plain base on raw text, with a LoRA of its own",
    "evaluation": "Evaluation on questions over unseen documents",
}
SECONDS_FILE = "seconds.json"
LOG = "demo.log"


@dataclass
class DemoArguments:
    """Settings of the demo; the stages' own are in the YAML files beside it."""

    output_dir: str = option("runs/nano", "Folder of data, checkpoints and results.")
    start: str = option(str(NANO / "pretrained" / "scp"), "CLaRa checkpoint, or decoder, that SCP starts from.")
    base: str = option(str(NANO / "pretrained" / "base"), "Decoder of the raw-text baseline.")
    joint_start: str = option(
        "scp", "Stage that joint training and its supervised baseline start from.", choices=["scp", "instruct"]
    )
    max_steps: int | None = option(None, "Steps of every stage, for a quick look.")
    limit: int | None = option(None, "Test questions to take, for a quick look.")
    overwrite: bool = option(False, "Start again: delete what the folder holds.")


def stage_arguments(args: DemoArguments, stage: str) -> list[str]:
    """The command line of one stage: its YAML, with the folders of this demo."""
    out = Path(args.output_dir)
    start = {"scp": args.start, "instruct": out / "scp", "text-lora": args.base}.get(stage, out / args.joint_start)
    data = {"text-lora": "instruct", "contrastive": "joint"}.get(stage, stage)
    values = {
        "config": NANO / f"{stage.replace('-', '_')}.yaml",
        "output_dir": out / stage,
        "train_file": out / "data" / f"{data}_train.jsonl",
        "model_name_or_path": start,
        "resume": True,
    }
    if stage == "scp":
        values["prompts_file"] = NANO / "pretrained" / "prompts.json"
    if stage == "text-lora":
        values["clara_checkpoint"] = out / "instruct"
    else:
        values["validation_file"] = out / "data" / f"{data}_validation.jsonl"
    if stage in ("joint", "contrastive"):
        values["memory_store"] = out / "memories"
    if args.max_steps is not None:
        values["max_steps"] = args.max_steps
        values["save_steps"] = max(1, args.max_steps // 2)
        if stage != "text-lora":
            values["eval_steps"] = max(1, args.max_steps // 2)
            values["validation_limit"] = 16
    return [text for name, value in values.items() for text in (f"--{name}", str(value))]


def timed(out: Path, name: str, work) -> None:
    """Run `work` and add its seconds to those that earlier, interrupted calls spent on `name`."""
    path = out / SECONDS_FILE
    spent = read_json(path) if path.exists() else {}
    began = time.perf_counter()
    try:
        work()
    finally:
        write_json(path, {**spent, name: round(spent.get(name, 0.0) + time.perf_counter() - began, 1)})


def training_log(folder: Path) -> list[dict]:
    return read_json(folder / TRAINER_STATE_NAME)["log_history"]


def plot_losses(out: Path) -> None:
    """`losses.png`: training loss over the steps of each stage."""
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.2), layout="constrained")
    for axis, stage in zip(axes, ("scp", "instruct", "joint"), strict=True):
        rows = [row for row in training_log(out / stage) if "loss" in row]
        axis.plot([row["step"] for row in rows], [row["loss"] for row in rows], color="black", label="loss")
        mse = [row for row in rows if "mse_loss" in row]
        if mse:
            values = [row["mse_loss"] for row in mse]
            axis.plot(
                [row["step"] for row in mse], values, color="tab:blue", linestyle="--", label="MSE term, unweighted"
            )
            axis.legend(frameon=False)
        axis.set(title=stage, xlabel="step", ylabel="loss", ylim=(0, None))
        axis.grid(alpha=0.3)
    figure.savefig(out / "losses.png", dpi=150)
    plt.close(figure)


def plot_joint(out: Path) -> None:
    """`joint.png`: Recall@5 and answer F1 on validation questions over the steps of joint training."""
    rows = [row for row in training_log(out / "joint") if "eval_f1" in row]
    figure, axis = plt.subplots(figsize=(6, 3.6), layout="constrained")
    curves = {"eval_recall@5": ("Recall@5", "o-"), "eval_recall@1": ("Recall@1", "^:"), "eval_f1": ("answer F1", "s--")}
    for name, (label, style) in curves.items():
        points = [(row["step"], 100 * row[name]) for row in rows if name in row]
        if points:
            axis.plot(*zip(*points, strict=True), style, label=label, markersize=4)
    axis.set(xlabel="joint training step", ylabel="percent of validation questions", ylim=(0, 102))
    axis.set_title("Retrieval learned from the answers' loss alone")
    axis.grid(alpha=0.3)
    axis.legend(frameon=False, loc="lower right")
    figure.savefig(out / "joint.png", dpi=150)
    plt.close(figure)


def evaluate_nano(args: DemoArguments) -> Results:
    """Evaluate every system on the test questions; writes predictions, `table.md` and `results.json`.

    Results with other settings, as of another `limit`, are replaced.
    """
    out = Path(args.output_dir)
    settings = EvalSettings(
        data=str(out / "data" / "test.jsonl"),
        model=str(out / "joint"),
        before_joint=str(out / args.joint_start),
        sup=str(out / "contrastive"),
        text_model=str(out / "text-lora"),
        output_dir=str(out),
        limit=args.limit,
        batch_size=64,
        max_new_tokens=12,
        overwrite=True,
    )
    return evaluate(settings)


def train_quietly(args: DemoArguments, stage: str) -> None:
    """Train one stage: the terminal shows its bar with the time left, `demo.log` what the Trainer prints."""
    with open(Path(args.output_dir, LOG), "a", encoding="utf-8") as log, contextlib.redirect_stdout(log):
        print(f"\n{TITLES[stage]}")
        STAGES[stage](stage_arguments(args, stage))


def make_data(folder: Path) -> None:
    """Write the data files unless they are there; either is told."""
    wrote = world.ensure(folder, progress=lambda items, name: tqdm(items, desc=f"Writing {name}", leave=False))
    print(f"{folder} holds the data{'' if wrote else ' already: they are reused'}.", flush=True)


def report(out: Path, results: Results) -> None:
    """Print the table and where everything is; add the stages' seconds to `results.json`."""
    spent = read_json(out / SECONDS_FILE)
    write_json(out / "results.json", {**results.data, "stage_seconds": spent})
    print("\n" + results.to_text())
    print("Seconds: " + ", ".join(f"{name} {seconds:.0f}" for name, seconds in spent.items()), end="")
    print(f"; in all {sum(spent.values()):.0f}.")
    print(f"In {out}: results.json, table.md, predictions/, joint.png, losses.png, {LOG};", end="")
    print(f" checkpoints in {', '.join(STAGES)}.")


def main(arguments: list[str] | None = None) -> None:
    args = parse(DemoArguments, arguments, description=__doc__)
    out = Path(args.output_dir)
    if out.exists() and not (out / "demo.json").exists() and {path.name for path in out.iterdir()} - {"data"}:
        raise UsageError(f"output_dir {out} holds something else than this demo: choose another.")
    if args.overwrite and out.exists():
        shutil.rmtree(out)
    out.mkdir(parents=True, exist_ok=True)
    settings = {"max_steps": args.max_steps, "start": args.start, "base": args.base, "joint_start": args.joint_start}
    if (out / "demo.json").exists() and read_json(out / "demo.json") != settings:
        raise UsageError(f"{out} holds a demo with other settings: pass --overwrite true, or another --output_dir.")
    write_json(out / "demo.json", settings)
    # TRL and the YAML use names that newer transformers warn of; older ones know no others.
    warnings.filterwarnings("ignore", message=".*gradient_checkpointing", category=FutureWarning)
    disable_progress_bars()
    logging.disable_progress_bar()
    if threads := choose_threads():
        print(threads, flush=True)
    found = []
    work = {
        "data": lambda: make_data(out / "data"),
        **{stage: lambda stage=stage: train_quietly(args, stage) for stage in STAGES},
        "evaluation": lambda: found.append(evaluate_nano(args)),
    }
    for number, (name, step) in enumerate(work.items(), start=1):
        print(f"\n[{number}/{len(work)}] {TITLES[name]}", flush=True)
        timed(out, name, step)
    plot_losses(out)
    plot_joint(out)
    report(out, found[0])


if __name__ == "__main__":
    run_program(main)
