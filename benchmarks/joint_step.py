"""Time and memory of one joint training step: memories read from the store against candidates compressed in the step.

    python benchmarks/joint_step.py
    python benchmarks/joint_step.py --shape mistral-7b --batch_size 4
    python benchmarks/joint_step.py --shape tiny --growth growth.svg

All variants take the same batch of questions with candidates of natural lengths: collation, forward, backward and
optimizer included, reading the store too; filling it once is not. Each comes with logits where there are labels only,
as trained, and with logits of all positions. "as released" re-creates what the paper's release computes in a step, not
its code: candidates compressed as in `compress.py`, questions padded to 1,024 tokens, logits of all positions.

With `--growth`, how the cost of every verb grows is measured and drawn instead: `compress` and `MemoryStore.add` over
64 to 16,384 documents, the joint step and answers over 1 to 64 questions, beside stores of as many documents.
"""

import json
import random
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from common import BenchmarkArguments, against, build_model, natural_documents, run_benchmark, sentence, timed
from compress import UNFUSED, UNPACKED, changed, compress_padded
from datasets import Dataset, disable_progress_bars

from clara_hf.memory_store import MemoryStore
from clara_hf.program import option, parse, run_program
from modeling_clara import CLaRaForRetrievalGeneration
from trainers.joint import JointConfig, JointTrainer


RELEASED_QUESTION = 1024
DOCUMENTS, STORES, QUESTIONS = (64, 256, 1024, 4096, 16384), (64, 1024, 16384), (1, 4, 16, 64)


@dataclass
class StepArguments(BenchmarkArguments):
    """What a step takes."""

    batch_size: int = option(4, "Questions per step.")
    candidates: int = option(20, "Candidates per question, none of them shared.")
    compression_rate: int = option(16, "Document budget of 256 tokens over memory tokens.")
    growth: str | None = option(None, "SVG or PNG of how costs grow; measures these instead.")


def make_rows(args: StepArguments, documents: list[str] | None = None) -> Dataset:
    """Questions of 20 tokens with answers of 4, as in open-domain question answering; candidates of their own, or drawn
    from `documents`."""
    draw = random.Random(1)
    texts = natural_documents(args.batch_size * args.candidates) if documents is None else documents
    rows = []
    for number in range(args.batch_size):
        docs = texts[number * args.candidates : (number + 1) * args.candidates]
        docs = docs if documents is None else draw.sample(documents, args.candidates)
        rows.append({"question": sentence(draw, 20), "answers": [sentence(draw, 4)], "docs": docs, "pos_index": [0]})
    return Dataset.from_list(rows)


def make_trainer(
    args: StepArguments,
    model: CLaRaForRetrievalGeneration,
    rows: Dataset,
    online: bool,
    folder: str,
    store: str | None = None,
) -> JointTrainer:
    config = JointConfig(
        output_dir=folder,
        online=online,
        memory_store=store,
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


def median(run: Callable[[int], object], args: StepArguments) -> float:
    """Seconds of a run that is given the number of its repetition."""
    return statistics.median(timed(partial(run, number), args) for number in range(args.repeats))


def grow(args: StepArguments, folder: str) -> dict[str, list[dict]]:
    """Seconds of each verb, by its numbers of documents and questions."""
    model = build_model(args, compression_rate=args.compression_rate, query_reasoner=True)
    documents = list(dict.fromkeys(natural_documents(max(DOCUMENTS))))
    found: dict[str, list[dict]] = {"compress": [], "add": [], "joint step": [], "answer": []}

    def add(count: int, number: int) -> None:
        MemoryStore.open(f"{folder}/{count}-{number}", model.eval()).add(documents[:count], show_progress=False)

    model.compress(documents[:64])  # warms up
    for count in DOCUMENTS:
        seconds = median(lambda _, count=count: model.compress(documents[:count]), args)
        found["compress"].append({"documents": count, "seconds": seconds})
        found["add"].append({"documents": count, "seconds": median(partial(add, count), args)})
    draw = random.Random(2)
    asked = [sentence(draw, 20) for _ in range(max(QUESTIONS))]
    options = {"n_docs": 5, "max_new_tokens": 8, "min_new_tokens": 8}
    for count in STORES:
        place = f"{folder}/{count}-0"
        for questions in QUESTIONS:
            size = {"documents": count, "questions": questions}
            rows = make_rows(replace(args, batch_size=questions), documents[:count])
            trainer = make_trainer(replace(args, batch_size=questions), model, rows, False, folder, place)
            step(trainer, all_logits=False)
            seconds = median(lambda _, trainer=trainer: step(trainer, all_logits=False), args)
            found["joint step"].append({**size, "seconds": seconds})
            model.eval().requires_grad_(False)
            store = MemoryStore.open(place, model)
            answer = partial(model.generate, asked[:questions], store=store, **options)
            answer()
            found["answer"].append({**size, "seconds": median(lambda _, answer=answer: answer(), args)})
    return found


def linear(rows: list[dict], unit: str) -> tuple[float, float, float]:
    """Constant, slope, and the largest relative error of the line through `rows`, whose relative errors are least."""
    counts, seconds = (np.array([row[name] for row in rows], dtype=float) for name in (unit, "seconds"))
    slope, start = np.polyfit(counts, seconds, 1, w=1 / seconds)
    return start, slope, float(np.abs((start + slope * counts) / seconds - 1).max())


def draw_growth(found: dict[str, list[dict]], path: str) -> list[str]:
    """One plot per verb, points measured and lines fitted, and a sentence for each line in it."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    figure, told = Figure(figsize=(9, 6), layout="constrained"), []
    for axes, (verb, rows) in zip(figure.subplots(2, 2).flat, found.items(), strict=True):
        unit = "questions" if "questions" in rows[0] else "documents"
        for count in STORES if unit == "questions" else (None,):
            own = [row for row in rows if count is None or row["documents"] == count]
            start, slope, error = linear(own, unit)
            name = f"{1e3 * start:.3g} + {1e3 * slope:.3g} ms per {unit[:-1]}"
            name = name if count is None else f"{count:,} documents: {name}"
            (points,) = axes.plot([row[unit] for row in own], [row["seconds"] for row in own], "o", label=name)
            counts = np.geomspace(own[0][unit], own[-1][unit])
            axes.plot(counts, start + slope * counts, color=points.get_color())
            told.append(f"{verb}: {name}, within {error:.0%}")
        axes.set(xscale="log", yscale="log", title=verb, xlabel=unit, ylabel="seconds")
        ticks = [row[unit] for row in own]
        axes.set_xticks(ticks, [f"{count:,}" for count in ticks])
        axes.minorticks_off()
        axes.set_ylim(top=axes.get_ylim()[1] * 4)  # room for the legend
        axes.legend(frameon=False, fontsize="small", loc="upper left")
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "growth"}):
        figure.savefig(path, metadata={"Date": None} if path.endswith(".svg") else None)
    return told


def main(arguments: list[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    args = parse(StepArguments, arguments, description=__doc__)
    disable_progress_bars()
    if args.growth:
        with tempfile.TemporaryDirectory() as folder:
            found = grow(args, folder)
        Path(args.output or "growth.json").write_text(json.dumps(found, indent=2) + "\n")
        print("\n".join(draw_growth(found, args.growth)))
        return
    with tempfile.TemporaryDirectory() as folder:
        variants = make_variants(args, folder)
        figures = run_benchmark(
            __file__, args, arguments, variants, items=args.batch_size, unit="questions", reference="as released"
        )
    for other in ("online", "as released") if figures and not args.variants else ():
        print(against(figures, "cached", other))


if __name__ == "__main__":
    run_program(main)
