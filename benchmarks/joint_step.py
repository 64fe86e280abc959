"""Time and memory of one joint training step: memories read from the store against candidates compressed in the step.

    python benchmarks/joint_step.py
    python benchmarks/joint_step.py --shape mistral-7b --batch_size 4

All variants take the same batch of questions with candidates of natural lengths: collation, forward, backward and
optimizer included, reading the store too; filling it once is not. Each comes with logits where there are labels only,
as trained, and with logits of all positions. "as released" re-creates what the paper's release computes in a step, not
its code: candidates compressed as in `compress.py`, questions padded to 1,024 tokens, logits of all positions.
"""

import random
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch
from common import BenchmarkArguments, against, build_model, natural_documents, run_benchmark, sentence
from compress import UNFUSED, UNPACKED, changed, compress_padded
from datasets import Dataset, disable_progress_bars

from clara_hf.program import parse, run_program
from modeling_clara import CLaRaForRetrievalGeneration
from trainers.joint import JointConfig, JointTrainer


RELEASED_QUESTION = 1024


@dataclass
class StepArguments(BenchmarkArguments):
    """What a step takes."""

    batch_size: int = field(default=4, metadata={"help": "Questions per step."})
    candidates: int = field(default=20, metadata={"help": "Candidates per question, none of them shared."})
    compression_rate: int = field(default=16, metadata={"help": "Document budget of 256 tokens over memory tokens."})


def make_rows(args: StepArguments) -> Dataset:
    """Questions of 20 tokens with answers of 4, as in open-domain question answering."""
    draw = random.Random(1)
    documents = natural_documents(args.batch_size * args.candidates)
    rows = []
    for start in range(0, len(documents), args.candidates):
        docs = documents[start : start + args.candidates]
        rows.append({"question": sentence(draw, 20), "answers": [sentence(draw, 4)], "docs": docs, "pos_index": [0]})
    return Dataset.from_list(rows)


def make_trainer(
    args: StepArguments, model: CLaRaForRetrievalGeneration, rows: Dataset, online: bool, folder: str
) -> JointTrainer:
    config = JointConfig(
        output_dir=folder,
        online=online,
        per_device_train_batch_size=args.batch_size,
        use_cpu=args.device == "cpu",
        save_strategy="no",
        disable_tqdm=True,
    )
    trainer = JointTrainer(model=model, args=config, train_dataset=rows)
    trainer.create_optimizer()
    trainer.current_gradient_accumulation_steps = 1  # the training loop, which is left out here, would set it
    return trainer


def step(trainer: JointTrainer, all_logits: bool, released: list[str] | None = None) -> None:
    """One step; with the texts of all candidates in `released`, the way of the release."""
    model = trainer.model.train()
    inputs = trainer._prepare_inputs(trainer.data_collator(list(trainer.train_dataset)))
    if all_logits:
        inputs["logits_to_keep"] = 0
    if released is not None:
        inputs["memories"] = compress_padded(model.eval(), released, len(released), head=True, all_layers=True)
        model.train()
        for name, value in (("query_input_ids", model.config.pad_token_id), ("query_attention_mask", 0)):
            missing = RELEASED_QUESTION - inputs[name].shape[1]
            inputs[name] = torch.nn.functional.pad(inputs[name], (missing, 0), value=value)
    trainer.compute_loss(trainer.model, inputs).backward()
    trainer.optimizer.step()
    trainer.optimizer.zero_grad()


def make_variants(args: StepArguments, folder: str) -> dict[str, Callable[[], None]]:
    model, rows = build_model(args, compression_rate=args.compression_rate), make_rows(args)
    variants = {}
    for kind in ("cached", "online"):
        trainer = make_trainer(args, model, rows, kind == "online", folder)
        variants[kind] = partial(step, trainer, all_logits=False)
        variants[f"{kind}, all logits"] = partial(step, trainer, all_logits=True)
    # Collated as the cached step is, whose memories of the same candidates in the same order it then replaces.
    documents = [text for docs in rows["docs"] for text in docs]
    released = partial(step, variants["cached"].args[0], all_logits=True, released=documents)
    variants["as released"] = partial(changed, released, UNPACKED, UNFUSED)
    return variants


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    args = parse(StepArguments, arguments, description=__doc__)
    disable_progress_bars()
    with tempfile.TemporaryDirectory() as folder:
        variants = make_variants(args, folder)
        figures = run_benchmark(
            __file__, args, arguments, variants, items=args.batch_size, unit="questions", reference="as released"
        )
    for other in ("online", "as released") if figures else ():
        print(against(figures, "cached", other))


if __name__ == "__main__":
    run_program(main)
