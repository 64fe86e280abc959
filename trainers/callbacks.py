"""What is measured and watched while a stage trains: loss parts, retrieval, speed, memory, gradients, divergence."""

import json
import os
import sys
import time
from collections import defaultdict
from pathlib import Path

import torch
from accelerate.utils import DistributedType, gather_object
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from modeling_clara.modeling_clara import MEMORY_EMBEDDINGS


LOG_FILE = "log.jsonl"
DIVERGED_FILE = "diverged.json"


class DivergedError(ValueError):
    """Loss or gradients are no longer finite; the message says where the batch is written down."""


class LocalLog(TrainerCallback):
    """Appends every logged row to `log.jsonl` in the output folder: a tracker that needs no account and no package.

    A resumed run goes on in the same file, without the rows after the checkpoint that it resumes from.
    """

    def on_train_begin(self, args, state, control, **kwargs):
        path = Path(args.output_dir, LOG_FILE)
        if not state.is_world_process_zero or not path.exists():
            return
        kept = [line for line in path.read_text(encoding="utf-8").splitlines() if _step_of(line) <= state.global_step]
        beside = path.with_name(path.name + ".partial")
        beside.write_text("".join(line + "\n" for line in kept if state.global_step), encoding="utf-8")
        os.replace(beside, path)

    def on_log(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            os.makedirs(args.output_dir, exist_ok=True)
            with open(Path(args.output_dir, LOG_FILE), "a", encoding="utf-8") as file:
                # Not the callback's `logs`, which the console's callback takes values out of.
                file.write(json.dumps(state.log_history[-1]) + "\n")


def _step_of(line: str) -> float:
    """The step of a row; infinity for one whose writing was cut off."""
    try:
        return json.loads(line)["step"]
    except ValueError:
        return float("inf")


class TrainingWatch(TrainerCallback):
    """Gathers what a stage logs beside its loss, and stops a run that diverges.

    Logged, over the steps since the last log and over all processes: the means that the trainer `add`s; gradient norms
    of the parts that train, before clipping (under DeepSpeed, which gathers gradients for that, those of the logged
    step alone, and none with fp16, where they are scaled); tokens and documents per second, without evaluation and
    saving; the peak memory of the fullest process in GiB.

    Args:
        trainer ([`~trainers.trainer.CLaRaTrainer`]): whose steps are watched.
    """

    def __init__(self, trainer):
        self.trainer = trainer
        self._sums: dict[str, list] = defaultdict(lambda: [0.0, 0.0])
        self._batches: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._norms: dict[str, torch.Tensor] = {}
        self._clipping: torch.Tensor | float = 1.0
        self._seconds, self._mark = 0.0, time.perf_counter()

    def add(self, name: str, total: torch.Tensor | float, count: torch.Tensor | float) -> None:
        """Count into the mean `name`. Every process adds the same names, with a count of 0 where it has nothing."""
        sums = self._sums[name]
        sums[0], sums[1] = sums[0] + total, sums[1] + count

    def add_batch(self, inputs: dict[str, torch.Tensor]) -> None:
        """Count a batch's tokens, and its distinct documents."""
        tokens = sum(value.sum() for name, value in inputs.items() if name.endswith("attention_mask"))
        documents = next((inputs[name] for name in ("memories", "document_input_ids") if name in inputs), ())
        self.add("tokens_per_second", tokens, 0.0)
        self.add("documents_per_second", len(documents), 0.0)

    def note_step(self, loss: torch.Tensor, rows: torch.Tensor) -> None:
        """Remember a micro-batch's loss and rows until its optimizer step has been checked."""
        self._batches.append((loss, rows))

    def note_clipping(self, norm: torch.Tensor | float | None) -> None:
        """Remember by what a step's gradients were multiplied, whose `norm` before that is given."""
        if norm is not None:
            self._clipping = clipping_factor(norm, self.trainer.args.max_grad_norm)

    def take(self) -> dict[str, float]:
        """The means since the last call, over all processes, which must call together."""
        accelerator = self.trainer.accelerator
        values = [float(value) for name in sorted(self._sums) for value in self._sums[name]]
        vector = torch.tensor([*values, self._seconds, peak_memory(accelerator.device)], device=accelerator.device)
        table = accelerator.gather(vector.unsqueeze(0)).cpu().double()
        totals = table.sum(dim=0).tolist()
        seconds, memory = totals[-2] / len(table), table[:, -1].max().item()
        found = {}
        for place, name in enumerate(sorted(self._sums)):
            total, count = totals[2 * place : 2 * place + 2]
            count = seconds if name.endswith("_per_second") else count
            if count > 0:
                found[name] = total / count
        self._sums.clear()
        self._seconds = 0.0
        return {**found, "peak_memory_gib": memory / 2**30}

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            Path(args.output_dir, DIVERGED_FILE).unlink(missing_ok=True)
        model = self.trainer.model
        parts = [*model.adapter_names, MEMORY_EMBEDDINGS]
        self._parts = {part: [p for p in model.part_parameters(part) if p.requires_grad] for part in parts}
        if self.trainer.accelerator.distributed_type == DistributedType.DEEPSPEED and not args.fp16:
            self._measure_before_steps(args, state)
        self._mark = time.perf_counter()

    def _measure_before_steps(self, args, state) -> None:
        """Have DeepSpeed's engine, which frees gradients in its step, read their norms before a step that is logged."""
        from deepspeed.utils import safe_get_full_grad

        engine, step = self.trainer.model_wrapped, self.trainer.model_wrapped.step

        def measured_step(*arguments, **options):
            if (state.global_step + 1) % state.logging_steps == 0:
                norms = {
                    part: torch.stack([safe_get_full_grad(parameter).float().norm() for parameter in parameters]).norm()
                    for part, parameters in self._parts.items()
                    if parameters
                }
                for part, norm in norms.items():
                    self._note_norm(part, norm)
            return step(*arguments, **options)

        engine.step = measured_step

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        for part, parameters in self._parts.items():
            gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
            if gradients:
                norm = torch.nn.utils.get_total_norm(gradients)
                self._note_norm(part, whole(norm) / self._clipping)

    def _note_norm(self, part: str, norm: torch.Tensor) -> None:
        self._norms[part] = norm
        self.add(f"grad_norm_{part}", norm, 1.0)

    def on_step_end(self, args, state, control, **kwargs):
        now = time.perf_counter()
        self._seconds, self._mark = self._seconds + now - self._mark, now
        try:
            self._check_step(args, state)
        finally:
            self._batches, self._norms, self._clipping = [], {}, 1.0

    def on_evaluate(self, args, state, control, **kwargs):
        self._mark = time.perf_counter()

    def on_save(self, args, state, control, **kwargs):
        self._mark = time.perf_counter()

    def _check_step(self, args, state) -> None:
        """Raise, in all processes alike and before anything is saved, if the step's loss or gradients are not finite.

        Trainer hides such losses from its log.
        """
        accelerator = self.trainer.accelerator
        watched = [loss.detach().float() for loss, _ in self._batches]
        if not args.fp16:  # whose scaler meets overflowing gradients as a matter of course
            watched += [norm.float() for norm in self._norms.values()]
            if accelerator.distributed_type == DistributedType.DEEPSPEED:
                norm = self.trainer.model_wrapped.get_global_grad_norm()
                watched.append(torch.as_tensor(0.0 if norm is None else norm, device=accelerator.device).float())
        is_bad = ~torch.stack([value.to(accelerator.device) for value in watched]).isfinite().all()
        if accelerator.reduce(is_bad.float(), reduction="sum").item() == 0:
            return
        batches = gather_object(
            [
                {"process": accelerator.process_index, "loss": float(loss), "rows": rows.tolist()}
                for loss, rows in self._batches
            ]
        )
        path = Path(args.output_dir, DIVERGED_FILE)
        bad = [batch for batch in batches if not torch.tensor(batch["loss"]).isfinite()]
        if state.is_world_process_zero:
            self._write(path, state, batches, bad or batches)
        accelerator.wait_for_everyone()
        what = f"the loss is {bad[0]['loss']}" if bad else "the gradients are not finite"
        last = get_last_checkpoint(args.output_dir)
        raise DivergedError(
            f"Training diverged: {what} at step {state.global_step}, whose rows are in {path}; look at them, or lower "
            f"learning_rate. " + _way_on(last)
        )

    def _write(self, path: Path, state, batches: list[dict], bad: list[dict]) -> None:
        """Loss values go in as text: JSON knows no NaN."""
        rows = [row for batch in bad for row in batch["rows"]]
        data = self.trainer.train_rows
        found = {
            "step": state.global_step,
            "epoch": state.epoch,
            "loss": str(bad[0]["loss"]),
            "rows": rows,
            "ids": data[rows]["id"] if "id" in data.column_names else None,
            "grad_norms": {part: str(norm.item()) for part, norm in self._norms.items()},
            "batches": [{**batch, "loss": str(batch["loss"])} for batch in batches],
        }
        beside = path.with_name(path.name + ".partial")
        beside.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
        os.replace(beside, path)


def _way_on(checkpoint: str | None) -> str:
    if checkpoint is None:
        return "No checkpoint was saved before."
    return (
        f"The last checkpoint before that step is {checkpoint}: to train on from it with other arguments, pass "
        f"--model_name_or_path {checkpoint} and another --output_dir."
    )


def clipping_factor(norm: torch.Tensor | float, max_norm: float) -> torch.Tensor | float:
    """What [`torch.nn.utils.clip_grad_norm_`] multiplies gradients of this `norm` with; 1 where it is not finite."""
    norm = whole(norm)
    factor = (max_norm / (torch.as_tensor(norm).float() + 1e-6)).clamp(max=1.0)
    return factor if factor > 0 else 1.0


def whole(norm: torch.Tensor | float) -> torch.Tensor | float:
    return norm.full_tensor() if isinstance(norm, DTensor) else norm


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that this process has held on its accelerator, or in main memory where there is none."""
    if device.type not in ("cpu", "mps"):
        return torch.get_device_module(device).max_memory_allocated(device)
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
