"""What is measured and watched while a stage trains: loss parts, retrieval, speed, memory, gradients, divergence."""

import json
import math
import os
import sys
import time
from pathlib import Path

import torch
from accelerate.utils import DistributedType, gather_object
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from clara_hf.program.files import write_json, write_text
from modeling_clara.modeling_clara import MEMORY_EMBEDDINGS

from .batches import rows_at


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
        write_text(path, "".join(line + "\n" for line in kept if state.global_step))

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


def count(counters: dict[str, list], name: str, total: torch.Tensor | float, number: torch.Tensor | float) -> None:
    """Count into the mean `name`. Every process counts the same names, with a number of 0 where it has nothing."""
    sums = counters.setdefault(name, [0.0, 0.0])
    sums[0], sums[1] = sums[0] + total, sums[1] + number


def count_batch(counters: dict[str, list], batch: dict[str, torch.Tensor]) -> None:
    """Count a batch's tokens, and its distinct documents, per second."""
    masks = [value for name, value in batch.items() if name.endswith("attention_mask")]
    if not masks:  # rows that are not padded yet
        return
    documents = next((batch[name] for name in ("memories", "document_input_ids") if name in batch), ())
    count(counters, "tokens_per_second", sum(mask.sum() for mask in masks), 0.0)
    count(counters, "documents_per_second", len(documents), 0.0)


def take_means(counters: dict[str, list], seconds: float, accelerator) -> dict[str, float]:
    """What was counted since the last call, over all processes, which must call together: means, what is `per_second`
    of the `seconds` of training, and the peak memory of the fullest process in GiB."""
    names = sorted(counters)
    values = [float(value) for name in names for value in counters[name]]
    vector = torch.tensor([*values, seconds, peak_memory(accelerator.device)], device=accelerator.device)
    table = accelerator.gather(vector.unsqueeze(0)).cpu().double()
    totals = table.sum(dim=0).tolist()
    seconds, memory = totals[-2] / len(table), table[:, -1].max().item()
    found = {}
    for name, total, number in zip(names, totals[0:-2:2], totals[1:-2:2], strict=True):
        number = seconds if name.endswith("_per_second") else number
        if number > 0:
            found[name] = total / number
    counters.clear()
    return {**found, "peak_memory_gib": memory / 2**30}


class TrainingClock(TrainerCallback):
    """Seconds of training, without evaluation and saving."""

    def __init__(self):
        self.seconds, self._mark = 0.0, time.perf_counter()

    def take(self) -> float:
        """Seconds since the last call."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds

    def restart(self, args, state, control, **kwargs):
        self._mark = time.perf_counter()

    on_train_begin = on_evaluate = on_save = restart

    def on_step_end(self, args, state, control, **kwargs):
        now = time.perf_counter()
        self.seconds, self._mark = self.seconds + now - self._mark, now


class GradientNorms(TrainerCallback):
    """Gradient norms of the parts that train, before clipping: in `norms` those of the step, counted for the log.

    Under DeepSpeed, which gathers gradients for that, those of logged steps alone, and none with fp16, where they are
    scaled.

    Args:
        trainer ([`~trainers.trainer.CLaRaTrainer`]): whose steps are measured, and into whose counters.
    """

    def __init__(self, trainer):
        self.trainer = trainer
        self.norms: dict[str, torch.Tensor] = {}
        # What the step's gradients were multiplied with already.
        self.clipping: torch.Tensor | float = 1.0

    def on_train_begin(self, args, state, control, **kwargs):
        model = self.trainer.model
        parts = [*model.adapter_names, MEMORY_EMBEDDINGS]
        self._parts = {part: [p for p in model.part_parameters(part) if p.requires_grad] for part in parts}
        if self.trainer.accelerator.distributed_type == DistributedType.DEEPSPEED and not args.fp16:
            self._measure_before_steps(state)

    def _measure_before_steps(self, state) -> None:
        """Have DeepSpeed's engine, which frees gradients in its step, read their norms before a step that is logged."""
        from deepspeed.utils import safe_get_full_grad

        engine, step = self.trainer.model_wrapped, self.trainer.model_wrapped.step

        def measured_step(*arguments, **options):
            if (state.global_step + 1) % state.logging_steps == 0:
                for part, parameters in self._parts.items():
                    norms = [safe_get_full_grad(parameter).float().norm() for parameter in parameters]
                    if norms:
                        self._note(part, torch.stack(norms).norm())
            return step(*arguments, **options)

        engine.step = measured_step

    def on_step_begin(self, args, state, control, **kwargs):
        self.norms, self.clipping = {}, 1.0

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        for part, parameters in self._parts.items():
            gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
            if gradients:
                self._note(part, whole(torch.nn.utils.get_total_norm(gradients)) / self.clipping)

    def _note(self, part: str, norm: torch.Tensor) -> None:
        self.norms[part] = norm
        count(self.trainer.counters, f"grad_norm_{part}", norm, 1.0)


class DivergenceGuard(TrainerCallback):
    """Stops a run, in all processes alike and before anything is saved, whose loss or gradients are not finite.

    Trainer hides such losses from its log.

    Args:
        trainer ([`~trainers.trainer.CLaRaTrainer`]): whose steps are watched.
        gradients ([`GradientNorms`]): of the same trainer.
    """

    def __init__(self, trainer, gradients: GradientNorms):
        self.trainer, self.gradients = trainer, gradients
        # Loss and rows of the step's micro-batches.
        self.batches: list[tuple[torch.Tensor, torch.Tensor]] = []

    def on_train_begin(self, args, state, control, **kwargs):
        if state.is_world_process_zero:
            Path(args.output_dir, DIVERGED_FILE).unlink(missing_ok=True)

    def on_step_begin(self, args, state, control, **kwargs):
        self.batches = []

    def on_step_end(self, args, state, control, **kwargs):
        accelerator = self.trainer.accelerator
        watched = [loss.detach().float() for loss, _ in self.batches]
        if not args.fp16:  # whose scaler meets overflowing gradients as a matter of course
            watched += [norm.float() for norm in self.gradients.norms.values()]
            if accelerator.distributed_type == DistributedType.DEEPSPEED:
                norm = self.trainer.model_wrapped.get_global_grad_norm()
                watched.append(torch.as_tensor(0.0 if norm is None else norm, device=accelerator.device).float())
        is_bad = ~torch.stack([value.to(accelerator.device) for value in watched]).isfinite().all()
        if accelerator.reduce(is_bad.float(), reduction="sum").item() > 0:
            self._stop(args, state)

    def _stop(self, args, state) -> None:
        """Write down the step's batches, of all processes, and raise."""
        accelerator = self.trainer.accelerator
        batches = gather_object(
            [
                {"process": accelerator.process_index, "loss": float(loss), "rows": rows.tolist()}
                for loss, rows in self.batches
            ]
        )
        path = Path(args.output_dir, DIVERGED_FILE)
        bad = [batch for batch in batches if not math.isfinite(batch["loss"])]
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
        chosen = rows_at(self.trainer.train_dataset, rows)
        found = {
            "step": state.global_step,
            "epoch": state.epoch,
            "loss": str(bad[0]["loss"]),
            "rows": rows,
            "ids": chosen.get("id"),
            "grad_norms": {part: str(norm.item()) for part, norm in self.gradients.norms.items()},
            "batches": [{**batch, "loss": str(batch["loss"])} for batch in batches],
        }
        write_json(path, found)


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
