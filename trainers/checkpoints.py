"""Checkpoints of a run: what trains and what resuming needs, without the frozen base, and never half of one."""

import os
import shutil
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate.utils import save_fsdp_optimizer
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch.distributed.fsdp import FSDPModule
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.integrations.deepspeed import deepspeed_load_checkpoint
from transformers.trainer import SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints
from transformers.utils import SAFE_WEIGHTS_NAME

from clara_hf.hub.trainer import PublishingTrainer
from modeling_clara.functional_clara import whole_copy


# Checkpoints are written in here. Neither the Trainer nor a recipe takes what it holds for a checkpoint.
PARTIAL_FOLDER = "checkpoint.partial"


class EndsAtLastStep:
    """For a Trainer that goes on from the checkpoint of its last step: left to itself, it would train one more."""

    def _run_epoch(self, *arguments, **options) -> None:
        if self.state.global_step >= self.state.max_steps:
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*arguments, **options)


class CheckpointTrainer(EndsAtLastStep, PublishingTrainer):
    """A Trainer whose `checkpoint-N` folders hold what trains, and appear when every process has written its part.

    A checkpoint is an adapter-only model (whatever format the finished model is saved in) with the state of optimizer,
    scheduler, random generators and data. A run that is killed while it writes one leaves a folder
    `checkpoint.partial`, which the next save removes.
    """

    _writes_beside = False

    def _get_output_dir(self, trial) -> str:
        folder = super()._get_output_dir(trial)
        return os.path.join(folder, PARTIAL_FOLDER) if self._writes_beside else folder

    def _save_checkpoint(self, model, trial) -> None:
        run_folder = self._get_output_dir(trial)
        name = f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}"
        partial, finished = Path(run_folder, PARTIAL_FOLDER, name), Path(run_folder, name)
        if self.args.local_process_index == 0:
            shutil.rmtree(partial.parent, ignore_errors=True)
        self.accelerator.wait_for_everyone()
        self._writes_beside = True
        try:
            super()._save_checkpoint(model, trial)
        finally:
            self._writes_beside = False
        if self.state.best_model_checkpoint == str(partial):
            self.state.best_model_checkpoint = str(finished)
            if self.args.should_save:
                self.state.save_to_json(str(partial / TRAINER_STATE_NAME))
        self.accelerator.wait_for_everyone()
        if self.args.local_process_index == 0:
            put_in_place(partial, finished)
        self.accelerator.wait_for_everyone()
        if self.args.push_to_hub and self.is_world_process_zero():
            self._push_checkpoint(finished)
        if self.args.should_save:
            rotate_checkpoints(run_folder, self.args.save_total_limit, self.state.best_model_checkpoint, use_mtime=True)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the model: adapter-only for a checkpoint, else in its configuration's `checkpoint_format`."""
        config = self.model.config
        if not self._writes_beside and config.checkpoint_format != "adapter":
            if not self.is_fsdp_enabled:
                return super().save_model(output_dir, _internal_call)
            self._save(output_dir, state_dict=self._whole_state())
            return self._push_model(_internal_call)
        # By all processes, each of which may hold but a part of every weight.
        state = self.model.adapter_state_dict()
        wanted, config.checkpoint_format = config.checkpoint_format, "flat" if self._writes_beside else "adapter"
        try:
            self._save(output_dir, state_dict=state)
        finally:
            config.checkpoint_format = wanted
        self._push_model(_internal_call)

    def _whole_state(self) -> dict[str, torch.Tensor]:
        """The model's state in the process that saves, from the parts of all (FSDP), which call this together."""
        state = {}
        for key, value in self.model.state_dict().items():
            if key not in self.model.all_tied_weights_keys:
                copy = whole_copy(value)
                if self.args.should_save:
                    state[key] = copy
        return state

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        # FSDP gives the model a class of its own, whose code would be saved in place of the model's.
        given, token = type(self.model), self.args.hub_token
        self.model.__class__ = next(known for known in given.__mro__ if not issubclass(known, FSDPModule))
        self.args.hub_token = None  # training_args.bin would hold it
        try:
            super()._save(output_dir, state_dict)
        finally:
            self.model.__class__, self.args.hub_token = given, token

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        # Left to itself, the Trainer puts the frozen base into DeepSpeed's and FSDP's files.
        if self.is_deepspeed_enabled:
            with without_weights(self.model_wrapped):
                self.model_wrapped.save_checkpoint(output_dir, exclude_frozen_parameters=True)
        elif self.is_fsdp_enabled:
            plugin = self.accelerator.state.fsdp_plugin
            save_fsdp_optimizer(plugin, self.accelerator, self.optimizer, self.model, output_dir)
        else:
            return super()._save_optimizer_and_scheduler(output_dir)
        if self.args.should_save:
            torch.save(self.lr_scheduler.state_dict(), os.path.join(output_dir, SCHEDULER_NAME))

    def _prepare_for_training(self, max_steps, train_dataloader, resume_from_checkpoint):
        if resume_from_checkpoint is None or not self.is_deepspeed_enabled:
            return super()._prepare_for_training(max_steps, train_dataloader, resume_from_checkpoint)
        prepared = super()._prepare_for_training(max_steps, train_dataloader, None)
        self._load_deepspeed(resume_from_checkpoint)
        self._load_optimizer_and_scheduler(resume_from_checkpoint)
        self._load_scaler(resume_from_checkpoint)
        return prepared

    def _load_deepspeed(self, checkpoint: str) -> None:
        deepspeed_load_checkpoint(self.model_wrapped, checkpoint, load_module_strict=False)
        if not is_deepspeed_zero3_enabled():
            # ZeRO-3 takes the weights from the optimizer's copies of them; ZeRO-1 and 2 would do so after a step.
            self._load_from_checkpoint(checkpoint)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        state = load_file(os.path.join(resume_from_checkpoint, SAFE_WEIGHTS_NAME))
        self.model.load_adapter_state_dict(state)

    def _load_best_model(self) -> None:
        # The name may come from a file of the run's folder, which may have been moved, or been made by someone else.
        best, folder = Path(self.state.best_model_checkpoint), Path(self.args.output_dir)
        if not best.resolve().is_relative_to(folder.resolve()):
            best = folder / best.name
        if self.is_deepspeed_enabled:
            self._load_deepspeed(str(best))
        else:
            self._load_from_checkpoint(str(best))


