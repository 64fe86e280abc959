"""Stage 3, joint training: query reasoner and generator learn from the answer's loss alone (section 3 of the paper).

Rows: `{"question": str, "answers": [...], "docs": [...]}` with the candidates in `docs`; no relevance labels are used.
The compressor is frozen, so each document is compressed once, before training, into a `MemoryStore`.
"""

import os
from dataclasses import dataclass, field

import torch
from datasets import Dataset

from modeling_clara import CLaRaProcessor
from modeling_clara.adapters import COMPRESSOR, GENERATOR, QUERY_REASONER
from modeling_clara.memory_store import MemoryStore
from modeling_clara.modeling_clara import MEMORY_EMBEDDINGS
from modeling_clara.processing_clara import index_matrix

from .base import EXAMPLE_INDEX, CLaRaTrainer, CLaRaTrainingArguments, pad_documents, pad_examples


# Candidates that evaluation ranks, for Recall@5 where fewer are selected.
RANKING_DEPTH = 5


@dataclass
class JointConfig(CLaRaTrainingArguments):
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
        memory_store (`str`, *optional*):
            Folder of the memory store; `memories` in the output folder by default.
        memory_batch_size (`int`, *optional*, defaults to `64`):
            Documents per forward pass when the store is filled.
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
    memory_store: str | None = field(default=None, metadata={"help": "Folder of the memory store."})
    memory_batch_size: int = field(default=64, metadata={"help": "Documents per forward pass filling the store."})

    def __post_init__(self):
        super().__post_init__()
        if self.train_compressor and not self.online:
            raise ValueError("train_compressor needs online: stored memories do not follow a compressor that changes.")


class JointCollator:
    """Batches of questions with their candidates.

    Args:
        processor ([`CLaRaProcessor`]): pads and knows the memory tokens.
        store (`MemoryStore`, *optional*): where the candidates' memories are read; without one, `document_ids` of the
            rows are batched for compression in the step.
    """

    def __init__(self, processor: CLaRaProcessor, store: MemoryStore | None = None):
        self.processor = processor
        self.store = store

    def __call__(self, features: list[dict]) -> dict:
        query = self.processor.pad_encodings([row["query_ids"] for row in features])
        batch = {"query_input_ids": query["input_ids"], "query_attention_mask": query["attention_mask"]}
        if self.store is None:
            batch.update(pad_documents(features, self.processor))
        else:
            position = {key: row for row, key in enumerate(dict.fromkeys(k for f in features for k in f["keys"]))}
            batch["memories"] = self.store.get(list(position))
            batch["document_index"] = index_matrix([[position[key] for key in row["keys"]] for row in features])
        return {**batch, **pad_examples(features, self.processor)}


class JointTrainer(CLaRaTrainer):
    """End-to-end training of retrieval and generation through the straight-through top-k."""

    def __init__(self, model, args: JointConfig, train_dataset=None, eval_dataset=None, **kwargs):
        model.add_query_reasoner()
        for name in ("top_k", "temperature", "topk_taken_mask"):
            if getattr(args, name) is not None:
                setattr(model.config, name, getattr(args, name))
        model.config.validate_ranges()
        self.store = None
        if not args.online:
            path = args.memory_store or os.path.join(args.output_dir, "memories")
            self.store = MemoryStore.open(path, model)
        super().__init__(model, args, train_dataset, eval_dataset, **kwargs)

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
        distinct = list(dict.fromkeys(text for docs in dataset["docs"] for text in docs))
        if self.store is None:
            ids, column = processor.encode_documents(distinct), "document_ids"
        else:
            ids, column = self.store.add(distinct, batch_size=args.memory_batch_size), "keys"
        known = dict(zip(distinct, ids, strict=True))
        return tokenized.add_column(column, [[known[text] for text in docs] for docs in dataset["docs"]])

    def candidate_memories(self, rows: list[int]) -> list[torch.Tensor]:
        """Memories `[N_b, l, H]` of the candidates of evaluation rows, stored or compressed now."""
        if self.store is not None:
            return [self.store.get(self.eval_dataset[row]["keys"]) for row in rows]
        documents = [self.eval_rows[row]["docs"] for row in rows]
        distinct = list(dict.fromkeys(text for docs in documents for text in docs))
        memories = dict(zip(distinct, self.model.compress(distinct), strict=True))
        return [torch.stack([memories[text] for text in docs]) for docs in documents]

    def generate_predictions(self, rows: list[int]) -> tuple[torch.Tensor, ...]:
        questions, memories = self.eval_rows[rows]["question"], self.candidate_memories(rows)
        top_k = self.model.config.top_k
        depth = min(max(top_k, RANKING_DEPTH), max(len(candidates) for candidates in memories))
        ranking = self.model.retrieve(questions, memories, top_k=depth).indices
        chosen = [
            candidates[order[order >= 0][:top_k].to(candidates.device)]
            for candidates, order in zip(memories, ranking, strict=True)
        ]
        answers = self.model.generate(
            questions=questions, memories=chosen, rerank=False, max_new_tokens=self.args.generation_max_new_tokens
        )
        return self.generated_ids(answers.sequences), ranking
