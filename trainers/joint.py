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
from modeling_clara import CLaRaOutput
from modeling_clara.adapters_clara import COMPRESSOR, GENERATOR, QUERY_REASONER
from modeling_clara.modeling_clara import MEMORY_EMBEDDINGS
from modeling_clara.topk_clara import slot_softmax

from .retrieval import CandidateCollator, RetrievalTrainer, RetrievalTrainingArguments, batch_recall, positive_mask
from .trainer import EXAMPLE_INDEX, IS_POSITIVE, pad_examples


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


class JointCollator(CandidateCollator):
    """Batches of questions with their candidates, and the prompts that the selected ones go into. Gold positions, where
    known, are for the log only."""

    def __call__(self, features: list[dict]) -> dict:
        batch = self.candidates(features)
        batch[IS_POSITIVE] = positive_mask([row["pos_index"] for row in features], batch["document_index"])
        return {**batch, **pad_examples(features, self.processor)}


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


def chosen_mass(scores: torch.Tensor, indices: torch.Tensor, temperature: float, taken_mask: str) -> torch.Tensor:
    """Soft weight of the document in each filled slot `[slots]`.

    Args:
        scores (`[B, N]`), indices (`[B, k]`): as in [`~modeling_clara.CLaRaOutput`].
        temperature, taken_mask: as in [`~modeling_clara.straight_through_topk`].
    """
    is_filled = indices >= 0
    hard = torch.nn.functional.one_hot(indices.clamp(min=0), scores.shape[1])
    soft = slot_softmax(scores.float() / temperature, hard, is_filled, taken_mask)
    return (soft * hard).sum(dim=-1)[is_filled]


class JointTrainer(RetrievalTrainer):
    """End-to-end training of retrieval and generation through the straight-through top-k."""

    def __init__(self, model, args: JointConfig, train_dataset=None, eval_dataset=None, **kwargs):
        for name in ("top_k", "temperature", "topk_taken_mask", "mse_weight"):
            if getattr(args, name) is not None:
                setattr(model.config, name, getattr(args, name))
        model.config.validate_ranges()
        super().__init__(model, args, train_dataset, eval_dataset, **kwargs)
        if args.temperature_end is not None:
            self.add_callback(TemperatureSchedule(model, args.temperature_end, args.temperature_schedule))

    def open_store(self, model, args: JointConfig) -> MemoryStore | None:
        return None if args.online else super().open_store(model, args)

    def parts_to_train(self, model, args: JointConfig) -> tuple[str, ...]:
        trains = {
            QUERY_REASONER: not args.freeze_query_reasoner,
            GENERATOR: not args.freeze_generator,
            COMPRESSOR: args.train_compressor,
            MEMORY_EMBEDDINGS: args.train_compressor,
        }
        return tuple(part for part, does in trains.items() if does)

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

    def make_collator(self, model, args) -> JointCollator:
        return JointCollator(model.processor, self.store)

    def prepare_dataset(self, dataset: Dataset, model, args: JointConfig, options: dict) -> Dataset:
        processor, max_length, top_k = self.processor, args.max_length, model.config.top_k

        def tokenize(row: dict, position: int) -> dict:
            slots = processor.slots(min(top_k, len(row["docs"])))
            target = processor.target("answer", row["answers"])
            example = processor.training_example("answer", slots, target, row["question"], max_length=max_length)
            return {**example, "query_ids": processor.encode_questions([row["question"]])[0], EXAMPLE_INDEX: position}

        tokenized = dataset.map(tokenize, with_indices=True, remove_columns=dataset.column_names, **options)
        return self.add_candidates(tokenized, dataset, args)

    def watch_retrieval(self, inputs: dict[str, torch.Tensor], outputs: CLaRaOutput) -> None:
        """Recall of the batch where gold documents are known, and how surely slots choose: the mean soft weight of the
        chosen document (`chosen_mass`) and the share of slots where it is more than half (`chosen_share`)."""
        config, indices = self.model.config, outputs.topk_indices
        for k in dict.fromkeys((1, config.top_k)):
            self.watch.add(f"recall@{k}", *batch_recall(indices[:, :k], inputs[IS_POSITIVE]))
        with torch.no_grad():
            mass = chosen_mass(outputs.scores, indices, config.temperature, config.topk_taken_mask)
        self.watch.add("chosen_mass", mass.sum(), len(mass))
        self.watch.add("chosen_share", (mass > 0.5).sum(), len(mass))

    def generate_predictions(self, rows: list[int]) -> tuple[torch.Tensor, ...]:
        memories, ranking = self.rank(rows)
        top_k = self.model.config.top_k
        chosen = [
            candidates[order[order >= 0][:top_k].to(candidates.device)]
            for candidates, order in zip(memories, ranking, strict=True)
        ]
        answers = self.model.generate(
            questions=self.eval_rows[rows]["question"],
            memories=chosen,
            rerank=False,
            **self.generation_options,
        )
        return self.generated_ids(answers.sequences), ranking