@contextmanager
def without_weights(engine) -> Iterator[None]:
    """A DeepSpeed engine that leaves the model's weights out of its files: the checkpoint's model has them already."""
    engine.module_state_dict = lambda **options: {}
    try:
        yield
    finally:
        del engine.module_state_dict


def put_in_place(partial: Path, finished: Path) -> None:
    """Rename the folder `partial` to `finished`, whose older, broken version is removed.

    Called by one process of every machine: on a disk that machines share, the first one does it for all.
    """
    try:
        # A restart that passed over a damaged checkpoint comes by its step again.
        if partial.is_dir() and finished.is_dir():
            shutil.rmtree(finished)
        os.replace(partial, finished)
    except FileNotFoundError:
        if not finished.is_dir():
            raise
    shutil.rmtree(partial.parent, ignore_errors=True)


def holds_training_state(checkpoint: Path) -> bool:
    """Whether a checkpoint holds the state of optimizer and scheduler, in the files of any way of training."""
    has_optimizer = any(checkpoint.glob("optimizer*")) or any(checkpoint.glob("global_step*"))
    return has_optimizer and (checkpoint / SCHEDULER_NAME).is_file()


def damaged_file(checkpoint: Path) -> Path | None:
    """The first file of a checkpoint that is cut off, or whose checksums are wrong."""
    for path in sorted(path for path in checkpoint.rglob("*") if path.is_file()):
        try:
            if path.suffix == ".safetensors":
                with safe_open(path, "pt"):
                    pass
            elif path.suffix in (".pt", ".pth", ".bin"):  # zip files of torch.save
                with zipfile.ZipFile(path) as file:
                    if file.testzip() is not None:
                        return path
        except (SafetensorError, zipfile.BadZipFile, OSError):
            return path
    return None
