"""Joint training on raw text: a selection model and a generator over one plain base (DRO, arXiv 2505.03075).

    accelerate launch recipes/dro.py --config recipes/nano/dro.yaml

What is in `output_dir` is loaded by `trainers.DRO.from_pretrained`.
"""

from dataclasses import dataclass, field

from clara_hf.program import parse
from clara_hf.program.stages import ANSWERS, RECALLS, load_split, nano_recipe
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
from trainers.dro import SETTINGS_FILE, DROConfig, DROTrainer


@dataclass
class BaseArguments:
    """The base that both adapters are put on."""

    model_name_or_path: str = field(metadata={"help": "A causal language model."})


def main(arguments: list[str] | None = None) -> None:
    types = (DataArguments, DROConfig, BaseArguments)
    data_args, training_args, model_args = parse(types, arguments, nano_recipe("dro"), __doc__.split("\n")[0])
    quieten(training_args)
    check_arguments(data_args, training_args, {"loss", *ANSWERS, *RECALLS})
    folder = run_folder(data_args, model_args, training_args)
    with claimed(folder, training_args):
        if not data_args.overwrite and is_finished(training_args.output_dir, SETTINGS_FILE):
            return
        checkpoint = checkpoint_to_resume(data_args, training_args)
        with training_args.main_process_first(desc="loading data"):
            train, validation = load_split(data_args, "questions")
        begin(folder, training_args)
        trainer = DROTrainer(
            model=model_args.model_name_or_path, args=training_args, train_dataset=train, eval_dataset=validation
        )
        train_stage(trainer, checkpoint, SETTINGS_FILE)
