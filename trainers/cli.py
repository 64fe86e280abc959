"""What the recipes share: parsing, the run's folder, one-sentence errors, and saving."""

import json
import logging as python_logging
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path

import datasets
import torch
import yaml
from safetensors import SafetensorError
from transformers import TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import CONFIG_NAME, logging
from trl import TrlParser

from modeling_clara import CLaRaConfig, CLaRaForRetrievalGeneration

from .quantization import quantize_base


logger = logging.get_logger(__name__)

RUN_FILE = "run.json"
# Arguments that may change between a run and its resumption.
FREE_ARGUMENTS = (
    "resume",
    "overwrite",
    "logging_dir",
    "disable_tqdm",
    "report_to",
    "run_name",
    "local_rank",
    "log_level",
)


class UsageError(ValueError):
    """The run cannot be carried out as it was asked for; the message says how to mend it."""


@dataclass
class DataArguments:
    """Files of a stage.

    Parameters:
        train_file (`str`): JSONL file, `.gz` or not, in the stage's schema.
        validation_file (`str`, *optional*): the same, for evaluation during training.
        validation_limit (`int`, *optional*): take only so many rows from its start.
        nano_world (`str`, *optional*): folder where the nano world's data are written first, if they are not there.
        resume (`bool`): go on with the run that `output_dir` holds; a finished one is reused.
        overwrite (`bool`): delete the run that `output_dir` holds.
    """

    train_file: str = field(metadata={"help": "Training data, JSONL or JSONL.gz."})
    validation_file: str | None = field(default=None, metadata={"help": "Validation data, JSONL or JSONL.gz."})
    validation_limit: int | None = field(default=None, metadata={"help": "Validation rows to take."})
    nano_world: str | None = field(default=None, metadata={"help": "Write the nano world's data here if missing."})
    resume: bool = field(default=False, metadata={"help": "Go on with the run in output_dir."})
    overwrite: bool = field(default=False, metadata={"help": "Delete the run in output_dir first."})


@dataclass
class CLaRaModelArguments:
    """Where a stage's model comes from.

    Parameters:
        model_name_or_path (`str`): a CLaRa checkpoint, or a causal language model to start a new CLaRa model from.
        dtype (`str`): of the weights, or `auto`.
        attn_implementation (`str`, *optional*): attention kernel, as in `from_pretrained`.
        clara_config (`dict`): fields of [`CLaRaConfig`]; they make a new model and override those of a checkpoint.
        prompts_file (`str`, *optional*): JSON file with the `prompts` of the configuration.
        load_in_4bit, load_in_8bit (`bool`): quantize the frozen base, see [`~trainers.quantization.quantize_base`].
    """

    model_name_or_path: str = field(metadata={"help": "A CLaRa checkpoint or a causal language model."})
    dtype: str = field(default="auto", metadata={"help": "auto, float32 or bfloat16."})
    attn_implementation: str | None = field(default=None, metadata={"help": "Attention kernel."})
    clara_config: dict | str | None = field(default=None, metadata={"help": "Fields of CLaRaConfig, YAML or JSON."})
    prompts_file: str | None = field(default=None, metadata={"help": "JSON file with prompts."})
    load_in_4bit: bool = field(default=False, metadata={"help": "Train over a base in 4 bits (QLoRA)."})
    load_in_8bit: bool = field(default=False, metadata={"help": "Train over a base in 8 bits."})

    def __post_init__(self):
        if self.load_in_4bit and self.load_in_8bit:
            raise UsageError("load_in_4bit and load_in_8bit are both set: choose one.")
        given = self.clara_config
        try:
            self.clara_config = yaml.safe_load(given) if isinstance(given, str) else given or {}
        except yaml.YAMLError as error:
            raise UsageError(f"clara_config is no valid YAML: {given!r}.") from error
        if not isinstance(self.clara_config, dict):
            raise UsageError(f"clara_config must be a mapping of CLaRaConfig fields, got {given!r}.")
        unknown = set(self.clara_config) - {known.name for known in fields(CLaRaConfig)}
        if unknown:
            raise UsageError(f"clara_config has unknown fields {sorted(unknown)}: see CLaRaConfig.")


