"""Stage 3, joint training: query reasoner and generator learn from the answer's loss alone (section 3 of the paper).

Rows: `{"question": str, "answers": [...], "docs": [...]}` with the candidates in `docs`; no relevance labels are used.
The compressor is frozen, so each document is compressed once, before training, into a `MemoryStore`.
"""

from dataclasses import dataclass, field

import torch
from datasets import Dataset

from modeling_clara.adapters import COMPRESSOR, GENERATOR, QUERY_REASONER
from modeling_clara.memory_store import MemoryStore
from modeling_clara.modeling_clara import MEMORY_EMBEDDINGS

from .base import EXAMPLE_INDEX, pad_examples
from .retrieval import CandidateCollator, RetrievalTrainer, RetrievalTrainingArguments


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

        query_learning_rate (`float`, *optional*):
            Initial learning rate of the query reasoner; `learning_rate` by default. The gradient that reaches it
            through the top-k is weaker than the generator's.

        > Parameters that control the memories

        online (`bool`, *optional*, defaults to `False`):
            Whether to compress candidates in every step instead of once, for those who train the compressor too.
        train_compressor (`bool`, *optional*, defaults to `False`):
            Whether compressor and memory embeddings train as well; needs `online`.
    """

    learning_rate: float = field(default=5e-6, metadata={"help": "The initial learning rate for AdamW."})
    top_k: int | None = field(default=None, metadata={"help": "Documents selected per question."})
    temperature: float | None = field(default=None, metadata={"help": "Temperature of the straight-through top-k."})
    topk_taken_mask: str | None = field(default=None, metadata={"help": "exact or published."})
    query_learning_rate: float | None = field(
        default=None, metadata={"help": "Initial learning rate of the query reasoner; learning_rate by default."}
    )
    online: bool = field(default=False, metadata={"help": "Compress candidates in every step instead of once."})
    train_compressor: bool = field(default=False, metadata={"help": "Train the compressor too; needs online."})

    def __post_init__(self):
        super().__post_init__()
        if self.train_compressor and not self.online:
            raise ValueError("train_compressor needs online: stored memories do not follow a compressor that changes.")


class JointCollator(CandidateCollator):
    """Batches of questions with their candidates, and the prompts that the selected ones go into."""

    def __call__(self, features: list[dict]) -> dict:
        return {**self.candidates(features), **pad_examples(features, self.processor)}


class JointTrainer(RetrievalTrainer):
    """End-to-end training of retrieval and generation through the straight-through top-k."""

    def __init__(self, model, args: JointConfig, train_dataset=None, eval_dataset=None, **kwargs):
        for name in ("top_k", "temperature", "topk_taken_mask"):
            if getattr(args, name) is not None:
                setattr(model.config, name, getattr(args, name))
        model.config.validate_ranges()
        super().__init__(model, args, train_dataset, eval_dataset, **kwargs)

    def open_store(self, model, args: JointConfig) -> MemoryStore | None:
        return None if args.online else super().open_store(model, args)

    def parts_to_train(self, model, args: JointConfig) -> tuple[str, ...]:
        unfrozen = (COMPRESSOR, MEMORY_EMBEDDINGS) if args.train_compressor else ()
        return (QUERY_REASONER, GENERATOR, *unfrozen)

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
            max_new_tokens=self.args.generation_max_new_tokens,
        )
        return self.generated_ids(answers.sequences), ranking
