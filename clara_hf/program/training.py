"""What the recipes share: parsing, the run's folder, one-sentence errors, and saving."""

import argparse
import json
import logging as python_logging
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import get_type_hints

import datasets
import torch
import yaml
from safetensors import SafetensorError
from transformers import TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.utils import CONFIG_NAME, logging
from trl import TrlParser

from modeling_clara import CLaRaConfig, CLaRaForRetrievalGeneration
from trainers.checkpoints import damaged_file, holds_training_state
from trainers.quantization import quantize_base
from trainers.trainer import MEMORIES_FOLDER


logger = logging.get_logger(__name__)

RUN_FILE = "run.json"
# The finished model is written in here before its files are moved into the run's folder.
SAVED_FOLDER = "final.partial"
PROCESSES = "num_processes"
# Arguments that may change between a run and its resumption: they change no number that training computes.
FREE_ARGUMENTS = (
    "resume",
    "overwrite",
    "logging_dir",
    "disable_tqdm",
    "report_to",
    "run_name",
    "local_rank",
    "log_level",
    "save_total_limit",
    "memory_store",
    "memory_batch_size",
    "verify_memories",
    "per_device_eval_batch_size",
    "eval_accumulation_steps",
    "dataset_num_proc",
    "dataloader_num_workers",
    "dataloader_persistent_workers",
    "dataloader_pin_memory",
    "dataloader_prefetch_factor",
    "dataloader_multiprocessing_context",
    "ddp_timeout",
)


class UsageError(ValueError):
    """The run cannot be carried out as it was asked for; the message says how to mend it."""