class RecipeParser(TrlParser):
    """[`~trl.TrlParser`] that also checks the types of a YAML file's values."""

    def set_defaults_with_config(self, **kwargs) -> list[str]:
        actions = {action.dest: action for action in self._actions}
        for name, value in kwargs.items():
            if name in actions:
                self._check_type(actions[name], name, value)
        return super().set_defaults_with_config(**kwargs)

    def _check_type(self, action, name: str, value) -> None:
        if value is None or action.type is None or isinstance(value, (list, dict)):
            return
        try:
            action.type(value if isinstance(value, str) else json.dumps(value))
        except (ValueError, TypeError) as error:
            raise UsageError(f"{name}: {value!r} has the wrong type ({error}).") from error


def parse(dataclass_types: tuple, default_config: Path, arguments: list[str] | None) -> tuple:
    """Parse a recipe's YAML and command line; without `--config`, `default_config` is read.

    Raises:
        UsageError: the YAML cannot be read, or holds an unknown key or a value of the wrong type.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    if "--config" not in arguments:
        arguments = ["--config", str(default_config), *arguments]
    try:
        return RecipeParser(dataclass_types).parse_args_and_config(arguments)
    except yaml.YAMLError as error:
        raise UsageError(f"{arguments[arguments.index('--config') + 1]} is no valid YAML: {error}") from error


def quieten(training: TrainingArguments) -> None:
    """Leave progress bars and warnings to the first process."""
    if training.process_index != 0:
        python_logging.disable(python_logging.WARNING)
        logging.disable_progress_bar()
        datasets.disable_progress_bars()


def load_model(args: CLaRaModelArguments) -> CLaRaForRetrievalGeneration:
    """A CLaRa checkpoint, or a new CLaRa model over a causal language model.

    Raises:
        UsageError: the folder is not there, or its configuration and `clara_config` do not go together.
        ImportError, ValueError: the base cannot be quantized, see [`~trainers.quantization.quantize_base`].
    """
    settings = dict(args.clara_config)
    if args.prompts_file:
        settings["prompts"] = read_json(Path(args.prompts_file))
    name = args.model_name_or_path
    options = {"dtype": args.dtype}
    if args.attn_implementation:
        options["attn_implementation"] = args.attn_implementation
    config = Path(name, CONFIG_NAME)
    if Path(name).is_dir() and not config.is_file():
        raise UsageError(
            f"model_name_or_path {name} holds no model: finish the stage that writes it, or name another folder."
        )
    is_clara = config.is_file() and read_json(config).get("model_type") == CLaRaConfig.model_type
    load = CLaRaForRetrievalGeneration.from_pretrained if is_clara else CLaRaForRetrievalGeneration.from_base
    model = load(name, **options, **settings)
    if args.load_in_4bit or args.load_in_8bit:
        quantize_base(model, 4 if args.load_in_4bit else 8)
    return model


def read_json(path: Path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


def write_json(path: Path, values: dict) -> None:
    """Write beside, then rename: a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".partial")
    beside.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(beside, path)


def is_finished(output_dir: str | Path, last: str = CONFIG_NAME) -> bool:
    """Whether the folder holds a finished stage: its configuration is what saving moves in last."""
    finished = Path(output_dir, last).is_file()
    if finished:
        logger.warning(f"{output_dir} holds this run, finished: it is reused.")
    return finished


def run_settings(data: DataArguments, model, training: TrainingArguments) -> dict:
    """The arguments that make a run what it is, as they stand in its `run.json`."""
    settings = {**asdict(data), **asdict(model), **training.to_dict()}
    settings = {name: value for name, value in settings.items() if name not in FREE_ARGUMENTS}
    return json.loads(json.dumps(settings, default=str))


