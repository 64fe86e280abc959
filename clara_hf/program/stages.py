"""The training stages as programs: what `clara joint`, `recipes/joint.py` and their sisters run."""

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

from datasets import Dataset
from transformers import set_seed
from transformers.utils import logging

from clara_hf.data.mapped import distinct_texts, shared_questions, training_rows
from clara_hf.program import UsageError, parse
from clara_hf.program.models import CLaRaModelArguments, load_model
from clara_hf.program.training import (
    DataArguments,
    begin,
    check_arguments,
    checkpoint_to_resume,
    claimed,
    is_finished,
    quieten,
    run_folder,
    train_stage,
)
from trainers.contrastive import ContrastiveConfig, ContrastiveTrainer
from trainers.instruction import InstructionConfig, InstructionTrainer
from trainers.joint import JointConfig, JointTrainer
from trainers.scp import SCPConfig, SCPTrainer
from trainers.trainer import CLaRaTrainer, CLaRaTrainingArguments


logger = logging.get_logger(__name__)

RECALLS = {"recall@1", "recall@3", "recall@5"}
ANSWERS = {"f1", "em", "cover_em"}


@dataclass(frozen=True)
class Stage:
    """What differs between the stages.

    Parameters:
        trainer, config: the trainer and its arguments.
        yaml: the recipe of the nano world, which is read where no other is given.
        rows: kind of its rows, as of [`~clara_hf.data.mapped.training_rows`].
        scores: names that evaluation may give.
    """

    trainer: type[CLaRaTrainer]
    config: type[CLaRaTrainingArguments]
    yaml: str
    rows: Literal["scp", "questions", "labelled"]
    scores: frozenset[str] | set[str]


def scp(arguments: list[str] | None = None) -> None:
    """Stage 1: compressor, generator and memory embeddings learn to compress."""
    train(Stage(SCPTrainer, SCPConfig, "scp", "scp", {"loss", "token_accuracy"}), arguments)


def instruct(arguments: list[str] | None = None) -> None:
    """Stage 2: compressor and generator learn to answer from given documents."""
    scores = {"loss", *ANSWERS}
    train(Stage(InstructionTrainer, InstructionConfig, "instruct", "questions", scores), arguments)


def joint(arguments: list[str] | None = None) -> None:
    """Stage 3: query reasoner and generator learn from the answer's loss, over candidates."""
    scores = {"loss", *ANSWERS, *RECALLS}
    train(Stage(JointTrainer, JointConfig, "joint", "questions", scores), arguments)


def contrastive(arguments: list[str] | None = None) -> None:
    """Instead of stage 3: the query reasoner learns from relevance labels."""
    train(Stage(ContrastiveTrainer, ContrastiveConfig, "contrastive", "labelled", {"loss", *RECALLS}), arguments)


def train(stage: Stage, arguments: list[str] | None) -> None:
    """Carry out one stage as the YAML and command line say; a finished run is reused.

    Raises:
        UsageError, DataError, ValueError, OSError: one sentence that says what to mend.
    """
    types = (DataArguments, stage.config, CLaRaModelArguments)
    data_args, training_args, model_args = parse(types, arguments, nano_recipe(stage.yaml), stage.trainer.__doc__)
    quieten(training_args)
    move_settings(model_args, training_args)
    check_arguments(data_args, training_args, stage.scores)
    folder = run_folder(data_args, model_args, training_args)
    with claimed(folder, training_args):
        if not data_args.overwrite and is_finished(training_args.output_dir):
            return
        checkpoint = checkpoint_to_resume(data_args, training_args)
        # The first process may write what all read.
        with training_args.main_process_first(desc="loading data"):
            train_rows, validation = load_split(data_args, stage.rows)
        # Fresh adapters are drawn at random: alike in every process, and in a run that starts again.
        set_seed(training_args.seed)
        model = load_model(model_args)
        check_user_texts(model.processor, [(data_args.train_file, train_rows), (data_args.validation_file, validation)])
        # What an overwritten run left: the memories are used again if this model's compressor made them.
        options = {"replace_memories": data_args.overwrite} if hasattr(training_args, "memory_store") else {}
        begin(folder, training_args)
        trainer = stage.trainer(
            model=model,
            args=training_args,
            train_dataset=train_rows,
            eval_dataset=validation,
            **options,
        )
        train_stage(trainer, checkpoint)


def move_settings(model: CLaRaModelArguments, training: CLaRaTrainingArguments) -> None:
    """Move what `clara_config` says of a setting that the stage has an argument for, its former place, to the argument.

    Raises:
        UsageError: both say it.
    """
    own = {known.name for known in fields(training) if known.default is None}
    for name in own & {"top_k", "temperature", "topk_taken_mask", "mse_weight"} & set(model.clara_config):
        value = model.clara_config.pop(name)
        if getattr(training, name) is not None:
            raise UsageError(f"{name} is given twice: leave it out of clara_config.")
        logger.warning(f"{name} belongs beside the stage's other arguments, no longer in clara_config.")
        setattr(training, name, value)


def nano_recipe(stage: str) -> str | None:
    """The stage's recipe for the nano world, where the program runs in the repository."""
    path = Path("recipes", "nano", f"{stage}.yaml")
    return str(path) if path.is_file() else None


def load_split(data: DataArguments, kind: str) -> tuple[Dataset, Dataset | None]:
    """Training and validation data of a kind, up to their limits, memory-mapped."""
    train_rows = training_rows(data.train_file, kind, data.train_limit)
    if data.validation_file is None:
        return train_rows, None
    validation = training_rows(data.validation_file, kind, data.validation_limit, targets=False)
    if shared := shared_questions(train_rows, validation):
        logger.warning(
            f"validation_file {data.validation_file}: {shared} of {len(validation)} rows ask what rows of train_file "
            f"{data.train_file} ask, too, so that its scores say little about new questions."
        )
    return train_rows, validation


def check_user_texts(processor, files: list[tuple[str | None, Dataset | None]]) -> None:
    """Raise where a text holds a token that the model reserves.

    Raises:
        UsageError: names file, row (from 1) and token.
    """
    for file, rows in files:
        for name in ("question", "answers", "docs") if rows is not None else ():
            for number, texts in distinct_texts(rows, name):
                try:
                    processor.check_user_texts(texts, name)
                except ValueError as error:
                    raise UsageError(f"{file}, row {number}: {error}") from error
