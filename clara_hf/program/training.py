"""The life of a training run: its data arguments, when it goes on, from which checkpoint, and saving."""

import logging as python_logging
import os
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import datasets
from datasets import Dataset
from transformers import Trainer, TrainingArguments
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import rotate_checkpoints
from transformers.utils import CONFIG_NAME, logging

from clara_hf.data.mapped import shared_questions, training_rows
from clara_hf.data.sources import digest_of
from clara_hf.program import RunFolder, UsageError, option, read_json
from clara_hf.program.folders import first_difference
from trainers.checkpoints import PARTIAL_FOLDER, CheckpointTrainer, damaged_file, holds_training_state
from trainers.retrieval import MEMORIES_FOLDER


logger = logging.get_logger(__name__)

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


@dataclass
class DataArguments:
    """Files of a stage.

    Parameters:
        train_file (`str`): JSONL file, `.gz` or not, in the stage's schema.
        train_limit (`int`, *optional*): take only this many rows from its start, where a short run needs no more.
        validation_file (`str`, *optional*): the same, for evaluation during training; `none` drops that of a YAML file.
        validation_limit (`int`, *optional*): take only this many rows from its start.
        resume (`bool`): go on with a run of equal settings that `output_dir` holds; a finished one is reused.
        overwrite (`bool`): delete the run that `output_dir` holds, but for memories that this one can use.
    """

    train_file: str = option(help="Training data, JSONL or JSONL.gz.")
    train_limit: int | None = option(None, "Training rows to take.", aliases="--limit")
    validation_file: str | None = option(None, "Validation data, or none.")
    validation_limit: int | None = option(None, "Validation rows to take.")
    resume: bool = option(True, "Resume the run in output_dir if its settings are the same.")
    overwrite: bool = option(False, "Delete the run in output_dir first.")

    def __post_init__(self):
        self.validation_file = None if self.validation_file == "none" else self.validation_file
        for name in ("train_limit", "validation_limit"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise UsageError(f"{name} is {getattr(self, name)}; it must be at least 1, or absent for all rows.")


def quieten(training: TrainingArguments) -> None:
    """Leave progress bars and warnings to the first process."""
    if training.process_index != 0:
        python_logging.disable(python_logging.WARNING)
        logging.disable_progress_bar()
        datasets.disable_progress_bars()


def carry_out(
    data: DataArguments,
    model,
    training: TrainingArguments,
    rows: str,
    make: Callable[[Callable[[], None], Dataset, Dataset | None], Trainer],
    last: str = CONFIG_NAME,
    scores: list[str] | None = None,
    stage: str | None = None,
) -> None:
    """A training run, from its claim on `output_dir` to the saved model; a finished one is reused. Ctrl-C leaves the
    checkpoints to resume from.

    Args:
        data, model, training: dataclasses of arguments.
        rows: kind of its rows, as of [`~clara_hf.data.mapped.training_rows`].
        make: makes the trainer from training and validation rows; it calls its first argument, which records the run,
            when nothing is left to refuse.
        last: file of the model that saving moves in last.
        scores: names that evaluation gives, where they are known.
        stage: its name in the record.

    Raises:
        UsageError, DataError, ValueError, OSError: one sentence that says what to mend.
    """
    quieten(training)
    check_arguments(data, training, scores)
    folder = run_folder(data, model, training, stage)
    # The first process claims the folder for all.
    with folder.claimed() if training.process_index == 0 else nullcontext():
        if not data.overwrite and is_finished(training.output_dir, last):
            return
        checkpoint = None
        if data.resume and not data.overwrite:
            checkpoint = last_complete_checkpoint(Path(training.output_dir))
        # The first process may write what all read.
        with training.main_process_first(desc="loading data"):
            train_rows, validation = load_split(data, rows)
        trainer = make(lambda: begin(folder, training), train_rows, validation)
        trainer.train(resume_from_checkpoint=checkpoint)
        save_stage(trainer, last)


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


def check_arguments(data: DataArguments, training: TrainingArguments, scores: list[str] | None) -> None:
    """Raise for what a run would only find out after its longest work.

    Args:
        scores: names that evaluation gives, where they are known.

    Raises:
        UsageError: names the argument and how to mend it.
    """
    if training.resume_from_checkpoint is not None:
        raise UsageError(
            f"resume_from_checkpoint is {training.resume_from_checkpoint!r}, which recipes do not take: the same "
            "command goes on from the last whole checkpoint in output_dir."
        )
    if data.validation_file is None:
        if training.eval_strategy != "no":
            raise UsageError(
                f"eval_strategy is {training.eval_strategy.value!r} without a validation_file: name one, or set "
                "eval_strategy to 'no'."
            )
        if training.eval_on_start:
            raise UsageError(
                "eval_on_start is true without a validation_file: name one, or set eval_on_start to false."
            )
    wanted = (training.metric_for_best_model or "loss").removeprefix("eval_")
    if scores is not None and wanted not in scores:
        known = ", ".join(scores)
        raise UsageError(f"metric_for_best_model is {training.metric_for_best_model!r}: it must be one of {known}.")


def run_settings(data: DataArguments, model, training: TrainingArguments, stage: str | None) -> dict:
    """What makes a run what it is, as it stands in its `run.json`: stage, arguments, and digests of the data."""
    settings = {**asdict(data), **asdict(model), **training.to_dict(), PROCESSES: training.world_size}
    settings = {name: value for name, value in settings.items() if name not in FREE_ARGUMENTS}
    files = {file for file in (data.train_file, data.validation_file) if file is not None and Path(file).is_file()}
    return {**settings, "stage": stage, "digests": {file: digest_of(file) for file in sorted(files)}}


def run_folder(data: DataArguments, model, training: TrainingArguments, stage: str | None) -> RunFolder:
    """The run's `output_dir`. Memories are kept: they know which compressor made them."""
    return RunFolder(
        training.output_dir,
        run_settings(data, model, training, stage),
        overwrite=data.overwrite,
        resume=data.resume,
        kept=(MEMORIES_FOLDER,),
        described=difference,
    )


def begin(folder: RunFolder, training: TrainingArguments) -> None:
    """Record the run. What it overwrites takes its memories along, unless this one reads them."""
    if training.process_index == 0:
        reads_own_memories = getattr(training, "memory_store", "") is None
        folder.begin(keep=(MEMORIES_FOLDER,) if reads_own_memories else ())


def difference(before: dict, now: dict) -> str | None:
    """What makes a recorded run another one than this, as the end of a sentence."""
    unrecorded = (PROCESSES, "stage", "digests")  # by earlier versions
    before = {**{name: now[name] for name in unrecorded if name in now}, **before}
    before, now = ({k: v for k, v in one.items() if k not in FREE_ARGUMENTS} for one in (before, now))
    told = first_difference({**before, PROCESSES: 0}, {**now, PROCESSES: 0})
    if told is not None or before[PROCESSES] == now[PROCESSES]:
        return told
    size = "max_tokens_per_batch" if now.get("max_tokens_per_batch") else "per_device_train_batch_size"
    total = now[size] * now["gradient_accumulation_steps"] * before[PROCESSES]
    return (
        f"another number of processes ({before[PROCESSES]} there, {now[PROCESSES]} now): start {before[PROCESSES]} "
        "again (--num_processes of accelerate launch), or begin anew with --overwrite true and keep the global batch, "
        f"{size} x gradient_accumulation_steps x processes, at {total}."
    )


def is_finished(output_dir: str | Path, last: str = CONFIG_NAME) -> bool:
    """Whether the folder holds a finished stage: its configuration is what saving moves in last.

    A model that was saved there otherwise is without the run's state.
    """
    folder = Path(output_dir)
    is_saved = (folder / last).is_file() and (folder / TRAINER_STATE_NAME).is_file()
    finished = is_saved and not (folder / SAVED_FOLDER).exists()
    if finished:
        logger.warning(f"{output_dir} holds this run, finished: it is reused.")
    return finished


def last_complete_checkpoint(folder: Path) -> str | None:
    """The newest `checkpoint-N` that was written to its end and is not damaged; others are passed over, and told.
    `None` where none was ever written to its end.

    Raises:
        UsageError: there are checkpoints, and training cannot go on from any of them.
    """
    steps = {path: int(path.name.rpartition("-")[2]) for path in folder.glob("checkpoint-*") if path.name[-1].isdigit()}
    for path in sorted(steps, key=steps.__getitem__, reverse=True):
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
    # The state is written last: a folder without it is what a kill left of a first checkpoint, and nothing is lost.
    states = [path / TRAINER_STATE_NAME for path in steps]
    if any(state.is_file() and state.stat().st_size for state in states):
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
    is_ours = isinstance(trainer, CheckpointTrainer)
    trainer.save_model(str(partial), _internal_call=is_ours)
    trainer.accelerator.wait_for_everyone()
    if trainer.is_world_process_zero():
        trainer.state.save_to_json(str(folder / TRAINER_STATE_NAME))
        for path in sorted(partial.iterdir(), key=lambda path: path.name == last):
            os.replace(path, folder / path.name)
        partial.rmdir()
        # A kill leaves half a checkpoint; one between a checkpoint and the removal of that before leaves both.
        shutil.rmtree(folder / PARTIAL_FOLDER, ignore_errors=True)
        rotate_checkpoints(str(folder), trainer.args.save_total_limit, trainer.state.best_model_checkpoint)
    if is_ours and trainer.args.push_to_hub:
        trainer.push_saved()
