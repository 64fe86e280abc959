"""Trains tiny models as a job file says, alone or as one of several processes; `test_distributed.py` starts it."""

import contextlib
import json
import os
import signal
import sys
from pathlib import Path

import torch
import yaml
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from datasets import Dataset
from safetensors.torch import save_file
from transformers import TrainerCallback

from modeling_clara import CLaRaForRetrievalGeneration
from trainers import (
    ContrastiveConfig,
    ContrastiveTrainer,
    DROConfig,
    DROTrainer,
    InstructionConfig,
    InstructionTrainer,
    JointConfig,
    JointTrainer,
    SCPConfig,
    SCPTrainer,
)


STAGES = {
    "scp": (SCPTrainer, SCPConfig),
    "instruct": (InstructionTrainer, InstructionConfig),
    "joint": (JointTrainer, JointConfig),
    "contrastive": (ContrastiveTrainer, ContrastiveConfig),
}


class RecordGradients(TrainerCallback):
    """Keeps the whole gradients of the first step, as they are when the optimizer is about to use them."""

    def __init__(self):
        self.gradients: dict[str, torch.Tensor] = {}
        self.trainer = None

    def on_train_begin(self, args, state, control, **kwargs):
        from deepspeed.utils import safe_get_full_grad

        engine, step = self.trainer.model_wrapped, self.trainer.model_wrapped.step

        def recording_step(*arguments, **options):
            for name, parameter in self.trainer.model.named_parameters():
                if parameter.requires_grad:
                    self.gradients[name] = safe_get_full_grad(parameter).cpu().clone()
            engine.step = step
            return step(*arguments, **options)

        engine.step = recording_step


class KillAt(TrainerCallback):
    """Kills this process, as every other one, in the middle of a step."""

    def __init__(self, step: int | None):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if self.step is not None and state.global_step + 1 == self.step:
            os.kill(os.getpid(), signal.SIGKILL)


def shard_on_cpu(path: Path) -> None:
    """Let accelerate do on CPUs what `path`, a configuration for FSDP, asks for: by itself it shards over GPUs only."""
    settings = yaml.safe_load(path.read_text())["fsdp_config"]
    options = {name.removeprefix("fsdp_"): value for name, value in settings.items()}
    options["fsdp_version"], options["cpu_offload"] = options.pop("version"), options.pop("offload_params")
    initialize = AcceleratorState.__init__

    def initialize_sharded(self, *arguments, fsdp_plugin=None, **given):
        initialize(self, *arguments, **given)
        if given.get("_from_accelerator"):
            self.distributed_type = DistributedType.FSDP
            self.fsdp_plugin = FullyShardedDataParallelPlugin(**options)

    AcceleratorState.__init__ = initialize_sharded


def run(job: dict, out: Path) -> None:
    """Train, evaluate and write `<name>.json` (log, metrics) and `<name>.safetensors` (adapters, or gradients)."""
    is_dro = job["stage"] == "dro"
    trainer_class, config_class = (DROTrainer, DROConfig) if is_dro else STAGES[job["stage"]]
    rows = Dataset.from_list(json.loads(Path(job["rows"]).read_text()))
    eval_rows = rows.select(range(11))  # an odd number, for two processes
    args = config_class(output_dir=str(out / job["name"]), **job["arguments"])
    model = job["model"] if is_dro else CLaRaForRetrievalGeneration.from_pretrained(job["model"])
    recorder = RecordGradients()
    trainer = trainer_class(
        model=model,
        args=args,
        train_dataset=rows,
        eval_dataset=eval_rows,
        callbacks=[KillAt(job.get("kill_at")), *([recorder] if job.get("gradients") else [])],
    )
    recorder.trainer = trainer
    trainer.train(resume_from_checkpoint=job.get("checkpoint"))
    if job.get("evaluate"):
        # Answers end at different steps, also in different processes.
        trainer.model.config.eos_token_id = list(range(0, trainer.model.config.vocab_size, 2))
    evaluation = trainer.evaluate() if job.get("evaluate") else {}
    if job.get("save"):
        trainer.save_model(str(out / f"{job['name']}-model"))
    if is_dro:
        tensors = {name: weight.detach() for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    else:
        tensors = recorder.gradients if job.get("gradients") else trainer.model.adapter_state_dict()
    if trainer.is_world_process_zero():
        record = {"log": trainer.state.log_history, "metrics": evaluation, "processes": args.world_size}
        (out / f"{job['name']}.json").write_text(json.dumps(record))
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, out / f"{job['name']}.safetensors")
    trainer.accelerator.wait_for_everyone()


def run_in_job(rank: int, job_file: str) -> None:
    """As `main`, in a process that belongs to a job already; writes what it prints to `stdout<rank>`."""
    with open(Path(job_file).with_name(f"stdout{rank}"), "w") as stdout, contextlib.redirect_stdout(stdout):
        main(job_file)


def main(job_file: str) -> None:
    request = json.loads(Path(job_file).read_text())
    if request.get("fsdp"):
        shard_on_cpu(Path(request["fsdp"]))
    for job in request["jobs"]:
        run(job, Path(request["out"]))
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
