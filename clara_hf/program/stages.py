"""The training stages as programs: what `clara joint`, `recipes/joint.py` and their sisters run."""

from collections.abc import Callable
from dataclasses import dataclass, fields

from datasets import Dataset
from transformers import set_seed
from transformers.utils import logging

from clara_hf.data.mapped import distinct_texts
from clara_hf.program import UsageError, option, parse
from clara_hf.program.models import CLaRaModelArguments, load_model
from clara_hf.program.training import DataArguments, carry_out, nano_recipe
from trainers.arguments import CLaRaTrainingArguments
from trainers.contrastive import ContrastiveConfig, ContrastiveTrainer
from trainers.dro import DROConfig, DROTrainer
from trainers.dro.model import SETTINGS_FILE
from trainers.instruction import InstructionConfig, InstructionTrainer
from trainers.joint import JointConfig, JointTrainer
from trainers.retrieval import RetrievalTrainer
from trainers.scp import SCPConfig, SCPTrainer
from trainers.trainer import CLaRaTrainer


logger = logging.get_logger(__name__)


def scp(arguments: list[str] | None = None) -> None:
    """Stage 1: compressor, generator and memory embeddings learn to compress."""
    train(SCPTrainer, SCPConfig, "scp", "scp", arguments)


def instruct(arguments: list[str] | None = None) -> None:
    """Stage 2: compressor and generator learn to answer from given documents."""
    train(InstructionTrainer, InstructionConfig, "instruct", "questions", arguments)


def joint(arguments: list[str] | None = None) -> None:
    """Stage 3: query reasoner and generator learn from the answer's loss, over candidates."""
    train(JointTrainer, JointConfig, "joint", "questions", arguments)


def contrastive(arguments: list[str] | None = None) -> None:
    """Instead of stage 3: the query reasoner learns from relevance labels."""
    train(ContrastiveTrainer, ContrastiveConfig, "contrastive", "labelled", arguments)


@dataclass
class BaseArguments:
    """The base that both of DRO's adapters are put on."""

    model_name_or_path: str = option(help="A causal language model.")


def dro(arguments: list[str] | None = None) -> None:
    """Joint training on raw text, for comparison; `trainers.DRO.from_pretrained` loads what is in `output_dir`."""
    types = (DataArguments, DROConfig, BaseArguments)
    data, training, base = parse(types, arguments, nano_recipe("dro"), summary(DROTrainer))

    def make(begin: Callable[[], None], train_rows: Dataset, validation: Dataset | None) -> DROTrainer:
        begin()
        return DROTrainer(base.model_name_or_path, training, train_rows, validation)

    carry_out(data, base, training, "questions", make, SETTINGS_FILE, DROTrainer.scores(training), "dro")


def train(
    trainer: type[CLaRaTrainer],
    config: type[CLaRaTrainingArguments],
    recipe: str,
    rows: str,
    arguments: list[str] | None,
) -> None:
    """Carry out one stage as the YAML and command line say, see [`~clara_hf.program.training.carry_out`].

    Args:
        trainer, config: the stage's trainer and its arguments.
        recipe: name of its YAML file for the nano world, which is read where no other is given.
        rows: kind of its rows.
    """
    types = (DataArguments, config, CLaRaModelArguments)
    data, training, model_args = parse(types, arguments, nano_recipe(recipe), summary(trainer))
    move_settings(model_args, training)

    def make(begin: Callable[[], None], train_rows: Dataset, validation: Dataset | None) -> CLaRaTrainer:
        # Fresh adapters are drawn at random: alike in every process, and in a run that starts again.
        set_seed(training.seed)
        model = load_model(model_args)
        check_user_texts(model.processor, [(data.train_file, train_rows), (data.validation_file, validation)])
        begin()
        # What an overwritten run left: the memories are used again if this model's compressor made them.
        options = {"replace_memories": data.overwrite} if issubclass(trainer, RetrievalTrainer) else {}
        return trainer(model, training, train_rows, validation, **options)

    carry_out(data, model_args, training, rows, make, scores=trainer.scores(training), stage=recipe)


def summary(trainer: type) -> str:
    """What the docstring of a trainer says before its arguments, which are those of Python."""
    return str(trainer.__doc__).partition("\n\n    Args:")[0]


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
