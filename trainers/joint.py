"""Stage 3, joint training: query reasoner and generator learn from the answer's loss alone (section 3 of the paper).

Rows: `{"question": str, "answers": [...], "docs": [...]}` with the candidates in `docs`; no relevance labels are used.
The compressor is frozen, so each document is compressed once, before training, into a `MemoryStore`.
"""

import math
from dataclasses import dataclass, field

import torch
from datasets import Dataset
from transformers import TrainerCallback

from clara_hf.memory_store.store import MemoryStore
from modeling_clara import CLaRaForRetrievalGeneration, CLaRaProcessor
from modeling_clara.adapters_clara import COMPRESSOR, GENERATOR, QUERY_REASONER
from modeling_clara.modeling_clara import MEMORY_EMBEDDINGS

from .batches import EXAMPLE_INDEX, IS_POSITIVE, JointCollator
from .callbacks import count
from .losses import batch_recall, chosen_mass
from .retrieval import RetrievalTrainer, RetrievalTrainingArguments, candidate_columns, open_memories
from .trainer import configure, load_model, train_parts


TEMPERATURE_SCHEDULES = ("linear", "cosine")


@dataclass
class JointConfig(RetrievalTrainingArguments):
    r"""
    Arguments of [`JointTrainer`].

    Parameters:
        > Parameters that control retrieval

        top_k (`int`, *optional*):
            Documents selected per question; the model configuration's by default.
        temperature (`float`, *optional*):
            Temperature of the straight-through top-k; the model configuration's by default.
        topk_taken_mask (`str`, *optional*):
            `exact` or `published`, see [`~modeling_clara.straight_through_topk`]; the model configuration's by default.
        topk_estimator (`str`, *optional*):
            `straight_through`, `soft` or `gumbel`, see [`~modeling_clara.straight_through_topk`]: what slots hold in
            training; the model configuration's by default.
        temperature_end (`float`, *optional*):
            Temperature of the last step; it stays as at the start by default. The checkpoint keeps the last one.
        temperature_schedule (`str`, *optional*, defaults to `"linear"`):
            How the temperature gets there, `linear` or `cosine`, over the steps.

        > Parameters that control what trains

        freeze_query_reasoner (`bool`, *optional*, defaults to `False`):
            Whether retrieval stays as it is, and only the generator trains (an ablation of the paper).
        freeze_generator (`bool`, *optional*, defaults to `False`):
            Whether the generator stays as it is, and only the query reasoner trains, through it.
        query_learning_rate (`float`, *optional*):
            Initial learning rate of the query reasoner; `learning_rate` by default. The gradient that reaches it
            through the top-k is weaker than the generator's.

        > Parameters that control the memories

        online (`bool`, *optional*, defaults to `False`):
            Whether to compress candidates in every step instead of once, for those who train the compressor too.
        train_compressor (`bool`, *optional*, defaults to `False`):
            Whether compressor and memory embeddings train as well; needs `online`.
        mse_weight (`float`, *optional*):
            Weight of the mean-squared error between document and memory means, where the compressor trains; the model
            configuration's by default.
    """

    learning_rate: float = field(default=5e-6, metadata={"help": "The initial learning rate for AdamW."})
    top_k: int | None = field(default=None, metadata={"help": "Documents selected per question."})
    temperature: float | None = field(default=None, metadata={"help": "Temperature of the straight-through top-k."})
    topk_taken_mask: str | None = field(default=None, metadata={"help": "exact or published."})
    topk_estimator: str | None = field(default=None, metadata={"help": "straight_through, soft or gumbel."})
    temperature_end: float | None = field(default=None, metadata={"help": "Temperature of the last step."})
    temperature_schedule: str = field(default="linear", metadata={"help": "linear or cosine."})
    freeze_query_reasoner: bool = field(default=False, metadata={"help": "Train the generator only."})
    freeze_generator: bool = field(default=False, metadata={"help": "Train the query reasoner only."})
    query_learning_rate: float | None = field(
        default=None, metadata={"help": "Initial learning rate of the query reasoner; learning_rate by default."}
    )
    online: bool = field(default=False, metadata={"help": "Compress candidates in every step instead of once."})
    train_compressor: bool = field(default=False, metadata={"help": "Train the compressor too; needs online."})
    mse_weight: float | None = field(default=None, metadata={"help": "Weight of the MSE term, with train_compressor."})

    def __post_init__(self):
        super().__post_init__()
        if self.train_compressor and not self.online:
            raise ValueError("train_compressor needs online: stored memories do not follow a compressor that changes.")
        if self.mse_weight is not None and not self.train_compressor:
            raise ValueError("mse_weight has no use without train_compressor: there is no MSE term.")
        if self.temperature_schedule not in TEMPERATURE_SCHEDULES:
            raise ValueError(
                f"temperature_schedule must be one of {TEMPERATURE_SCHEDULES}, got {self.temperature_schedule!r}."
            )
        if self.temperature_end is not None and not self.temperature_end > 0:
            raise ValueError(f"temperature_end must be positive, got {self.temperature_end!r}.")
        if self.freeze_query_reasoner and self.freeze_generator and not self.train_compressor:
            raise ValueError("freeze_query_reasoner and freeze_generator leave nothing to train: set one of them only.")
        if self.freeze_query_reasoner and self.query_learning_rate is not None:
            raise ValueError("query_learning_rate has no use with freeze_query_reasoner: leave one of them out.")