@dataclass
class DataArguments:
    """Files of a stage.

    Parameters:
        train_file (`str`): JSONL file, `.gz` or not, in the stage's schema.
        train_limit (`int`, *optional*): take only so many rows from its start, where a short run needs no more.
        validation_file (`str`, *optional*): the same, for evaluation during training.
        validation_limit (`int`, *optional*): take only so many rows from its start.
        resume (`bool`): go on with the run that `output_dir` holds; a finished one is reused.
        overwrite (`bool`): delete the run that `output_dir` holds, but for memories that this one can use.
    """

    train_file: str = field(metadata={"help": "Training data, JSONL or JSONL.gz."})
    train_limit: int | None = field(default=None, metadata={"help": "Training rows to take."})
    validation_file: str | None = field(default=None, metadata={"help": "Validation data, JSONL or JSONL.gz."})
    validation_limit: int | None = field(default=None, metadata={"help": "Validation rows to take."})
    resume: bool = field(default=False, metadata={"help": "Go on with the run in output_dir."})
    overwrite: bool = field(default=False, metadata={"help": "Delete the run in output_dir first."})

    def __post_init__(self):
        for name in ("train_limit", "validation_limit"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be at least 1, or absent for all rows.")


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
        if self.dtype != "auto" and not isinstance(getattr(torch, self.dtype, None), torch.dtype):
            raise UsageError(f"dtype is {self.dtype!r}: it must be auto, float32, bfloat16 or float16.")


class RecipeParser(TrlParser):
    """[`~trl.TrlParser`] that also checks the types of a YAML file's values."""

    def set_defaults_with_config(self, **kwargs) -> list[str]:
        actions = {action.dest: action for action in self._actions}
        declared = {name: str(kind) for types in self.dataclass_types for name, kind in get_type_hints(types).items()}
        for name, value in kwargs.items():
            if name in actions and value is not None and not has_type(value, declared.get(name, "")):
                self._check_type(actions[name].type, name, value)
        return super().set_defaults_with_config(**kwargs)

    def _check_type(self, convert: Callable | None, name: str, value) -> None:
        """Raise unless `convert`, what the command line's text is read with, takes a value of another type."""
        if isinstance(value, (list, dict)) or (convert is str and not isinstance(value, str)):
            raise UsageError(f"{name}: {value!r} has the wrong type (a {type(value).__name__}).")
        try:
            if convert is not None:
                convert(value if isinstance(value, str) else json.dumps(value))
        except (ValueError, TypeError, argparse.ArgumentTypeError) as error:
            raise UsageError(f"{name}: {value!r} has the wrong type ({error}).") from error


def has_type(value, annotation: str) -> bool:
    """Whether `annotation`, as in `dict | str | None`, names the type of `value`."""
    return re.search(rf"\b{type(value).__name__}\b", annotation) is not None


def parse(dataclass_types: tuple, default_config: str, arguments: list[str] | None) -> tuple:
    """Parse a recipe's YAML and command line; without `--config`, `default_config` is read.

    Raises:
        UsageError: the YAML cannot be read, or holds an unknown key or a value of the wrong type.
    """
    given = sys.argv[1:] if arguments is None else arguments
    arguments = [part for text in given for part in (text.split("=", 1) if text.startswith("--config=") else [text])]
    if arguments[-1:] == ["--config"]:
        raise UsageError("--config needs the name of a YAML file after it.")
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
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UsageError(f"{path} is no valid JSON ({error}).") from error


def write_json(path: Path, values: dict) -> None:
    """Write beside, then rename: a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(path.name + ".partial")
    beside.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(beside, path)


def is_finished(output_dir: str | Path, last: str = CONFIG_NAME) -> bool:
    """Whether the folder holds a finished stage: its configuration is what saving moves in last.

    With `push_to_hub` the Trainer copies models of unfinished runs into the folder too, without the run's state.
    """
    folder = Path(output_dir)
    is_saved = (folder / last).is_file() and (folder / TRAINER_STATE_NAME).is_file()
    finished = is_saved and not (folder / SAVED_FOLDER).exists()
    if finished:
        logger.warning(f"{output_dir} holds this run, finished: it is reused.")
    return finished


def run_settings(data: DataArguments, model, training: TrainingArguments) -> dict:
    """The arguments that make a run what it is, as they stand in its `run.json`."""
    settings = {**asdict(data), **asdict(model), **training.to_dict(), PROCESSES: training.world_size}
    settings = {name: value for name, value in settings.items() if name not in FREE_ARGUMENTS}
    return json.loads(json.dumps(settings, default=str))


def check_arguments(data: DataArguments, training: TrainingArguments) -> None:
    """Raise for what a run would only find out after its longest work.

    Raises:
        UsageError: names the argument and how to mend it.
    """
    if training.resume_from_checkpoint is not None:
        raise UsageError(
            f"resume_from_checkpoint is {training.resume_from_checkpoint!r}, which recipes do not take: --resume true "
            "goes on from the last whole checkpoint in output_dir."
        )
    if training.eval_strategy != "no" and data.validation_file is None:
        raise UsageError(
            f"eval_strategy is {training.eval_strategy.value!r} without a validation_file: name one, or set "
            "eval_strategy to 'no'."
        )


def check_folder(data: DataArguments, model, training: TrainingArguments) -> None:
    """Whether `output_dir` may be used for this run; nothing is changed.

    Raises:
        UsageError: the folder holds another run, or one that was not asked to be resumed or overwritten; or arguments
            that do not go together.
    """
    check_arguments(data, training)
    folder = Path(training.output_dir)
    if training.process_index == 0 and folder.exists() and names_in(folder) - {MEMORIES_FOLDER}:
        check_same_run(folder, run_settings(data, model, training), data)


def checkpoint_to_resume(data: DataArguments, training: TrainingArguments) -> str | None:
    """The checkpoint to resume from, or `None` to start."""
    return last_complete_checkpoint(Path(training.output_dir)) if data.resume and not data.overwrite else None


@contextmanager
def claimed_folder(data: DataArguments, model, training: TrainingArguments) -> Iterator[None]:
    """Record this run in `output_dir`, after deleting the run that it is to overwrite.

    If what is done inside fails before anything was trained, the folder is free again, for other arguments too.
    Memories are never deleted here: they know which compressor made them.
    """
    folder = Path(training.output_dir)
    if training.process_index == 0:
        if data.overwrite and (folder / RUN_FILE).is_file():
            delete_run(folder, keep_memories=reads_own_memories(training))
        write_json(folder / RUN_FILE, run_settings(data, model, training))
    try:
        yield
    except BaseException:
        if training.process_index == 0 and folder.is_dir() and not holds_training(folder):
            delete_run(folder, keep_memories=True)
        raise


def names_in(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def holds_training(folder: Path) -> bool:
    """Whether a run's folder holds more than its record and memories."""
    return not names_in(folder) <= {RUN_FILE, MEMORIES_FOLDER}


def reads_own_memories(training: TrainingArguments) -> bool:
    """Whether the stage's memory store is the one in its `output_dir`."""
    return getattr(training, "memory_store", "") is None


def delete_run(folder: Path, keep_memories: bool) -> None:
    """Delete a run's folder, or all but its memories, the record of the run last."""
    for path in sorted(folder.iterdir(), key=lambda path: path.name == RUN_FILE):
        if path.name == MEMORIES_FOLDER and keep_memories:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()
    if not names_in(folder):
        folder.rmdir()


def check_same_run(folder: Path, settings: dict, data: DataArguments) -> None:
    if not (folder / RUN_FILE).is_file():
        raise UsageError(f"output_dir {folder} is not empty and holds no run: choose another folder.")
    if data.overwrite:
        return
    if not data.resume:
        raise UsageError(f"output_dir {folder} holds a run: pass --resume true to go on with it, or --overwrite true.")
    if not holds_training(folder):
        return
    before = {PROCESSES: settings[PROCESSES], **read_json(folder / RUN_FILE)}
    names = {*before, *settings} - set(FREE_ARGUMENTS)
    changed = sorted(name for name in names if before.get(name) != settings.get(name))
    if changed == [PROCESSES]:
        raise UsageError(other_processes(folder, before, settings))
    if changed:
        name = next(name for name in changed if name != PROCESSES)
        raise UsageError(
            f"output_dir {folder} holds a run with other arguments ({name}: {before.get(name)!r} there, "
            f"{settings.get(name)!r} now): pass --overwrite true to replace it, or another output_dir."
        )


def other_processes(folder: Path, before: dict, settings: dict) -> str:
    """What is wrong with resuming a run with another number of processes, and how its global batch is kept."""
    rows = settings["per_device_train_batch_size"] * settings["gradient_accumulation_steps"]
    return (
        f"output_dir {folder} holds a run with another number of processes ({before[PROCESSES]} there, "
        f"{settings[PROCESSES]} now): start {before[PROCESSES]} again (--num_processes of accelerate launch), or begin "
        "anew with --overwrite true and keep the global batch, per_device_train_batch_size x "
        f"gradient_accumulation_steps x processes, at {rows * before[PROCESSES]}."
    )


def last_complete_checkpoint(folder: Path) -> str | None:
    """The newest `checkpoint-N` that was written to its end and is not damaged; others are passed over, and told.

    Raises:
        UsageError: there are checkpoints, and training cannot go on from any of them.
    """
    steps = {path: int(path.name.rpartition("-")[2]) for path in folder.glob("checkpoint-*") if path.name[-1].isdigit()}
    for path in sorted(steps, key=steps.get, reverse=True):
        try:
            is_whole = read_json(path / TRAINER_STATE_NAME)["global_step"] == steps[path]
        except (OSError, ValueError, KeyError):
            is_whole = False
        if not is_whole:
            logger.warning(f"{path} was not written to its end and is passed over.")
            continue
        if not holds_training_state(path):
            raise UsageError(
                f"{path} holds the model alone, as with save_only_model, so that training cannot go on from it: pass "
                f"--overwrite true to begin anew, or start from it with --model_name_or_path {path} and another "
                "--output_dir."
            )
        damaged = damaged_file(path)
        if damaged is None:
            return str(path)
        logger.warning(f"{damaged} is damaged: its checkpoint is passed over.")
    if steps:
        raise UsageError(
            f"no checkpoint in {folder} is whole: pass --overwrite true to begin anew, or choose another output_dir."
        )
    return None


def save_stage(trainer, last: str = CONFIG_NAME) -> None:
    """Write the trained model into the run's folder: beside first, then file by file, its configuration last."""
    folder = Path(trainer.args.output_dir)
    partial = folder / SAVED_FOLDER
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


def run(main: Callable[[list[str] | None], None], again: str = "the same command with --resume true") -> None:
    """Run a recipe as a program: what the user can mend is one sentence on stderr and a non-zero exit code.

    Args:
        again: what goes on with an interrupted run.
    """
    logging.set_verbosity_warning()
    name = Path(sys.argv[0]).name
    before = signal.signal(signal.SIGINT, stop_quietly_unless(os.getpid()))
    try:
        main(None)
    except BaseException as error:
        if was_interrupted(error):
            sys.exit(f"{name}: interrupted; {again} goes on from what is finished.")
        if isinstance(error, (ValueError, OSError, ImportError, SafetensorError)) or is_full_disk(error):
            sys.exit(f"{name}: {one_sentence(error, again)}")
        raise
    finally:
        signal.signal(signal.SIGINT, before)
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def stop_quietly_unless(process: int) -> Callable:
    """A handler of Ctrl-C: `process` is interrupted; others that it forked, which get it too, just end."""

    def handle(number, frame):
        if os.getpid() != process:
            os._exit(128 + number)
        raise KeyboardInterrupt

    return handle


def was_interrupted(error: BaseException | None) -> bool:
    """Whether `error` is, or came while handling, Ctrl-C: libraries that are stopped may raise errors of their own."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def is_full_disk(error: BaseException) -> bool:
    """Whether a write found no space; `torch.save` says so in a way of its own."""
    return "No space left" in str(error) or "inline_container.cc" in str(error)


def one_sentence(error: BaseException, again: str) -> str:
    """An error's message in one line, with what to do where the disk is full."""
    text = str(error)
    if text.startswith("Caught ") and "Traceback" in text:  # in a data-loader worker, whose stack is in the message
        text = text.strip().splitlines()[-1].partition(": ")[2] or text
    text = " ".join(text.split()) or type(error).__name__
    if is_full_disk(error):
        return f"the disk is full ({text}): free some space and run {again}."
    return text
