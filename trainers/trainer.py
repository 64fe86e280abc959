"""What the stages share: arguments, the loss with its parts, and evaluation by generation."""

import os
from dataclasses import dataclass, field

import torch
from datasets import Dataset, concatenate_datasets
from torch.utils.data import DataLoader, Sampler
from transformers import TrainingArguments
from transformers.integrations import get_available_reporting_integrations
from transformers.trainer_pt_utils import LengthGroupedSampler
from transformers.utils import logging

from modeling_clara import CLaRaForRetrievalGeneration, CLaRaOutput, CLaRaProcessor
from modeling_clara.processing_clara import IGNORE_INDEX, index_matrix

from .callbacks import LocalLog, TrainingWatch
from .checkpoints import CheckpointTrainer
from .sampling import LengthSampler


logger = logging.get_logger(__name__)

EXAMPLE_INDEX = "example_index"
IS_POSITIVE = "is_positive"
# In a run's folder, where the memory store is unless another place is given.
MEMORIES_FOLDER = "memories"
# Trackers whose package transformers does not look for.
UNKNOWN_TRACKERS = ("azure_ml", "flyte")


@dataclass
class CLaRaTrainingArguments(TrainingArguments):
    r"""
    Arguments that all stages share, on top of [`~transformers.TrainingArguments`]. Defaults that differ from it follow
    the paper: cosine schedule, warm-up over 3% of the steps, one epoch.

    Parameters:
        > Parameters that control the data

        max_length (`int`, *optional*):
            Tokens of a prompt with its target; longer targets are cut. `None` keeps everything.
        dataset_num_proc (`int`, *optional*):
            Processes that tokenize the data.

        > Parameters that control evaluation

        predict_with_generate (`bool`, *optional*, defaults to `True`):
            Whether evaluation generates answers, for metrics that need them.
        generation_max_new_tokens (`int`, *optional*, defaults to `32`):
            Tokens to generate per answer in evaluation.
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
    max_length: int | None = field(
        default=None, metadata={"help": "Tokens of a prompt with its target; longer targets are cut."}
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
        super().__post_init__()
        for tracker in self.report_to:
            if tracker not in (*get_available_reporting_integrations(), *UNKNOWN_TRACKERS):
                raise ValueError(
                    f"report_to names {tracker!r}, which is not installed here or not known: install it, or choose "
                    "'none', whose log is log.jsonl in output_dir."
                )
        if self.remove_unused_columns:
            raise ValueError("remove_unused_columns must stay false: the collators need every column.")
        if self.bf16 and self.device.type == "cpu" and not cpu_computes_bfloat16():
            logger.warning(
                "bf16 is on, but this CPU has no instructions for bfloat16: its matrix products take many times longer "
                "than in float32. Turn bf16 off."
            )
        if os.environ.get("ACCELERATE_USE_FSDP") == "true" and self.device.type == "cpu":
            raise ValueError(
                "the configuration of accelerate asks for FSDP, which it does on GPUs only (here every process would "
                "hold the whole model): use cpu_zero2.yaml or cpu_zero3.yaml of recipes/accelerate."
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


class CLaRaTrainer(CheckpointTrainer):
    """Base of the stages. A subclass says which parts train and how a row becomes a training example.

    Args:
        model ([`CLaRaForRetrievalGeneration`]): loaded from a base or an earlier stage; its processor is used.
        args: the stage's configuration.
        train_dataset, eval_dataset (`datasets.Dataset`): rows of the stage's schema, in text.
        kwargs: further arguments of [`~transformers.Trainer`].
    """

    trainable_parts: tuple[str, ...] = ()

    def __init__(
        self,
        model: CLaRaForRetrievalGeneration,
        args: CLaRaTrainingArguments,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | None = None,
        **kwargs,
    ):
        if not isinstance(model, CLaRaForRetrievalGeneration):
            raise TypeError(f"model must be a CLaRaForRetrievalGeneration, got {type(model).__name__}.")
        model.train_only(*self.parts_to_train(model, args))
        if args.deepspeed_plugin is None:
            # In bfloat16, steps of a learning rate of 1e-5 vanish. DeepSpeed keeps float32 copies of its own.
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.data = parameter.data.float()
        self.has_mse_term = model.compressor_trains
        self.documents_in_batch: torch.Tensor | None = None
        self.processor: CLaRaProcessor = model.processor
        self.train_rows, self.eval_rows = train_dataset, eval_dataset
        self.watch = TrainingWatch(self)
        # Before the data are prepared, which may take hours: it refuses arguments that do not go together.
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=self.processor,
            data_collator=kwargs.pop("data_collator", None) or self.make_collator(model, args),
            **kwargs,
        )
        options = {"num_proc": args.dataset_num_proc, "desc": "Tokenizing"}
        if train_dataset is not None:
            self.train_dataset = self.prepare_dataset(train_dataset, model, args, options)
        if eval_dataset is not None:
            self.eval_dataset = self.prepare_dataset(eval_dataset, model, args, options)
        self.add_callback(self.watch)
        self.add_callback(LocalLog)

    def parts_to_train(self, model: CLaRaForRetrievalGeneration, args: CLaRaTrainingArguments) -> tuple[str, ...]:
        return self.trainable_parts

    def prepare_dataset(self, dataset: Dataset, model, args, options: dict) -> Dataset:
        """Tokenized rows in the order of `dataset`, with an `example_index` column."""
        raise NotImplementedError

    def make_collator(self, model, args):
        raise NotImplementedError

    def _get_dataloader(self, *arguments, **options) -> DataLoader:
        loader = super()._get_dataloader(*arguments, **options)
        # Left to itself, it takes a number from dropout's generator whenever its workers start, as on resuming.
        loader.base_dataloader.generator = torch.Generator().manual_seed(self.args.order_seed)
        return loader

    def current_epoch(self) -> int:
        """For samplers: accelerate's `set_epoch` misses one that is sharded and resumed."""
        return int(self.state.epoch or 0)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        sampler = super()._get_train_sampler(train_dataset)
        if not isinstance(sampler, LengthGroupedSampler):
            return sampler
        # Its own order follows dropout's generator, and its groups the batch of a process.
        batch_size = sampler.batch_size * self.args.world_size
        return LengthSampler(sampler.lengths, batch_size, self.args.order_seed, self.current_epoch)

    def compute_loss(
        self, model, inputs: dict, return_outputs: bool = False, num_items_in_batch: torch.Tensor | int | None = None
    ):
        outputs: CLaRaOutput = model(**model_inputs(inputs), num_items_in_batch=num_items_in_batch)
        is_training = self.model.training
        loss = outputs.ce_loss
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            # The sum over this process's tokens was divided by the tokens of all of them, and gradients are averaged.
            loss = loss * self.accelerator.num_processes
        parts = {"ce_loss": loss.detach()}
        if outputs.mse_loss is not None:
            mse_loss = outputs.mse_loss
            if num_items_in_batch is not None:
                mse_loss = mse_loss * self.share_of_documents(inputs["document_index"])
            loss = loss + self.model.config.mse_weight * mse_loss
            parts["mse_loss"] = mse_loss.detach()
        if is_training:
            for name, part in parts.items():
                self.watch.add(name, part, 1 / self.current_gradient_accumulation_steps)
            self.watch_retrieval(inputs, outputs)
        return (loss, outputs) if return_outputs else loss

    def watch_retrieval(self, inputs: dict[str, torch.Tensor], outputs: CLaRaOutput) -> None:
        """Add what a stage that retrieves tells of a training batch to `self.watch`."""

    def training_step(self, model, inputs: dict, num_items_in_batch: torch.Tensor | int | None = None) -> torch.Tensor:
        loss = super().training_step(model, inputs, num_items_in_batch)
        self.watch.add_batch(inputs)
        self.watch.note_step(loss, inputs[EXAMPLE_INDEX])
        return loss

    def get_batch_samples(self, epoch_iterator, num_batches: int, device: torch.device):
        samples, num_items_in_batch = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.has_mse_term and samples:
            count = sum(count_documents(batch["document_index"]) for batch in samples).to(device)
            across = self.args.average_tokens_across_devices
            self.documents_in_batch = self.accelerator.reduce(count, reduction="sum") if across else count
        return samples, num_items_in_batch

    def share_of_documents(self, document_index: torch.Tensor) -> torch.Tensor:
        """Weight of a micro-batch's mean over documents in that of the global batch.

        As with tokens, gradients and losses of processes are averaged afterwards, so that it is multiplied by their
        number.
        """
        processes = self.accelerator.num_processes if self.args.average_tokens_across_devices else 1
        return count_documents(document_index) * processes / self.documents_in_batch

    def _clip_grad_norm(self, model):
        norm = super()._clip_grad_norm(model)
        self.watch.note_clipping(norm)
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs.update(self.watch.take())
        super().log(logs, start_time)

    def prediction_step(self, model, inputs, prediction_loss_only: bool, ignore_keys=None):
        """Loss, predictions and the rows' positions in the evaluation data.

        Predictions are a tuple: the generated ids `[B, new tokens]` (or, without generation, the most likely token at
        each supervised position), then, where the stage retrieves, the ranked candidates `[B, k]`.
        """
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        if prediction_loss_only:
            return loss.detach(), None, None
        if self.args.predict_with_generate and self.supports_generation:
            predictions = self.generate_predictions(inputs[EXAMPLE_INDEX].tolist())
            return loss.detach(), predictions, inputs[EXAMPLE_INDEX]
        width = outputs.logits.shape[1] - 1
        labels = inputs["labels"][:, -width:]
        guesses = outputs.logits[:, :-1].argmax(dim=-1).masked_fill(labels == IGNORE_INDEX, IGNORE_INDEX)
        return loss.detach(), guesses, labels

    supports_generation = True

    def generate_predictions(self, rows: list[int]) -> tuple[torch.Tensor, ...]:
        """Generated ids, and more, for the rows of the evaluation data at the given positions."""
        raise NotImplementedError

    def compress_together(self, documents: list[str]) -> torch.Tensor:
        """Memories `[N, l, H]` of a process's own documents, compressed in as many forward passes as the others make
        with theirs: where weights are spread over processes, each pass needs them all."""
        count = torch.tensor([len(documents)], device=self.args.device)
        longest = int(self.accelerator.gather(count).max())
        padded = documents + documents[:1] * (longest - len(documents))
        return self.model.compress(padded)[: len(documents)]

    @property
    def generation_options(self) -> dict[str, int | bool]:
        """How evaluation generates. Under FSDP, unknown to the decoder, all processes make as many steps."""
        options = {"max_new_tokens": self.args.generation_max_new_tokens}
        return {**options, "synced_gpus": True} if self.is_fsdp_enabled else options

    def generated_ids(self, sequences: torch.Tensor) -> torch.Tensor:
        """Generated ids with the tokens after the end replaced by -100, as evaluation gathers them."""
        return sequences.masked_fill(sequences == self.model.config.pad_token_id, IGNORE_INDEX)


