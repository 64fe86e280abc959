"""The training programs, one function a stage: what `recipes/joint.py` and its sisters run."""

from clara_hf.data.schema import iter_scp
from trainers.contrastive import ContrastiveConfig, ContrastiveTrainer
from trainers.instruction import InstructionConfig, InstructionTrainer
from trainers.joint import JointConfig, JointTrainer
from trainers.scp import SCPConfig, SCPTrainer
from trainers.trainer import token_accuracy

from .recipe import answer_metrics, ranking_metrics, read_labelled_questions, read_questions, train_recipe


def scp(arguments: list[str] | None = None) -> None:
    """Stage 1: compressor, generator and memory embeddings learn to compress."""
    train_recipe(SCPTrainer, SCPConfig, "recipes/nano/scp.yaml", iter_scp, lambda *_: token_accuracy, arguments)


def instruct(arguments: list[str] | None = None) -> None:
    """Stage 2: compressor and generator learn to answer from given documents."""
    train_recipe(
        InstructionTrainer,
        InstructionConfig,
        "recipes/nano/instruct.yaml",
        read_questions,
        answer_metrics,
        arguments,
    )


def joint(arguments: list[str] | None = None) -> None:
    """Stage 3: query reasoner and generator learn from the answer's loss, over candidates."""
    train_recipe(JointTrainer, JointConfig, "recipes/nano/joint.yaml", read_questions, answer_metrics, arguments)


def contrastive(arguments: list[str] | None = None) -> None:
    """Instead of stage 3: the query reasoner learns from relevance labels."""
    train_recipe(
        ContrastiveTrainer,
        ContrastiveConfig,
        "recipes/nano/contrastive.yaml",
        read_labelled_questions,
        ranking_metrics,
        arguments,
    )
