"""The supervised twin of joint training: the query reasoner learns from relevance labels (Sup- in arXiv 2511.18659).

Rows: `{"question": str, "docs": [...], "pos_index": [...]}` with the candidates in `docs` and the positions of the
relevant ones in `pos_index`; answers are not needed. Compressor and generator stay as the starting checkpoint has them.
"""

from dataclasses import dataclass, field

import torch
from datasets import Dataset

from modeling_clara import CLaRaOutput
from modeling_clara.adapters_clara import QUERY_REASONER

from .losses import contrastive_loss
from .retrieval import (
    RANKING_DEPTH,
    CandidateCollator,
    RetrievalTrainer,
    RetrievalTrainingArguments,
    batch_recall,
    positive_mask,
    positives,
)
from .trainer import EXAMPLE_INDEX, IS_POSITIVE, model_inputs


@dataclass
class ContrastiveConfig(RetrievalTrainingArguments):
    r"""
    Arguments of [`ContrastiveTrainer`].

    Parameters:
        > Parameters that control the loss

        temperature (`float`, *optional*, defaults to `0.02`):
            Temperature of the contrastive loss. That of the checkpoint's top-k stays as it is.
        in_batch_negatives (`bool`, *optional*, defaults to `False`):
            Whether the candidates of the other questions of a process's batch count as negatives too. A document that
            is among a question's own positives never does. The loss then depends on the batch size per device.
    """

    learning_rate: float = field(default=5e-6, metadata={"help": "The initial learning rate for AdamW."})
    temperature: float = field(default=0.02, metadata={"help": "Temperature of the contrastive loss."})
    in_batch_negatives: bool = field(
        default=False, metadata={"help": "Take the other questions' candidates as negatives too."}
    )

    def __post_init__(self):
        super().__post_init__()
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive, got {self.temperature!r}.")


class ContrastiveCollator(CandidateCollator):
    """Batches of questions with their distinct candidates, and which of those are relevant.

    Args:
        processor, store: see [`CandidateCollator`].
        in_batch_negatives (`bool`): whether every question gets the candidates of all.
    """

    def __init__(self, processor, store, in_batch_negatives: bool = False):
        super().__init__(processor, store)
        self.in_batch_negatives = in_batch_negatives

    def __call__(self, features: list[dict]) -> dict:
        """`is_positive` `[B, N]` bool beside what `forward` takes. One document is one candidate, however often it is
        listed: its key tells, in this question's list and in the others'."""
        relevant = [{row["keys"][place] for place in row["pos_index"]} for row in features]
        keys = [list(dict.fromkeys(row["keys"])) for row in features]
        if self.in_batch_negatives:
            keys = [list(dict.fromkeys(key for row in keys for key in row))] * len(features)
        batch = self.candidates([{**row, "keys": own} for row, own in zip(features, keys, strict=True)])
        golds = [
            [place for place, key in enumerate(own) if key in gold] for own, gold in zip(keys, relevant, strict=True)
        ]
        batch[IS_POSITIVE] = positive_mask(golds, batch["document_index"])
        return {**batch, EXAMPLE_INDEX: torch.tensor([row[EXAMPLE_INDEX] for row in features])}


class ContrastiveTrainer(RetrievalTrainer):
    """Training of the query reasoner alone, by [`~trainers.losses.contrastive_loss`] over the candidates."""

    trainable_parts = (QUERY_REASONER,)

    def make_collator(self, model, args: ContrastiveConfig) -> ContrastiveCollator:
        return ContrastiveCollator(model.processor, self.store, args.in_batch_negatives)

    def prepare_dataset(self, dataset: Dataset, model, args: ContrastiveConfig, options: dict) -> Dataset:
        processor = self.processor
        # Before the documents are compressed, which takes long.
        for position, gold in enumerate(positives(dataset)):
            check_positives(gold, dataset[position], position)

        def tokenize(row: dict, position: int) -> dict:
            ids = processor.encode_questions([row["question"]])[0]
            return {"query_ids": ids, args.length_column_name: len(ids), EXAMPLE_INDEX: position}

        tokenized = dataset.map(tokenize, with_indices=True, remove_columns=dataset.column_names, **options)
        return self.add_candidates(tokenized, dataset, args)

    def compute_loss(self, model, inputs: dict, return_outputs: bool = False, num_items_in_batch=None):
        outputs = model(**model_inputs(inputs))
        is_candidate = inputs["document_index"] >= 0
        loss = contrastive_loss(outputs.scores, inputs[IS_POSITIVE], is_candidate, self.args.temperature)
        if self.model.training:
            self.watch_retrieval(inputs, outputs)
        return (loss, outputs) if return_outputs else loss

    def watch_retrieval(self, inputs: dict[str, torch.Tensor], outputs: CLaRaOutput) -> None:
        """Recall over the batch's candidates, in-batch negatives among them."""
        depth = min(RANKING_DEPTH, outputs.scores.shape[1])
        best = outputs.scores.detach().topk(depth)
        ranking = best.indices.masked_fill(best.values.isneginf(), -1)
        for k in (1, RANKING_DEPTH):
            self.watch.add(f"recall@{k}", *batch_recall(ranking[:, :k], inputs[IS_POSITIVE]))

    def prediction_step(self, model, inputs, prediction_loss_only: bool, ignore_keys=None):
        """Loss, the ranked candidates `[B, k]` and the rows' positions in the evaluation data; no answers."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            loss = self.compute_loss(model, inputs)
        if prediction_loss_only:
            return loss, None, None
        return loss, self.rank(inputs[EXAMPLE_INDEX].tolist())[1], inputs[EXAMPLE_INDEX]


def check_positives(pos_index: list[int], row: dict, position: int) -> None:
    """Raise unless the row names at least one relevant document among its own.

    Raises:
        ValueError: says which row it is and what is wrong.
    """
    where = f"row {position} (question {row['question'][:60]!r})"
    if not pos_index:
        raise ValueError(f"{where} has no pos_index: give the positions of its relevant documents, or leave it out.")
    count = len(row["docs"])
    wrong = [index for index in pos_index if not 0 <= index < count]
    if wrong:
        raise ValueError(f"{where} has pos_index {wrong[0]}, but {count} docs: positions count from 0.")
