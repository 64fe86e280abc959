"""Stage 2, instruction tuning: compressor and generator learn to answer from several given documents.

Rows: `{"question": str, "answers": [...], "docs": [...]}`; the target is the first answer, all documents are given.
"""

from dataclasses import dataclass

import torch
from datasets import Dataset

from modeling_clara.processing_clara import distinct_texts

from .scp import CompressionTrainer, CompressionTrainingArguments
from .trainer import EXAMPLE_INDEX, with_columns


@dataclass
class InstructionConfig(CompressionTrainingArguments):
    """Arguments of [`InstructionTrainer`]."""


class InstructionTrainer(CompressionTrainer):
    """Instruction tuning of the compressor on questions with their documents."""

    def prepare_dataset(self, dataset: Dataset, model, args: InstructionConfig, options: dict) -> Dataset:
        processor, max_length = self.processor, args.max_length

        def tokenize(row: dict, position: int) -> dict:
            processor.check_user_texts([row["question"]], f"question of row {position}")
            slots = processor.slots(len(row["docs"]))
            target = processor.target("answer", row["answers"])
            example = processor.training_example("answer", slots, target, row["question"], max_length=max_length)
            return {**example, EXAMPLE_INDEX: position}

        tokenized = dataset.map(tokenize, with_indices=True, remove_columns=dataset.column_names, **options)
        return with_columns(tokenized, {"document_ids": self.with_documents(dataset)})

    def generate_predictions(self, rows: list[int]) -> tuple[torch.Tensor, ...]:
        batch = self.eval_rows[rows]
        distinct, index = distinct_texts(batch["docs"])
        memories = self.compress_together(distinct)
        answers = self.model.generate(
            questions=batch["question"],
            memories=[memories[row[row >= 0].to(memories.device)] for row in index],
            rerank=False,
            **self.generation_options,
        )
        return (self.generated_ids(answers.sequences),)