def scheduled_temperature(start: float, end: float, progress: float, schedule: str) -> float:
    """The temperature at `progress`, from 0 at the first step to 1 at the last, on a `linear` or `cosine` way."""
    share = progress if schedule == "linear" else (1 - math.cos(math.pi * progress)) / 2
    return start + (end - start) * share


class TemperatureSchedule(TrainerCallback):
    """Sets the model's temperature before every step, from the step's number alone, so that resuming is exact.

    Args:
        model ([`~modeling_clara.CLaRaForRetrievalGeneration`]): its temperature now is that of the first step.
        end (`float`): that of the last.
        schedule (`str`): `linear` or `cosine`.
    """

    def __init__(self, model, end: float, schedule: str):
        self.config = model.config
        self.start, self.end, self.schedule = model.config.temperature, end, schedule

    def on_step_begin(self, args, state, control, **kwargs):
        progress = state.global_step / max(state.max_steps - 1, 1)
        self.config.temperature = scheduled_temperature(self.start, self.end, progress, self.schedule)


def parts_to_train(args: JointConfig) -> list[str]:
    """The model's parts that [`JointConfig`] lets train."""
    trains = {
        QUERY_REASONER: not args.freeze_query_reasoner,
        GENERATOR: not args.freeze_generator,
        COMPRESSOR: args.train_compressor,
        MEMORY_EMBEDDINGS: args.train_compressor,
    }
    return [part for part, does in trains.items() if does]


@dataclass
class JointRows:
    """Questions as examples: a prompt with slots for the best candidates, the first answer, and all candidates."""

    processor: CLaRaProcessor
    store: MemoryStore | None
    top_k: int
    max_length: int | None

    def __call__(self, row: dict, number: int) -> dict:
        processor, question = self.processor, row["question"]
        candidates = candidate_columns(row, number, processor, self.store)
        count_of = len(candidates["keys" if self.store is not None else "document_ids"])
        slots = processor.slots(min(self.top_k, count_of))
        target = processor.target("answer", row["answers"])
        example = processor.training_example("answer", slots, target, question, max_length=self.max_length)
        return {**example, **candidates, "answers": row["answers"], EXAMPLE_INDEX: number}


class JointTrainer(RetrievalTrainer):
    """End-to-end training of retrieval and generation through the straight-through top-k.

    Args:
        model ([`CLaRaForRetrievalGeneration`] or `str`): or the name of a checkpoint, or of a base to begin with.
        replace_memories (`bool`): whether memories that another compressor left in `output_dir` are deleted; else they
            are an error.
        args, train_dataset, eval_dataset, kwargs: see [`~trainers.trainer.CLaRaTrainer`].
    """

    answers = True
    args: JointConfig

    def __init__(
        self,
        model: CLaRaForRetrievalGeneration | str,
        args: JointConfig,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | None = None,
        replace_memories: bool = False,
        **kwargs,
    ):
        # What trains, under which settings.
        model = load_model(model, args)
        configure(model, args, "top_k", "temperature", "topk_taken_mask", "topk_estimator", "mse_weight")
        model.add_query_reasoner()
        train_parts(model, args, *parts_to_train(args))
        # Where memories are: in a store, or made in every step.
        self.store = None if args.online else open_memories(model, args, replace_memories)
        # How rows become examples, and how these are batched.
        encode = JointRows(model.processor, self.store, model.config.top_k, args.max_length)
        collator = JointCollator(model.processor, self.store)
        super().__init__(model, args, encode, collator, train_dataset, eval_dataset, **kwargs)
        if args.query_learning_rate is not None and self.optimizer is not None:
            raise ValueError("query_learning_rate has no effect on optimizers that are given: leave one of them out.")
        if args.temperature_end is not None:
            self.add_callback(TemperatureSchedule(model, args.temperature_end, args.temperature_schedule))
        self.prepare_datasets()

    def create_optimizer(self, model=None) -> torch.optim.Optimizer:
        if self.optimizer is None and self.args.query_learning_rate is not None:
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, self.model)
            query = self.model.part_parameters(QUERY_REASONER)
            theirs = {id(parameter) for parameter in query}
            rest = [p for p in self.model.parameters() if p.requires_grad and id(p) not in theirs]
            options["params"] = [
                {"params": rest, "weight_decay": self.args.weight_decay},
                {"params": query, "weight_decay": self.args.weight_decay, "lr": self.args.query_learning_rate},
            ]
            self.optimizer_cls_and_kwargs = optimizer_class, options
        return super().create_optimizer(model)

    def compute_loss(self, model, inputs: dict, return_outputs: bool = False, num_items_in_batch=None):
        """The base's. Of training batches, recall is counted where gold documents are known, and how surely slots
        choose: the mean soft weight of the chosen document (`chosen_mass`) and the share of slots where it is more than
        half (`chosen_share`)."""
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if self.model.training:
            config, indices = self.model.config, outputs.topk_indices
            for k in dict.fromkeys((1, config.top_k)):
                count(self.counters, f"recall@{k}", *batch_recall(indices[:, :k], inputs[IS_POSITIVE]))
            with torch.no_grad():
                mass = chosen_mass(outputs.scores, indices, config.temperature, config.topk_taken_mask)
            count(self.counters, "chosen_mass", mass.sum(), len(mass))
            count(self.counters, "chosen_share", (mass > 0.5).sum(), len(mass))
        return (loss, outputs) if return_outputs else loss
