"""Stage 1, SCP: the compressor learns to keep what a document says (arXiv 2511.18659, section 2).

Rows: `{"data_type": "qa" | "paraphrase", "question": [...], "answers": [...], "docs": [...]}`. The target of a `qa` row
is the list of its question and answer pairs, that of a `paraphrase` row its one answer.
"""

import random
from dataclasses import dataclass, field

import yaml
from datasets import Dataset
from transformers.utils import logging

from modeling_clara import CLaRaForRetrievalGeneration, CLaRaProcessor
from modeling_clara.adapters_clara import COMPRESSOR, GENERATOR
from modeling_clara.modeling_clara import MEMORY_EMBEDDINGS

from .mix import MixSampler, check_weights
from .trainer import (
    EXAMPLE_INDEX,
    CLaRaTrainer,
    CLaRaTrainingArguments,
    pad_documents,
    pad_examples,
    with_columns,
)


logger = logging.get_logger(__name__)


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
            [`~trainers.mix.MixSampler`]; a kind that is not named is left out. By default all rows are drawn alike.
    """

    data_mix: dict | str | None = field(default=None, metadata={"help": "Weight of each data_type, YAML or JSON."})

    def __post_init__(self):
        super().__post_init__()
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


class CompressionCollator:
    """Batches of rows whose documents are compressed in the step and all given to the generator.

    Args:
        processor ([`CLaRaProcessor`]): pads and knows the memory tokens.
    """

    def __init__(self, processor: CLaRaProcessor):
        self.processor = processor

    def __call__(self, features: list[dict]) -> dict:
        return {**pad_documents(features, self.processor), **pad_examples(features, self.processor)}


class CompressionTrainer(CLaRaTrainer):
    """Trains compressor, generator and memory embeddings on documents that are all given, without retrieval.

    A query reasoner that the model brings is taken off: it belongs to the memories of the compressor as it was. Until
    joint training starts a new one, the compressor reads questions.
    """

    trainable_parts = (COMPRESSOR, GENERATOR, MEMORY_EMBEDDINGS)

    def __init__(
        self,
        model: CLaRaForRetrievalGeneration,
        args: CompressionTrainingArguments,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | None = None,
        **kwargs,
    ):
        if model.config.query_reasoner:
            logger.warning("The query reasoner is taken off: it would not follow the compressor, which trains.")
            model.remove_query_reasoner()
        if args.mse_weight is not None:
            model.config.mse_weight = args.mse_weight
            model.config.validate_ranges()
        super().__init__(model, args, train_dataset, eval_dataset, **kwargs)

    def make_collator(self, model, args) -> CompressionCollator:
        return CompressionCollator(model.processor)

    def with_documents(self, dataset: Dataset) -> list[list[list[int]]]:
        """Token ids of every row's documents; each distinct document is tokenized once, cut ones reported once."""
        given = dataset["docs"][:]  # at once, not row by row
        distinct = list(dict.fromkeys(text for docs in given for text in docs))
        ids = dict(zip(distinct, self.processor.encode_documents(distinct), strict=True))
        return [[ids[text] for text in docs] for docs in given]


class SCPTrainer(CompressionTrainer):
    """Salient compressor pretraining: loss = cross entropy + `mse_weight` x MSE of document and memory means."""

    supports_generation = False

    def __init__(self, model, args: SCPConfig, train_dataset=None, eval_dataset=None, **kwargs):
        self.mix_sampler = None
        if args.data_mix is not None and train_dataset is not None:
            kinds = list(train_dataset["data_type"])
            self.mix_sampler = MixSampler(kinds, args.data_mix, args.order_seed, self.current_epoch)
        super().__init__(model, args, train_dataset, eval_dataset, **kwargs)

    def _get_train_sampler(self, train_dataset: Dataset | None = None):
        if self.args.data_mix is None:
            return super()._get_train_sampler(train_dataset)
        return self.mix_sampler

    def prepare_dataset(self, dataset: Dataset, model, args: SCPConfig, options: dict) -> Dataset:
        processor, seed, max_length = self.processor, args.order_seed, args.max_length

        def tokenize(row: dict, position: int) -> dict:
            kind = row["data_type"]
            # Which of several instructions a row gets depends on its position only, so that a resumed run draws alike.
            variant = random.Random(f"{seed}-{position}").randrange(2**16)
            slots = processor.slots(len(row["docs"]))
            target = processor.target(kind, row["answers"], row["question"])
            example = processor.training_example(kind, slots, target, variant=variant, max_length=max_length)
            return {**example, EXAMPLE_INDEX: position}

        tokenized = dataset.map(tokenize, with_indices=True, remove_columns=dataset.column_names, **options)
        return with_columns(tokenized, {"document_ids": self.with_documents(dataset)})
