"""What the stages share: what trains, rows as examples, the loss and its log, and evaluation."""

import math
import os
from collections.abc import Callable

import torch
from datasets import Dataset
from pyarrow.compute import list_value_length
from torch.utils.data import DataLoader, Sampler, SequentialSampler
from transformers import EvalPrediction, PreTrainedConfig, set_seed
from transformers.utils import logging

from modeling_clara import CLaRaConfig, CLaRaForRetrievalGeneration, CLaRaOutput
from modeling_clara.processing_clara import IGNORE_INDEX

from .arguments import CLaRaTrainingArguments
from .batches import (
    EXAMPLE_INDEX,
    LengthSampler,
    TokenSampler,
    batch_at_rate,
    drawn_rate,
    encode_rows,
    model_inputs,
    prompts_of,
    row_tokens,
    rows_at,
)
from .callbacks import (
    DivergenceGuard,
    GradientNorms,
    LocalLog,
    TrainingClock,
    clipping_factor,
    count,
    count_batch,
    take_means,
)
from .checkpoints import CheckpointTrainer
from .losses import RECALL_KS, answer_scores, means, memory_gaps, ranking_of, recall_scores, score_names, token_accuracy


logger = logging.get_logger(__name__)


def load_model(model: CLaRaForRetrievalGeneration | str, args: CLaRaTrainingArguments) -> CLaRaForRetrievalGeneration:
    """`model`, or the one of this name: a CLaRa checkpoint, or a new CLaRa model over a causal language model, in a
    folder or on the Hub.

    Raises:
        TypeError: neither a model nor a name.
        OSError, ValueError: see `from_pretrained` and `from_base`.
    """
    if isinstance(model, CLaRaForRetrievalGeneration):
        return model
    if not isinstance(model, (str, os.PathLike)):
        raise TypeError(
            "model must be a CLaRaForRetrievalGeneration, or the name of a checkpoint or of a causal language model, "
            f"got {type(model).__name__}."
        )
    # Fresh adapters are drawn at random: alike in every process.
    set_seed(args.seed)
    is_clara = PreTrainedConfig.get_config_dict(model)[0].get("model_type") == CLaRaConfig.model_type
    load = CLaRaForRetrievalGeneration.from_pretrained if is_clara else CLaRaForRetrievalGeneration.from_base
    return load(model)


def configure(model: CLaRaForRetrievalGeneration, args: CLaRaTrainingArguments, *names: str) -> None:
    """Put those of a stage's arguments that are given into the model's configuration, which is saved with it."""
    for name in names:
        if getattr(args, name) is not None:
            setattr(model.config, name, getattr(args, name))
    model.config.validate_ranges()
    if "mse_weight" in names and args.mse_weight and model.config.readout == "mean_pool":
        raise ValueError(
            f"mse_weight is {args.mse_weight}, but with readout 'mean_pool' the mean of a document's memories is that "
            "of its states, and the term always about 0: leave it out, or set it to 0."
        )


def train_parts(model: CLaRaForRetrievalGeneration, args: CLaRaTrainingArguments, *parts: str) -> None:
    """Let the named parts of `model` train, in float32, and nothing else.

    Raises:
        ValueError: these parts have no weights that take part.
    """
    model.train_only(*parts)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise ValueError(
            f"compressor_layers is {model.config.compressor_layers}, so that {' and '.join(parts)} have no weights "
            "that take part: there is nothing to train."
        )
    if args.deepspeed_plugin is None:
        # In bfloat16, steps of a learning rate of 1e-5 vanish. DeepSpeed keeps float32 copies of its own.
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()


