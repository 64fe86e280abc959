"""The uncompressed baseline: tune a LoRA of the plain base on the same questions, with raw documents in the prompt.

    accelerate launch recipes/text_lora.py --config recipes/nano/text_lora.yaml

The prompts are those of the CLaRa checkpoint `clara_checkpoint`, with text where it has memory slots. Training is
TRL's `SFTTrainer`; the adapter in `output_dir` is what `eval/run.py --text_model` takes.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

from datasets import Dataset
from trl import ModelConfig, SFTConfig, SFTTrainer, get_peft_config

from clara_hf.program import UsageError, option, parse
from clara_hf.program.training import DataArguments, carry_out, nano_recipe
from modeling_clara import CLaRaProcessor
from modeling_clara.configuration_clara import give_usual_rights
from modeling_clara.quantization_clara import dequantized
from modeling_clara.weights_clara import absolute_place
from trainers.checkpoints import EndsAtLastStep


@dataclass
class TextArguments(DataArguments):
    """Data, the CLaRa checkpoint whose prompts are used, and where the base is a GGUF file."""

    clara_checkpoint: str = field(kw_only=True, metadata={"help": "CLaRa checkpoint whose prompts are used."})
    gguf_file: str | None = option(None, "GGUF file in the base's folder; it is dequantized beside it, once.")


def as_examples(rows: Dataset, processor: CLaRaProcessor) -> Dataset:
    """Rows as token ids and labels: TRL would read control tokens in a document as such."""

    def convert(row: dict) -> dict:
        docs = processor.check_user_texts(row["docs"], "docs")
        answer = processor.target("answer", row["answers"])
        return processor.training_example("answer", "\n".join(docs), answer, row["question"])

    return rows.map(convert, remove_columns=rows.column_names, desc="Writing prompts")


class TextTrainer(EndsAtLastStep, SFTTrainer):
    """TRL's trainer, which ends at its last step also where it goes on from there."""

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        super()._save(output_dir, state_dict)
        give_usual_rights(str(output_dir or self.args.output_dir))


def main(arguments: list[str] | None = None) -> None:
    types = (TextArguments, SFTConfig, ModelConfig)
    data, training, model = parse(types, arguments, nano_recipe("text_lora"), __doc__.split("\n")[0])

    def make(begin: Callable[[], None], train_rows: Dataset, validation: Dataset | None) -> TextTrainer:
        processor = CLaRaProcessor.from_pretrained(data.clara_checkpoint)
        if model.model_name_or_path is None:
            raise UsageError("--model_name_or_path is missing: give the folder or Hub id of the base.")
        base = str(absolute_place(model.model_name_or_path))
        if data.gguf_file is not None:
            base = dequantized(base, data.gguf_file)
        begin()
        return TextTrainer(
            model=base,
            args=training,
            train_dataset=as_examples(train_rows, processor),
            eval_dataset=None if validation is None else as_examples(validation, processor),
            peft_config=get_peft_config(model),
        )

    carry_out(data, model, training, "questions", make, "adapter_config.json")
