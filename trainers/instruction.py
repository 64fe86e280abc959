"""Stage 2, instruction tuning: compressor and generator learn to answer from several given documents.

Rows: `{"question": str, "answers": [...], "docs": [...]}`; the target is the first answer, all documents are given.
"""

from dataclasses import dataclass

from datasets import Dataset

from clara_hf.data.schema import distinct_docs
from modeling_clara import CLaRaForRetrievalGeneration, CLaRaProcessor

from .batches import EXAMPLE_INDEX, CompressionCollator, encoded_documents
from .scp import CompressionTrainingArguments, compressor_to_train
from .trainer import CLaRaTrainer


@dataclass
class InstructionConfig(CompressionTrainingArguments):
    """Arguments of [`InstructionTrainer`]."""


@dataclass
class InstructionRows:
    """Questions as examples: a prompt over all documents of the row, with its first answer."""

    processor: CLaRaProcessor
    max_length: int | None

    def __call__(self, row: dict, number: int) -> dict:
        processor, question = self.processor, row["question"]
        processor.check_user_texts([question], f"question of row {number}")
        docs, _ = distinct_docs(row["docs"])
        target, slots = processor.target("answer", row["answers"]), processor.slots(len(docs))
        example = processor.training_example("answer", slots, target, question, max_length=self.max_length)
        told = {"copies": len(row["docs"]) - len(docs), "answers": row["answers"], EXAMPLE_INDEX: number}
        return {**example, **encoded_documents(processor, docs), **told}


class InstructionTrainer(CLaRaTrainer):
    """Instruction tuning of the compressor on questions with their documents.

    Args:
        model ([`CLaRaForRetrievalGeneration`] or `str`): or the name of a checkpoint, or of a base to begin with.
        args, train_dataset, eval_dataset, kwargs: see [`~trainers.trainer.CLaRaTrainer`].
    """

    answers = True

    def __init__(
        self,
        model: CLaRaForRetrievalGeneration | str,
        args: InstructionConfig,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | None = None,
        **kwargs,
    ):
        # What trains.
        model = compressor_to_train(model, args, train_dataset)
        # How rows become examples, and how these are batched: documents are compressed in the step.
        encode = InstructionRows(model.processor, args.max_length)
        collator = CompressionCollator(model.processor)
        super().__init__(model, args, encode, collator, train_dataset, eval_dataset, **kwargs)
        self.prepare_datasets()
