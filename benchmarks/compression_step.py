"""Time and memory of one step of the stages that train the compressor: SCP, or instruction tuning.

    python benchmarks/compression_step.py
    python benchmarks/compression_step.py --stage instruct
    python benchmarks/compression_step.py --shape mistral-7b --batch_size 16
    python benchmarks/compression_step.py --vocab_size 49152 --variants "step;all logits at once"

All variants take the same batch: collation, forward, backward and optimizer included. SCP rows are half question lists
and half paraphrases, each about one document and as long as that; instruction rows are questions with short answers
over five documents. No document is in two rows. "as released" re-creates what the paper's release computes in a step,
not its code: documents padded to the whole budget, logits over the vocabulary at all positions of documents and
prompts, and the hidden states of all layers of documents. That it also takes the gradient of the whole embedding
matrix is left out.
"""

import math
import random
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from common import BenchmarkArguments, against, build_model, natural_documents, run_benchmark, sentence
from compress import UNFUSED, UNPACKED, WHOLE_LAST_LAYER, changed, read_padded
from datasets import Dataset, disable_progress_bars

from clara_hf.program import UsageError, option, parse, run_program
from modeling_clara import CLaRaForRetrievalGeneration, loss_clara
from trainers.batches import model_inputs
from trainers.instruction import InstructionConfig, InstructionTrainer
from trainers.scp import SCPConfig, SCPTrainer
from trainers.trainer import CLaRaTrainer


STAGES = {"scp": (SCPTrainer, SCPConfig), "instruct": (InstructionTrainer, InstructionConfig)}
QUESTION, ANSWER = 12, 4
ALL_LOGITS = (loss_clara, "MOST_LOGITS", math.inf)


@dataclass
class StepArguments(BenchmarkArguments):
    """What a step takes."""

    stage: str = option("scp", f"{' or '.join(STAGES)}.")
    batch_size: int = option(8, "Rows per step.")
    documents: int = option(5, "Documents per row of instruction tuning; SCP has one.")
    compression_rate: int = option(16, "Document budget of 256 tokens over memory tokens.")

    def __post_init__(self):
        super().__post_init__()
        if self.stage not in STAGES:
            raise UsageError(f"stage is {self.stage!r}; it must be one of {list(STAGES)}.")


def make_rows(args: StepArguments) -> Dataset:
    draw = random.Random(1)
    if args.stage == "instruct":
        texts = natural_documents(args.batch_size * args.documents)
        docs = [texts[start : start + args.documents] for start in range(0, len(texts), args.documents)]
        rows = [{"question": sentence(draw, 20), "answers": [sentence(draw, ANSWER)], "docs": own} for own in docs]
        return Dataset.from_list(rows)
    rows = []
    for number, text in enumerate(natural_documents(args.batch_size)):
        length = len(text.split())
        if number % 2:
            rows.append(
                {"data_type": "paraphrase", "question": [], "answers": [sentence(draw, length)], "docs": [text]}
            )
            continue
        pairs = max(length // (QUESTION + ANSWER), 1)
        questions, answers = ([sentence(draw, size) for _ in range(pairs)] for size in (QUESTION, ANSWER))
        rows.append({"data_type": "qa", "question": questions, "answers": answers, "docs": [text]})
    return Dataset.from_list(rows)


def make_trainer(args: StepArguments, model: CLaRaForRetrievalGeneration, folder: str) -> CLaRaTrainer:
    trainer_class, config_class = STAGES[args.stage]
    config = config_class(
        output_dir=folder,
        per_device_train_batch_size=args.batch_size,
        use_cpu=args.device == "cpu",
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = trainer_class(model=model, args=config, train_dataset=make_rows(args))
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1  # the training loop, which is left out here, would set it
    return trainer


def released_loss(trainer: CLaRaTrainer, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    model, index = trainer.model, inputs["document_index"]
    ids, mask = inputs.pop("document_input_ids"), inputs.pop("document_attention_mask").bool()
    count = model.config.num_memory_tokens
    rows = [row[own][:-count].tolist() for row, own in zip(ids, mask, strict=True)]
    hidden, mask = read_padded(model, rows, head=True, all_layers=True)
    texts, memories = mask[:, :-count].unsqueeze(-1).to(hidden.dtype), hidden[:, -count:]
    gap = (hidden[:, :-count] * texts).sum(dim=1) / texts.sum(dim=1) - memories.mean(dim=1)
    outputs = model(**model_inputs(inputs), memories=memories, logits_to_keep=0)
    return outputs.ce_loss + model.config.mse_weight * gap[index[index >= 0]].square().mean()


def step(trainer: CLaRaTrainer, released: bool = False) -> None:
    trainer.model.train()
    inputs = trainer._prepare_inputs(trainer.data_collator(list(trainer.train_dataset)))
    loss = released_loss(trainer, inputs) if released else trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()


def checkpointed(trainer: CLaRaTrainer, **options) -> None:
    trainer.model.activation_checkpointing_enable({"use_reentrant": False, **options})
    try:
        step(trainer)
    finally:
        trainer.model.activation_checkpointing_disable()


def make_variants(args: StepArguments, folder: str) -> dict[str, Callable[[], None]]:
    trainer = make_trainer(args, build_model(args, compression_rate=args.compression_rate), folder)
    run = partial(step, trainer)
    return {
        "step": run,
        "all logits at once": partial(changed, run, ALL_LOGITS),
        "checkpointing": partial(checkpointed, trainer),
        "checkpointing but attention": partial(checkpointed, trainer, keep_attention=True),
        "last layer whole": partial(changed, run, WHOLE_LAST_LAYER),
        "PEFT's own layers": partial(changed, run, UNFUSED),
        "padded to the longest": partial(changed, run, UNPACKED),
        "as released": partial(changed, partial(run, released=True), UNPACKED, UNFUSED),
    }


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    args = parse(StepArguments, arguments, description=__doc__)
    disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        variants = make_variants(args, folder)
        options = {"items": args.batch_size, "unit": "rows", "reference": "as released"}
        figures = run_benchmark(__file__, args, arguments, variants, **options)
    if figures and not args.variants:
        print(against(figures, "step", "as released"))


if __name__ == "__main__":
    run_program(main)
