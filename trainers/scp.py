"""Stage 1, SCP: the compressor learns to keep what a document says (arXiv 2511.18659, section 2).

Rows: `{"data_type": "qa" | "paraphrase", "question": [...], "answers": [...], "docs": [...]}`. The target of a `qa` row
is the list of its question and answer pairs, that of a `paraphrase` row its one answer.
"""

import random
from dataclasses import dataclass, field

import numpy as np
import torch
import yaml
from datasets import Dataset
from transformers.utils import logging

from clara_hf.data.schema import distinct_docs
from modeling_clara import CLaRaForRetrievalGeneration, CLaRaOutput, CLaRaProcessor
from modeling_clara.adapters_clara import COMPRESSOR, GENERATOR
from modeling_clara.functional_clara import gathered, whole_copy
from modeling_clara.modeling_clara import MEMORY_EMBEDDINGS

from .arguments import CLaRaTrainingArguments
from .batches import EXAMPLE_INDEX, CompressionCollator, MixSampler, check_weights, encoded_documents
from .losses import memory_gaps, row_losses
from .trainer import CLaRaTrainer, configure, load_model, train_parts


logger = logging.get_logger(__name__)

FITTED_ROWS = 500


@dataclass
class CompressionTrainingArguments(CLaRaTrainingArguments):
    r"""
    Arguments of the stages that train the compressor.

    Parameters:
        > Parameters that control the loss

        mse_weight (`float`, *optional*):
            Weight of the mean-squared error between document and memory means; the model configuration's by default.
    """

    mse_weight: float | None = field(default=None, metadata={"help": "Weight of the MSE term."})


@dataclass
class SCPConfig(CompressionTrainingArguments):
    r"""
    Arguments of [`SCPTrainer`].

    Parameters:
        > Parameters that control the data

        data_mix (`dict[str, float]`, *optional*):
            Weight of each `data_type` among the rows that are drawn, such as `{qa: 0.5, paraphrase: 0.5}`, see
            [`~trainers.batches.MixSampler`]; a kind that is not named is left out. By default all rows are drawn
            alike.

        > Parameters that control evaluation

        compare_memories (`bool`, *optional*, defaults to `False`):
            Whether evaluation also computes the loss of every target without a memory and with those of other rows of
            its batch, see [`~trainers.losses.memory_gaps`]: whether memories are read at all, at three times the cost.
    """

    data_mix: dict | str | None = field(default=None, metadata={"help": "Weight of each data_type, YAML or JSON."})
    compare_memories: bool = field(
        default=False, metadata={"help": "Evaluate without memories and with those of other rows, too."}
    )

    def __post_init__(self):
        super().__post_init__()
        if self.compare_memories and self.per_device_eval_batch_size < 2:
            raise ValueError(
                "compare_memories takes wrong memories from other rows of a batch, but per_device_eval_batch_size is "
                f"{self.per_device_eval_batch_size}: make it at least 2."
            )
        given = self.data_mix
        if given is None:
            return
        if isinstance(given, str):
            try:
                self.data_mix = yaml.safe_load(given)
            except yaml.YAMLError as error:
                raise ValueError(f"data_mix is no valid YAML: {given!r}.") from error
        if not isinstance(self.data_mix, dict):
            raise ValueError(f"data_mix must be a mapping of kinds to weights, got {given!r}.")
        check_weights(self.data_mix)
        if self.train_sampling_strategy != "random":
            raise ValueError(
                f"data_mix draws rows itself: leave out train_sampling_strategy, got {self.train_sampling_strategy!r}."
            )


@dataclass
class SCPRows:
    """SCP rows as examples: a prompt over the row's documents, with its target."""

    processor: CLaRaProcessor
    seed: int
    max_length: int | None

    def __call__(self, row: dict, number: int) -> dict:
        processor, kind = self.processor, row["data_type"]
        docs, _ = distinct_docs(row["docs"])
        # Which of several instructions a row gets depends on its number only, so that a resumed run draws alike.
        variant = random.Random(f"{self.seed}-{number}").randrange(2**16)
        target = processor.target(kind, row["answers"], row["question"])
        slots = processor.slots(len(docs))
        example = processor.training_example(kind, slots, target, variant=variant, max_length=self.max_length)
        copies = len(row["docs"]) - len(docs)
        return {**example, **encoded_documents(processor, docs), "copies": copies, EXAMPLE_INDEX: number}


def compressor_to_train(
    model: CLaRaForRetrievalGeneration | str, args: CompressionTrainingArguments, train_dataset: Dataset | None
) -> CLaRaForRetrievalGeneration:
    """`model`, see [`~trainers.trainer.load_model`], whose compressor, generator and memory embeddings train.

    A `memory_projection` that is as `from_base` leaves it is fitted to documents of the training set.

    A query reasoner that the model brings is taken off: it belongs to the memories of the compressor as it was. Until
    joint training starts a new one, the compressor reads questions.
    """
    model = load_model(model, args)
    if model.config.query_reasoner:
        logger.warning("The query reasoner is taken off: it would not follow the compressor, which trains.")
        model.remove_query_reasoner()
    configure(model, args, "mse_weight")
    train_parts(model, args, COMPRESSOR, GENERATOR, MEMORY_EMBEDDINGS)
    if model.config.memory_projection and train_dataset is not None:
        with gathered([model.memory_projection.weight]):
            matrix = whole_copy(model.memory_projection.weight)
        if torch.equal(matrix, torch.eye(len(matrix), dtype=matrix.dtype)):
            share = model.fit_memory_projection(documents_to_fit(train_dataset))
            logger.info("Memory projection fitted: it gives back %.3f of the token embeddings' squares.", share)
    return model