def with_columns(dataset: Dataset, columns: dict[str, list]) -> Dataset:
    """`dataset` with further columns. `Dataset.add_column` would pickle every value for a fingerprint."""
    return concatenate_datasets([dataset, Dataset.from_dict(columns)], axis=1)


def model_inputs(inputs: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A batch without what only the trainer reads."""
    return {name: value for name, value in inputs.items() if name not in (EXAMPLE_INDEX, IS_POSITIVE)}


def count_documents(document_index: torch.Tensor) -> torch.Tensor:
    """Documents of a batch, as often as they are in a row; -1 stands for none."""
    return (document_index >= 0).sum()


def pad_examples(features: list[dict], processor: CLaRaProcessor) -> dict[str, torch.Tensor]:
    """The decoder side of a batch, which all stages share: prompts, labels and positions in the data."""
    prompts = processor.pad_prompts([row["input_ids"] for row in features], [row["labels"] for row in features])
    return {**prompts, EXAMPLE_INDEX: torch.tensor([row[EXAMPLE_INDEX] for row in features])}


def pad_documents(features: list[dict], processor: CLaRaProcessor) -> dict[str, torch.Tensor]:
    """Token ids of the batch's documents, every distinct one once, and which belong to which row."""
    position: dict[tuple[int, ...], int] = {}
    index = [[position.setdefault(tuple(ids), len(position)) for ids in row["document_ids"]] for row in features]
    encoded = processor.pad_encodings([list(ids) for ids in position])
    return {
        "document_input_ids": encoded["input_ids"],
        "document_attention_mask": encoded["attention_mask"],
        "document_index": index_matrix(index),
    }


def token_accuracy(prediction) -> dict[str, float]:
    """Share of supervised tokens that are the most likely one given those before: `compute_metrics` of SCP."""
    labels = prediction.label_ids
    is_target = labels != IGNORE_INDEX
    return {"token_accuracy": float((prediction.predictions == labels)[is_target].mean())}
