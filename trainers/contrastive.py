"""The supervised baseline of joint training: the query reasoner learns from labels (Sup- in arXiv 2511.18659).

Rows: `{"question": str, "docs": [...], "pos_index": [...]}` with the candidates in `docs` and the positions of the
relevant ones in `pos_index`; answers are not needed. Compressor and generator stay as the starting checkpoint has them.
"""

from dataclasses import dataclass, field

from datasets import Dataset

from clara_hf.memory_store.store import MemoryStore
from modeling_clara import CLaRaForRetrievalGeneration, CLaRaProcessor
from modeling_clara.adapters_clara import QUERY_REASONER

from .batches import EXAMPLE_INDEX, IS_POSITIVE, ContrastiveCollator, model_inputs
from .callbacks import count
from .losses import RECALL_KS, batch_recall, contrastive_loss, ranking_of
from .retrieval import RetrievalTrainer, RetrievalTrainingArguments, candidate_columns, open_memories
from .trainer import load_model, train_parts


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
        positives (`str`, *optional*, defaults to `"one"`):
            What the loss asks of a question with several relevant documents: that one of them is found (`"one"`, the
            paper's), or that all are (`"all"`).
    """

    learning_rate: float = field(default=5e-6, metadata={"help": "The initial learning rate for AdamW."})
    temperature: float = field(default=0.02, metadata={"help": "Temperature of the contrastive loss."})
    in_batch_negatives: bool = field(
        default=False, metadata={"help": "Take the other questions' candidates as negatives too."}
    )
    positives: str = field(
        default="one",
        metadata={"help": "How many of a question's relevant documents are to be found.", "choices": ["one", "all"]},
    )

    def __post_init__(self):
        super().__post_init__()
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive, got {self.temperature!r}.")
        if self.positives not in ("one", "all"):
            raise ValueError(f"positives must be one or all, got {self.positives!r}.")


@dataclass
class ContrastiveRows:
    """Questions as examples: the question, its candidates, and which of them are relevant."""

    processor: CLaRaProcessor
    store: MemoryStore

    def __call__(self, row: dict, number: int) -> dict:
        candidates = candidate_columns(row, number, self.processor, self.store)
        if not candidates["pos_index"]:
            raise ValueError(
                f"row {number} (question {row['question'][:60]!r}) has no pos_index: give the positions of its "
                "relevant documents, or leave it out."
            )
        return {**candidates, EXAMPLE_INDEX: number}


class ContrastiveTrainer(RetrievalTrainer):
    """Training of the query reasoner alone, by [`~trainers.losses.contrastive_loss`] over the candidates.

    Args:
        model ([`CLaRaForRetrievalGeneration`] or `str`): or the name of a checkpoint, or of a base to begin with.
        replace_memories (`bool`): as in [`~trainers.joint.JointTrainer`].
        args, train_dataset, eval_dataset, kwargs: see [`~trainers.trainer.CLaRaTrainer`].
    """

    args: ContrastiveConfig

    def __init__(
        self,
        model: CLaRaForRetrievalGeneration | str,
        args: ContrastiveConfig,
        train_dataset: Dataset | None = None,
        eval_dataset: Dataset | None = None,
        replace_memories: bool = False,
        **kwargs,
    ):
        # What trains.
        model = load_model(model, args)
        model.add_query_reasoner()
        train_parts(model, args, QUERY_REASONER)
        # Where memories are.
        self.store = open_memories(model, args, replace_memories)
        # How rows become examples, and how these are batched.
        encode = ContrastiveRows(model.processor, self.store)
        collator = ContrastiveCollator(model.processor, self.store, args.in_batch_negatives)
        super().__init__(model, args, encode, collator, train_dataset, eval_dataset, **kwargs)
        self.prepare_datasets()

    def compute_loss(self, model, inputs: dict, return_outputs: bool = False, num_items_in_batch=None):
        """The contrastive loss. Of training batches, recall over their candidates is counted, in-batch negatives among
        them."""
        outputs = model(**model_inputs(inputs))
        is_candidate = inputs["document_index"] >= 0
        args = self.args
        loss = contrastive_loss(outputs.scores, inputs[IS_POSITIVE], is_candidate, args.temperature, args.positives)
        if self.model.training:
            for k in (1, max(RECALL_KS)):
                count(self.counters, f"recall@{k}", *batch_recall(ranking_of(outputs.scores, k), inputs[IS_POSITIVE]))
        loss = self.share_of_questions(loss, inputs)
        return (loss, outputs) if return_outputs else loss
