"""The uncompressed baseline: tune a LoRA of the plain base on the same questions, with raw documents in the prompt.

    accelerate launch recipes/text_lora.py --config recipes/nano/text_lora.yaml

The prompts are those of the CLaRa checkpoint `clara_checkpoint`, with text where it has memory slots. Training is
TRL's `SFTTrainer`; the adapter in `output_dir` is what `eval/run.py --text_model` takes.
"""

from dataclasses import dataclass, field

from datasets import Dataset
from trl import ModelConfig, SFTConfig, SFTTrainer, get_peft_config

from clara_hf.program import parse
from clara_hf.program.stages import load_split, nano_recipe
from clara_hf.program.training import (
    DataArguments,
    begin,
    check_arguments,
    checkpoint_to_resume,
    claimed,
    is_finished,
    run_folder,
    train_stage,
)
from modeling_clara import CLaRaProcessor
from modeling_clara.quantization_clara import dequantized


@dataclass
class TextArguments(DataArguments):
    """Data, the CLaRa checkpoint whose prompts are used, and where the base is a GGUF file."""

    clara_checkpoint: str = field(default="", metadata={"help": "CLaRa checkpoint whose prompts are used."})
    gguf_file: str | None = field(
        default=None, metadata={"help": "GGUF file in the base's folder; it is dequantized beside it, once."}
    )


def as_examples(rows: Dataset, processor: CLaRaProcessor) -> Dataset:
    """Rows as token ids and labels: TRL would read control tokens in a document as such."""

    def convert(row: dict) -> dict:
        answer = processor.target("answer", row["answers"])
        return processor.training_example("answer", "\n".join(row["docs"]), answer, row["question"])

    return rows.map(convert, remove_columns=rows.column_names, desc="Writing prompts")


def main(arguments: list[str] | None = None) -> None:
    types = (TextArguments, SFTConfig, ModelConfig)
    data_args, training_args, model_args = parse(types, arguments, nano_recipe("text_lora"), __doc__.split("\n")[0])
    check_arguments(data_args, training_args)
    folder = run_folder(data_args, model_args, training_args)
    with claimed(folder, training_args):
        if not data_args.overwrite and is_finished(training_args.output_dir, "adapter_config.json"):
            return
        checkpoint = checkpoint_to_resume(data_args, training_args)
        processor = CLaRaProcessor.from_pretrained(data_args.clara_checkpoint)
        with training_args.main_process_first(desc="loading data"):
            train, validation = load_split(data_args, "questions")
        base = model_args.model_name_or_path
        if data_args.gguf_file is not None:
            base = dequantized(base, data_args.gguf_file)
        begin(folder, training_args)
        trainer = SFTTrainer(
            model=base,
            args=training_args,
            train_dataset=as_examples(train, processor),
            eval_dataset=None if validation is None else as_examples(validation, processor),
            peft_config=get_peft_config(model_args),
        )
        train_stage(trainer, checkpoint, "adapter_config.json")