def check_folder(data: DataArguments, model, training: TrainingArguments) -> str | None:
    """Whether `output_dir` may be used for this run; nothing is changed.

    Returns:
        The checkpoint to resume from, or `None` to start.

    Raises:
        UsageError: the folder holds another run, or one that was not asked to be resumed or overwritten.
    """
    folder = Path(training.output_dir)
    if data.overwrite:
        return None
    if training.process_index == 0 and folder.exists() and any(folder.iterdir()):
        check_same_run(folder, run_settings(data, model, training), data.resume)
    return last_complete_checkpoint(folder) if data.resume else None


def claim_folder(data: DataArguments, model, training: TrainingArguments) -> None:
    """Record this run in `output_dir`, after deleting the run that it is to overwrite."""
    if training.process_index != 0:
        return
    folder = Path(training.output_dir)
    if data.overwrite and folder.exists():
        shutil.rmtree(folder)
    write_json(folder / RUN_FILE, run_settings(data, model, training))


def check_same_run(folder: Path, settings: dict, resume: bool) -> None:
    if not (folder / RUN_FILE).is_file():
        raise UsageError(f"output_dir {folder} is not empty and holds no run: choose another folder.")
    if not resume:
        raise UsageError(f"output_dir {folder} holds a run: pass --resume true to go on with it, or --overwrite true.")
    before = read_json(folder / RUN_FILE)
    changed = sorted(name for name in {*before, *settings} if before.get(name) != settings.get(name))
    if changed:
        name = changed[0]
        raise UsageError(
            f"output_dir {folder} holds a run with other arguments ({name}: {before.get(name)!r} there, "
            f"{settings.get(name)!r} now): pass --overwrite true to replace it, or another output_dir."
        )


def last_complete_checkpoint(folder: Path) -> str | None:
    """The newest `checkpoint-N` that was written to its end; later, half-written ones are passed over."""
    steps = {path: int(path.name.rpartition("-")[2]) for path in folder.glob("checkpoint-*") if path.name[-1].isdigit()}
    for path in sorted(steps, key=steps.get, reverse=True):
        try:
            if read_json(path / TRAINER_STATE_NAME)["global_step"] == steps[path]:
                return str(path)
        except (OSError, ValueError, KeyError):
            logger.warning(f"{path} was not written to its end and is passed over.")
    return None


def save_stage(trainer, last: str = CONFIG_NAME) -> None:
    """Write the trained model into the run's folder: beside first, then file by file, its configuration last."""
    folder = Path(trainer.args.output_dir)
    partial = folder / "final.partial"
    if trainer.is_world_process_zero():
        shutil.rmtree(partial, ignore_errors=True)
    trainer.save_model(str(partial))
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        trainer.state.save_to_json(str(folder / TRAINER_STATE_NAME))
        for path in sorted(partial.iterdir(), key=lambda path: path.name == last):
            os.replace(path, folder / path.name)
        partial.rmdir()


def train_stage(trainer, checkpoint: str | None, last: str = CONFIG_NAME) -> None:
    """Train, from `checkpoint` if given, and save. Ctrl-C leaves the checkpoints for `--resume true`."""
    trainer.train(resume_from_checkpoint=checkpoint)
    save_stage(trainer, last)


def run(main: Callable[[list[str] | None], None]) -> None:
    """Run a recipe as a program: what the user can mend is one sentence on stderr and a non-zero exit code."""
    logging.set_verbosity_warning()
    name = Path(sys.argv[0]).name
    try:
        main(None)
    except KeyboardInterrupt:
        sys.exit(f"{name}: interrupted; the same command with --resume true goes on from the last checkpoint.")
    except (ValueError, OSError, ImportError, SafetensorError) as error:
        sys.exit(f"{name}: {one_sentence(error)}")
    finally:
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def one_sentence(error: Exception) -> str:
    """An error's message in one line, with what to do where the disk is full."""
    text = " ".join(str(error).split()) or type(error).__name__
    if "No space left" in text:
        return f"the disk is full ({text}): free some space and run the same command with --resume true."
    return text