class CLaRaTrainer(CheckpointTrainer):
    """Base of the stages. What differs between them is given to it; it calls nothing of theirs while it is made.

    Args:
        model ([`CLaRaForRetrievalGeneration`]): with the parts that train; its processor is used.
        args: the stage's configuration.
        encode: makes the columns of a training example from a row and its number. A dataclass, whose fields but
            `processor` say, with the rows, what the result depends on.
        data_collator: makes batches of such examples.
        train_dataset, eval_dataset (`datasets.Dataset`): rows of the stage's schema, in text, or examples that the
            trainer's `prepare` made. `eval_dataset` may be a dictionary of several.
        compute_metrics: by default F1, EM, cover-EM and Recall@k as far as the stage has them, else the accuracy of
            tokens; `None` for the loss alone. `label_ids` are the numbers of the rows, where answers are generated or
            candidates ranked.
        kwargs: further arguments of [`~transformers.Trainer`].

    Attributes:
        retrieves, answers (`bool`): of a stage, whether it ranks candidates, and whether it answers questions.
        has_memories (`bool`): whether its model is a CLaRa model.
    """

    retrieves = answers = False
    has_memories = True
    args: CLaRaTrainingArguments

    def __init__(
        self,
        model: CLaRaForRetrievalGeneration,
        args: CLaRaTrainingArguments,
        encode: Callable[[dict, int], dict],
        data_collator: Callable[[list[dict]], dict],
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        **kwargs,
    ):
        if kwargs.get("compute_loss_func") is not None:
            raise ValueError("compute_loss_func has no effect on this training: override compute_loss in a subclass.")
        self.processor = encode.processor
        self.encode, self.generates = encode, self.answers and args.predict_with_generate
        self.counters: dict[str, list] = {}
        self.documents_in_batch: torch.Tensor | None = None
        self.questions_in_batch: torch.Tensor | None = None
        self.token_sampler: TokenSampler | None = None
        self.examples_evaluated: Dataset | None = None
        if "compute_metrics" not in kwargs:
            check_metric_arguments(args)
            kwargs["compute_metrics"] = self.default_metrics
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=self.processor,
            data_collator=kwargs.pop("data_collator", None) or data_collator,
            **kwargs,
        )
        self.clock, self.gradients = TrainingClock(), GradientNorms(self)
        self.guard = DivergenceGuard(self, self.gradients)
        for callback in (self.clock, self.gradients, self.guard, LocalLog()):
            self.add_callback(callback)

    # Rows as examples

    def prepare_datasets(self) -> None:
        """Turn the rows that the trainer was given into examples. The last thing that a stage does as it is made: the
        Trainer has then refused arguments that do not go together."""
        if self.eval_dataset is not None:
            self._check_best_metric()
        if self.train_dataset is not None:
            self.train_dataset = self.prepare_rows(self.train_dataset)
        if isinstance(self.eval_dataset, dict):
            self.eval_dataset = {name: self.prepare_rows(rows) for name, rows in self.eval_dataset.items()}
        elif self.eval_dataset is not None:
            self.eval_dataset = self.prepare_rows(self.eval_dataset)

    def prepare_rows(self, rows: Dataset) -> Dataset:
        """Examples of `rows`, see [`~trainers.batches.encode_rows`]."""
        return encode_rows(rows, self.encode, self.args, self.args.dataset_num_proc)

    def get_eval_dataloader(self, eval_dataset: str | Dataset | None = None) -> DataLoader:
        if eval_dataset is None or isinstance(eval_dataset, str):
            return super().get_eval_dataloader(eval_dataset)
        # Not by way of the Trainer, which would keep the loader for its own data set with persistent workers.
        return self.get_test_dataloader(eval_dataset)

    def get_test_dataloader(self, test_dataset: Dataset) -> DataLoader:
        return super().get_test_dataloader(self.prepare_rows(test_dataset))

    def _get_dataloader(self, *arguments, **options) -> DataLoader:
        loader = super()._get_dataloader(*arguments, **options)
        # Left to itself, it takes a number from dropout's generator whenever its workers start, as on resuming.
        loader.base_dataloader.generator = torch.Generator().manual_seed(self.args.order_seed)
        return loader

    def current_epoch(self) -> int:
        """For samplers: accelerate's `set_epoch` misses one that is sharded and resumed."""
        return int(self.state.epoch or 0)

    def _get_train_sampler(self, train_dataset: Dataset | None = None) -> Sampler | None:
        if self.args.max_tokens_per_batch is not None:
            self.token_sampler = self._make_token_sampler()
            return self.token_sampler
        if self.args.train_sampling_strategy != "group_by_length":
            return super()._get_train_sampler(train_dataset)
        # The Trainer's own order follows dropout's generator, and its groups the batch of a process.
        rows = self.train_dataset.with_format("arrow")[:]
        ids = rows["input_ids" if "input_ids" in rows.column_names else "query_ids"]
        batch_size = self.args.train_batch_size * self.args.gradient_accumulation_steps * self.args.world_size
        lengths = list_value_length(ids).to_pylist()
        return LengthSampler(lengths, batch_size, self.args.order_seed, self.current_epoch)

    def drawn_rows(self, epoch: int) -> list[int]:
        """The training rows of an epoch."""
        return list(range(len(self.train_dataset)))

    def _make_token_sampler(self) -> TokenSampler:
        memory_tokens = self.model.config.encoder_memory_tokens if self.has_memories else 0
        args, lengths, epochs = self.args, row_tokens(self.train_dataset, memory_tokens), 1
        if self.drawn_rows(0) != self.drawn_rows(1):  # of which one may need more batches than another
            epochs = math.ceil(args.num_train_epochs)
            if args.max_steps > 0:
                batches = args.max_steps * args.gradient_accumulation_steps * args.world_size
                epochs = -(-batches // max(sum(lengths) // args.max_tokens_per_batch, 1))
        options = {"rank": args.process_index, "processes": args.world_size}
        order = {"seed": args.order_seed, "epoch": self.current_epoch}
        return TokenSampler(lengths, args.max_tokens_per_batch, self.drawn_rows, epochs, **order, **options)

    def get_total_train_batch_size(self, args) -> float:
        """Rows of a step over all processes, on average where batches have a number of tokens."""
        if self.token_sampler is None:
            return super().get_total_train_batch_size(args)
        return len(self.drawn_rows(0)) * args.gradient_accumulation_steps / len(self.token_sampler)

    def _get_eval_sampler(self, eval_dataset: Dataset) -> Sampler | None:
        # Rows come in their order: the Trainer groups evaluation by the lengths of a column that not every stage has.
        return SequentialSampler(eval_dataset) if self.args.world_size <= 1 else None

    # The loss and its log

    def compute_loss(
        self, model, inputs: dict, return_outputs: bool = False, num_items_in_batch: torch.Tensor | int | None = None
    ):
        """The model's loss; over a global batch, whose tokens and documents are counted, its share in that."""
        whole = {"num_items_in_batch": num_items_in_batch, "num_documents_in_batch": self.documents_in_batch}
        outputs: CLaRaOutput = model(**model_inputs(inputs), **({} if num_items_in_batch is None else whole))
        scale = 1
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            # The sums over this process's share were divided by the whole, and gradients are averaged.
            scale = self.accelerator.num_processes
        if self.model.training:
            for name in ("ce_loss", "mse_loss"):
                if (part := getattr(outputs, name)) is not None:
                    count(self.counters, name, part.detach() * scale, 1 / self.current_gradient_accumulation_steps)
        loss = outputs.loss * scale
        return (loss, outputs) if return_outputs else loss

    def get_batch_samples(self, epoch_iterator, num_batches: int, device: torch.device):
        samples, num_items_in_batch = super().get_batch_samples(epoch_iterator, num_batches, device)
        if samples and self.token_sampler is not None:
            number = torch.tensor(sum(len(batch[EXAMPLE_INDEX]) for batch in samples), device=device)
            self.questions_in_batch = self.accelerator.reduce(number, reduction="sum")
        if samples and self.has_memories and self.model.compressor_trains:
            number = sum((batch["document_index"] >= 0).sum() for batch in samples).to(device)
            across = self.args.average_tokens_across_devices
            self.documents_in_batch = self.accelerator.reduce(number, reduction="sum") if across else number
        return samples, num_items_in_batch

    def share_of_questions(self, loss: torch.Tensor, inputs: dict) -> torch.Tensor:
        """A training batch's mean over its questions as a share of the global batch's, where batches have a number of
        tokens: the Trainer takes the mean over batches, of which some have more questions than others."""
        if self.token_sampler is None or not self.model.training:
            return loss
        batches = self.current_gradient_accumulation_steps * self.args.world_size
        return loss * (len(inputs[EXAMPLE_INDEX]) * batches / self.questions_in_batch)

    def training_step(self, model, inputs: dict, num_items_in_batch: torch.Tensor | int | None = None) -> torch.Tensor:
        config = self.model.config
        rate = drawn_rate(config, self.args.seed, self.state.global_step) if self.has_memories else None
        if rate is not None:
            inputs, config.rate = batch_at_rate(inputs, config, rate), rate
        try:
            loss = super().training_step(model, inputs, num_items_in_batch)
        finally:
            if rate is not None:
                config.rate = None  # a rate is drawn only where none was set
        count_batch(self.counters, inputs)
        self.guard.batches.append((loss, inputs[EXAMPLE_INDEX]))
        return loss

    def _clip_grad_norm(self, model):
        norm = super()._clip_grad_norm(model)
        if norm is not None:
            self.gradients.clipping = clipping_factor(norm, self.args.max_grad_norm)
        return norm

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            logs.update(take_means(self.counters, self.clock.take(), self.accelerator))
        super().log(logs, start_time)

    # Evaluation

    def evaluation_loop(self, dataloader: DataLoader, *arguments, **options):
        self.examples_evaluated = dataloader.dataset
        return super().evaluation_loop(dataloader, *arguments, **options)

    def prediction_step(self, model, inputs, prediction_loss_only: bool, ignore_keys=None):
        """Loss, predictions and labels of a batch.

        Predictions are generated ids `[B, new tokens]` where answers are generated, the ranked candidates `[B, k]`
        where the stage retrieves, a tuple of both in this order where it does both; labels are then the rows' numbers.
        Else they are the most likely token at each supervised position, and labels the tokens that stand there; a
        stage that compares memories adds the rows' losses `[B, 3]` with the right, no and wrong ones.
        """
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            loss, outputs = self.compute_loss(model, inputs, return_outputs=True)
        if prediction_loss_only:
            return loss.detach(), None, None
        if not (self.generates or self.retrieves):
            labels = inputs["labels"][:, 1 - outputs.logits.shape[1] :]
            guesses = outputs.logits[:, :-1].argmax(dim=-1).masked_fill(labels == IGNORE_INDEX, IGNORE_INDEX)
            losses = self.losses_by_memory(inputs, outputs)
            return loss.detach(), guesses if losses is None else (guesses, losses), labels
        found = [self.generate_answers(inputs, outputs)] if self.generates else []
        if self.retrieves:
            found.append(ranking_of(outputs.scores, max(self.model.config.top_k, *RECALL_KS)))
        return loss.detach(), tuple(found) if len(found) > 1 else found[0], inputs[EXAMPLE_INDEX]

    def losses_by_memory(self, inputs: dict[str, torch.Tensor], outputs: CLaRaOutput) -> torch.Tensor | None:
        """For stages that compare memories."""
        return None

    def generate_answers(self, inputs: dict[str, torch.Tensor], outputs: CLaRaOutput) -> torch.Tensor:
        """Ids generated after the batch's prompts, from the memories that the step read, -100 after their end."""
        slots, chosen = inputs["document_index"], outputs.topk_indices
        if chosen is not None:
            slots = slots.gather(1, chosen.clamp(min=0)).masked_fill(chosen < 0, -1)
        found = self.model.answer(
            **prompts_of(inputs, self.processor),
            memories=outputs.memories,
            document_index=slots,
            max_new_tokens=self.args.generation_max_new_tokens,
            # Under FSDP, unknown to the decoder, all processes make as many steps.
            **({"synced_gpus": True} if self.is_fsdp_enabled else {}),
        )
        return found.sequences.masked_fill(found.sequences == self.model.config.pad_token_id, IGNORE_INDEX)

    def default_metrics(self, prediction: EvalPrediction) -> dict[str, float]:
        """`compute_metrics` where the user gives none, over the rows that are evaluated."""
        if not (self.generates or self.retrieves):
            if isinstance(prediction.predictions, tuple):
                guesses, losses = prediction.predictions
                return {**token_accuracy(guesses, prediction.label_ids), **memory_gaps(losses)}
            return token_accuracy(prediction.predictions, prediction.label_ids)
        rows = rows_at(self.examples_evaluated, prediction.label_ids.tolist())
        found = prediction.predictions if isinstance(prediction.predictions, tuple) else (prediction.predictions,)
        scores = [{} for _ in prediction.label_ids]
        if self.generates:
            ids = [[token for token in row if token >= 0] for row in found[0].tolist()]
            texts = self.processor.tokenizer.batch_decode(ids, skip_special_tokens=True)
            scores = answer_scores(texts, rows["answers"])
        if self.retrieves:
            pairs = zip(scores, recall_scores(found[-1], rows["pos_index"]), strict=True)
            scores = [{**own, **recalls} for own, recalls in pairs]
        return means(scores)

    @classmethod
    def scores(cls, args: CLaRaTrainingArguments) -> list[str]:
        """Names of what evaluation gives under these arguments."""
        parts = (
            [] if args.prediction_loss_only else score_names(cls.answers and args.predict_with_generate, cls.retrieves)
        )
        return ["loss", *parts]

    def _check_best_metric(self) -> None:
        """Raise a `ValueError` unless evaluation gives `metric_for_best_model`, if that is known."""
        wanted = self.args.metric_for_best_model
        if wanted is None or self.compute_metrics not in (None, self.default_metrics):
            return
        names = ["loss"] if self.compute_metrics is None else self.scores(self.args)
        if isinstance(self.eval_dataset, dict):
            names = [f"{data}_{name}" for data in self.eval_dataset for name in names]
        if wanted.removeprefix("eval_") not in names:
            raise ValueError(
                f"metric_for_best_model is {wanted!r}, but evaluation gives {', '.join(names)}: choose one."
            )


def check_metric_arguments(args: CLaRaTrainingArguments) -> None:
    """Raise a `ValueError` for arguments that need a `compute_metrics` made for them."""
    given = {
        "batch_eval_metrics": args.batch_eval_metrics,
        "eval_do_concat_batches": not args.eval_do_concat_batches,
        "include_for_metrics": bool(args.include_for_metrics),
    }
    for name, is_given in given.items():
        if is_given:
            raise ValueError(
                f"{name} is {getattr(args, name)!r}, which the trainer's own metrics do not go with: leave it out, or "
                "give compute_metrics."
            )