def documents_to_fit(train_dataset: Dataset) -> list[str]:
    """Documents of up to [`FITTED_ROWS`] rows, evenly spread over the training set; every process takes the same."""
    rows = range(0, len(train_dataset), max(1, -(-len(train_dataset) // FITTED_ROWS)))
    return list(dict.fromkeys(text for row in rows for text in train_dataset[row]["docs"]))


def other_documents(index: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """In place of each row's documents in `index` `[B, N]` as many of other rows, the next ones in the batch; and
    which rows `[B]` found enough of them."""
    total, other = int(index.max()) + 1, index.clone()
    is_known = torch.ones(len(index), dtype=torch.bool, device=index.device)
    for row, own in enumerate(index.tolist()):
        own = [document for document in own if document >= 0]
        after = [(own[-1] + step) % total for step in range(1, total)]
        chosen = [document for document in after if document not in own][: len(own)]
        is_known[row] = len(chosen) == len(own)
        if is_known[row]:
            other[row, : len(own)] = torch.tensor(chosen)
    return other, is_known


@torch.no_grad()
def losses_by_memory(
    model: CLaRaForRetrievalGeneration, inputs: dict[str, torch.Tensor], outputs: CLaRaOutput
) -> torch.Tensor:
    """Losses `[B, 3]` of a batch's targets with the right, no and wrong memories; NaN where other rows have not enough
    documents.

    Args:
        inputs: a batch of [`~trainers.batches.CompressionCollator`].
        outputs: what `model` made of it.
    """
    labels, index = inputs["labels"], inputs["document_index"]
    prompts = {"input_ids": inputs["input_ids"], "labels": labels, "memories": outputs.memories}
    config, mask = model.config, inputs["attention_mask"]
    slots = torch.tensor([*config.memory_token_ids, config.sep_token_id], device=mask.device)
    # Positions that are not attended are not counted either: as if the slots were not there.
    unread = mask.masked_fill(torch.isin(inputs["input_ids"], slots), 0)
    without = model(**prompts, attention_mask=unread, document_index=index)
    other, is_known = other_documents(index)
    wrong = model(**prompts, attention_mask=mask, document_index=other)
    losses = [row_losses(found.logits, labels) for found in (outputs, without, wrong)]
    return torch.stack([*losses[:2], losses[2].masked_fill(~is_known, float("nan"))], dim=1)


class SCPTrainer(CLaRaTrainer):
    """Salient compressor pretraining: loss = cross entropy + `mse_weight` x MSE of document and memory means.

    Args:
        model ([`CLaRaForRetrievalGeneration`] or `str`): or the name of a checkpoint, or of a base to begin with.
        args, train_dataset, eval_dataset, kwargs: see [`~trainers.trainer.CLaRaTrainer`].
    """

    model: CLaRaForRetrievalGeneration
    args: SCPConfig

    def __init__(
        self,
        model: CLaRaForRetrievalGeneration | str,
        args: SCPConfig,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | None = None,
        **kwargs,
    ):
        # What trains.
        model = compressor_to_train(model, args, train_dataset)
        # Which rows are drawn.
        self.mix_sampler = None
        if args.data_mix is not None and train_dataset is not None:
            self.mix_sampler = MixSampler(
                train_dataset["data_type"][:], args.data_mix, args.order_seed, self.current_epoch
            )
        # How they become examples, and how these are batched: documents are compressed in the step.
        encode = SCPRows(model.processor, args.order_seed, args.max_length)
        collator = CompressionCollator(model.processor)
        super().__init__(model, args, encode, collator, train_dataset, eval_dataset, **kwargs)
        self.prepare_datasets()

    @classmethod
    def scores(cls, args: SCPConfig) -> list[str]:
        gaps = memory_gaps(np.zeros((2, 3))) if args.compare_memories and not args.prediction_loss_only else ()
        return [*super().scores(args), *gaps]

    def losses_by_memory(self, inputs: dict[str, torch.Tensor], outputs: CLaRaOutput) -> torch.Tensor | None:
        return losses_by_memory(self.model, inputs, outputs) if self.args.compare_memories else None

    def _get_train_sampler(self, train_dataset: Dataset | None = None):
        if self.mix_sampler is not None and self.args.max_tokens_per_batch is None:
            return self.mix_sampler
        return super()._get_train_sampler(train_dataset)

    def drawn_rows(self, epoch: int) -> list[int]:
        return super().drawn_rows(epoch) if self.mix_sampler is None else self.mix_sampler.rows_of(epoch)
