"""Arguments that all stages share."""

import dataclasses
import os
from dataclasses import dataclass, field

import torch
from transformers import TrainingArguments, get_scheduler
from transformers.integrations import get_available_reporting_integrations
from transformers.utils import logging


logger = logging.get_logger(__name__)

# Trackers whose package transformers does not look for.
UNKNOWN_TRACKERS = ("azure_ml", "flyte")
# Arguments of the Trainer that would change nothing here, with the value that asks for nothing.
PASSED_OVER = {
    "label_smoothing_factor": 0.0,
    "use_liger_kernel": False,
    "liger_kernel_config": None,
    "label_names": None,
    "length_column_name": "length",
}
WITH_TARGET_MODULES = ("galore", "apollo")
AT_LEAST_ONE = (
    *("gradient_accumulation_steps", "per_device_train_batch_size", "per_device_eval_batch_size"),
    *("generation_max_new_tokens", "dataset_num_proc", "max_length", "max_tokens_per_batch"),
)


@dataclass
class CLaRaTrainingArguments(TrainingArguments):
    r"""
    Arguments that all stages share, on top of [`~transformers.TrainingArguments`]. Defaults that differ from it follow
    the paper: cosine schedule, warm-up over 3% of the steps, one epoch.

    Parameters:
        > Parameters that control the data

        max_length (`int`, *optional*):
            Tokens of a prompt with its target; longer targets are cut. `None` keeps everything.
        max_tokens_per_batch (`int`, *optional*):
            Tokens of a process's batch, documents and padding included, in place of a number of rows; rows alike in
            length come together. See [`~trainers.batches.TokenSampler`].
        dataset_num_proc (`int`, *optional*):
            Processes that tokenize the data.

        > Parameters that control evaluation

        predict_with_generate (`bool`, *optional*, defaults to `True`):
            Whether evaluation generates answers, for metrics that need them.
        generation_max_new_tokens (`int`, *optional*, defaults to `32`):
            Tokens to generate per answer in evaluation.

        > Parameters under their former or later name in transformers

        activation_checkpointing, activation_checkpointing_kwargs:
            The same as `gradient_checkpointing` and `gradient_checkpointing_kwargs`, in every version. With
            `{keep_attention: true}` among the latter, all is computed again but attention, whose outputs are kept.
    """

    learning_rate: float = field(default=1e-4, metadata={"help": "The initial learning rate for AdamW."})
    num_train_epochs: float = field(default=1.0, metadata={"help": "Total number of training epochs to perform."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "The scheduler type to use."})
    warmup_steps: float = field(default=0.03, metadata={"help": "Warm-up steps; a share of all steps if below 1."})
    logging_steps: float = field(default=10, metadata={"help": "Log every X steps; a share of all steps if below 1."})
    # Every weight that trains takes part in every step: a search for others only costs time.
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Whether DDP looks for weights that took no part in a step."}
    )
    report_to: None | str | list[str] = field(default="none", metadata={"help": "Trackers to report to."})
    remove_unused_columns: bool = field(default=False, metadata={"help": "Kept off: collators need every column."})
    activation_checkpointing: bool | None = field(
        default=None, metadata={"help": "Recompute activations in backward; also gradient_checkpointing."}
    )
    activation_checkpointing_kwargs: dict | str | None = field(
        default=None, metadata={"help": "Options of activation checkpointing."}
    )
    max_length: int | None = field(
        default=None, metadata={"help": "Tokens of a prompt with its target; longer targets are cut."}
    )
    max_tokens_per_batch: int | None = field(
        default=None, metadata={"help": "Tokens of a process's batch, padding included, in place of a number of rows."}
    )
    dataset_num_proc: int | None = field(default=None, metadata={"help": "Processes that tokenize the data."})
    predict_with_generate: bool = field(default=True, metadata={"help": "Whether evaluation generates answers."})
    generation_max_new_tokens: int = field(
        default=32, metadata={"help": "Tokens to generate per answer in evaluation."}
    )

    def __post_init__(self):
        uses_deepspeed = os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true" or self.deepspeed
        if uses_deepspeed and (self.use_cpu or not torch.accelerator.is_available()):
            leave_out_shared_memory_kernel()
        self._name_checkpointing()
        self.report_to = "none" if self.report_to is None else self.report_to
        for name in AT_LEAST_ONE:
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1.")
        super().__post_init__()
        self._check_library_options()
        for tracker in self.report_to:
            if tracker not in (*get_available_reporting_integrations(), *UNKNOWN_TRACKERS):
                raise ValueError(
                    f"report_to names {tracker!r}, which is not installed here or not known: install it, or choose "
                    "'none', whose log is log.jsonl in output_dir."
                )
        self._refuse()
        if self.bf16 and self.device.type == "cpu" and not cpu_computes_bfloat16():
            logger.warning(
                "bf16 is on, but this CPU has no instructions for bfloat16: its matrix products take many times longer "
                "than in float32. Turn bf16 off."
            )

    def _name_checkpointing(self) -> None:
        """Set activation checkpointing by the name that this version of transformers reads without a warning."""
        own = {known.name for known in dataclasses.fields(TrainingArguments)}
        old, new = "gradient_checkpointing", "activation_checkpointing"
        old, new = (old, new) if new in own else (new, old)
        for end in ("", "_kwargs"):
            if getattr(self, old + end) is not None and not getattr(self, new + end):
                setattr(self, new + end, getattr(self, old + end))
            setattr(self, old + end, None)

    def _check_library_options(self) -> None:
        """Raise a `ValueError` for options of the schedule and optimizer that would only fail when training begins."""
        optimizer = torch.optim.SGD([torch.zeros(1)])
        try:
            get_scheduler(self.lr_scheduler_type, optimizer, 1, 2, self.lr_scheduler_kwargs)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"lr_scheduler_kwargs {self.lr_scheduler_kwargs} do not fit lr_scheduler_type "
                f"{self.lr_scheduler_type.value!r} ({error})."
            ) from error
        if self.optim_target_modules is not None and not self.optim.startswith(WITH_TARGET_MODULES):
            raise ValueError(
                f"optim_target_modules is {self.optim_target_modules!r}, which optim {self.optim.value!r} does not "
                "read: leave it out, or choose a GaLore or APOLLO optimizer."
            )
        if self.optim_args and not all("=" in part for part in self.optim_args.split(",")):
            raise ValueError(f"optim_args is {self.optim_args!r}: write it as NAME=VALUE,NAME=VALUE.")

    def _refuse(self) -> None:
        """Raise a `ValueError` for what would have no effect here, or a silently wrong one."""
        for name, neutral in PASSED_OVER.items():
            if getattr(self, name) != neutral:
                raise ValueError(
                    f"{name} is {getattr(self, name)!r}, but has no effect on this training: leave it out."
                )
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns must stay false: the collators need every column.")
        if self.train_sampling_strategy == "batch_rebalance":
            raise ValueError(
                "train_sampling_strategy is 'batch_rebalance', whose order a resumed run would not repeat: choose "
                "'group_by_length', 'random' or 'sequential'."
            )
        if self.max_tokens_per_batch is not None:
            self._refuse_other_sizes()
        if self.accelerator_config.dispatch_batches:
            raise ValueError(
                "dispatch_batches is true, but a batch here cannot be cut into shares, as questions have documents in "
                "common: leave it out of accelerator_config."
            )
        if self.n_gpu > 1:
            raise ValueError(
                f"{self.n_gpu} GPUs in one process would each get a share of a batch whose questions have documents in "
                "common: start one process for each with accelerate launch, or choose one by CUDA_VISIBLE_DEVICES."
            )
        if os.environ.get("ACCELERATE_USE_FSDP") == "true" and self.device.type == "cpu":
            raise ValueError(
                "the configuration of accelerate asks for FSDP, which it does on GPUs only (here every process would "
                "hold the whole model): use cpu_zero2.yaml or cpu_zero3.yaml of recipes/accelerate."
            )

    def _refuse_other_sizes(self) -> None:
        """Raise a `ValueError` for what says beside `max_tokens_per_batch` which rows a batch has."""
        defaults = {known.name: known.default for known in dataclasses.fields(TrainingArguments)}
        names = ("per_device_train_batch_size", "auto_find_batch_size", "train_sampling_strategy")
        for name in (*names, "dataloader_drop_last"):
            if getattr(self, name) != defaults[name]:
                raise ValueError(
                    f"max_tokens_per_batch is {self.max_tokens_per_batch}, and {name} is {getattr(self, name)!r}: both "
                    "say which rows a batch has, so leave one of them out."
                )

    @property
    def order_seed(self) -> int:
        """What the order of rows is drawn with: `data_seed`, or `seed` where there is none."""
        return self.seed if self.data_seed is None else self.data_seed


def cpu_computes_bfloat16() -> bool:
    """Whether PyTorch multiplies bfloat16 matrices on this CPU with more than plain loops."""
    return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()


def leave_out_shared_memory_kernel() -> None:
    """Keep DeepSpeed from compiling, on a machine without a GPU, a kernel that only inference calls.

    It takes a minute, and a run that is killed meanwhile leaves a lock on which every later one waits for ever.
    """
    import deepspeed

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
