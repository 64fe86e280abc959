"""Whether SCP data made by synthesis train a compressor as well as the nano world's own generator does.

    PYTHONPATH=recipes/nano python benchmarks/synthesis/nano.py --steps 150
    PYTHONPATH=recipes/nano python benchmarks/synthesis/nano.py --steps 0        # makes the data only

The nano world's training documents go through the whole of `recipes/synthesize.py`; the language model is a perfect
teacher, which knows every fact of every entity. Two models are then trained alike (`scp_full.yaml` of the nano world,
same seed, same steps, same mix of questions and paraphrases): one on these data, one on the world's own. Both predict
the target tokens of the same validation rows; their differences come with 95% bootstrap intervals over the rows.

`answers` and `paraphrases` are what must come out of the memories. `questions` are the rest of the question lists,
which the world's own data words and puts together as the validation rows do: two complex questions stand among simple
ones there, and in a row of their own in synthesized data. `all` is every target token.
"""

import json
import random
import shutil
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import world
from datasets import Dataset
from scripted_teacher import asked_in, part_of, passage_of

from clara_hf.data.schema import load_scp
from clara_hf.evaluation.statistics import bootstrap_interval
from clara_hf.program import option, parse, run_program, stages, write_json
from clara_hf.synthesis import session, synthesize
from clara_hf.synthesis.backends.client import ChatReply, ChatRequest
from clara_hf.synthesis.store import digest_of
from modeling_clara import CLaRaForRetrievalGeneration
from modeling_clara.processing_clara import IGNORE_INDEX
from trainers.arguments import cpu_computes_bfloat16
from trainers.scp import SCPConfig, SCPTrainer


ROOT = Path(__file__).resolve().parents[2]
CONFIG = "recipes/nano/pretrained/scp_full.yaml"


class WorldTeacher:
    """Plays every part of SCP synthesis for documents of one split of the nano world, without a mistake.

    What it writes about a passage depends on the passage and the seed alone.
    """

    def __init__(self, split: world.World, seed: int = 0):
        self.seed = seed
        self.entities = {text: entity for entity in split.entities for text in (entity.document, entity.paraphrase)}
        self.answers: dict[tuple[str, str], str] = {}

    async def complete(self, request: ChatRequest) -> ChatReply:
        passage = passage_of(request.messages)
        part, asked = part_of(request.messages), asked_in(request.messages)
        # Not the hash of Python, which differs between processes.
        chance = random.Random(digest_of(self.seed, passage, part))
        reply = getattr(self, part)(passage, self.entities[passage], asked, chance)
        return ChatReply(json.dumps(reply))

    def pairs(self, passage: str, pairs: list[tuple[str, str]], **fields: str) -> dict:
        self.answers.update({(passage, question): answer for question, answer in pairs})
        return {"pairs": [{"question": question, "answer": answer, **fields} for question, answer in pairs]}

    def simple(self, passage, entity, asked, chance):
        return self.pairs(passage, world.qa_pairs(entity, chance.randint(4, 6), chance))

    def complex(self, passage, entity, asked, chance):
        subject, _ = world.describe(entity, [chance.choice(world.closed_said(entity))], chance)
        pairs = [world.complex_question(entity, name, chance) for name in (entity.name, subject)]
        return self.pairs(passage, pairs, kind="aggregation")

    def paraphrase(self, passage, entity, asked, chance):
        return {"paraphrase": entity.paraphrase if passage == entity.document else entity.document}

    def answer(self, passage, entity, asked, chance):
        question = asked.rpartition("Question: ")[2]
        return {"answerable": True, "answer": self.answers[passage, question]}

    def coverage(self, passage, entity, asked, chance):
        told = "\n".join(line.rpartition(" - ")[2] for line in asked.partition("Pairs:\n")[2].splitlines())
        facts = {key: world.ask(entity, key, entity.name, chance)[1][0] for key in entity.said}
        return {"missing": [f"{key}: {answer}" for key, answer in facts.items() if answer not in told]}

    def supplement(self, passage, entity, asked, chance):
        wanted = asked.partition("Facts that are not asked for:\n")[2].splitlines()
        keys = [line.partition(". ")[2].partition(": ")[0] for line in wanted]
        asked_for = ((key, world.ask(entity, key, entity.name, chance)) for key in keys)
        return self.pairs(passage, [(question, answers[0]) for _, (question, answers) in asked_for])

    def validate(self, passage, entity, asked, chance):
        return {"added": [], "lost": []}


PARTS = ("all", "answers", "paraphrases", "questions")


@dataclass
class ComparisonArguments:
    """What is made and compared."""

    folder: str = option("runs/synthesis-nano", "For data and runs.")
    nano_world: str = option("runs/nano/data", "The world's data; written where missing.")
    entities: int | None = option(None, "Entities to draw; default: all of the split.")
    steps: int = option(150, "Training steps of each model; 0 makes the data only.")
    start: str = option("recipes/nano/pretrained/base", "Base, or SCP checkpoint.")
    validation_rows: int = option(1000, "Rows that both models are compared on.")
    seed: int = option(0, "Random seed for the world, the teacher and the training.")


def synthesized(args: ComparisonArguments) -> Path:
    """The training documents' data, made by the whole of `recipes/synthesize.py`."""
    chance = random.Random(f"{args.seed}-train")
    split = world.World("train", world.ENTITIES["train"], chance)
    folder = Path(args.folder)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "docs.jsonl", "w", encoding="utf-8") as file:
        for entity in random.Random(args.seed).sample(split.entities, args.entities or len(split.entities)):
            for text in (entity.document, entity.paraphrase):
                file.write(json.dumps({"text": text}) + "\n")
    session.make_backend = lambda _: nullcontext(WorldTeacher(split, args.seed))
    # The teacher's answers are canonical words, which a document may say otherwise.
    options = ["--answer_overlap", "0", "--min_passage_tokens", "8", "--model", "world", "--overwrite", "true"]
    synthesize.main(["--corpus", str(folder / "docs.jsonl"), "--out", str(folder / "scp"), *options])
    return folder / "scp" / "scp.jsonl"


def world_mix(data: Path) -> dict[str, float]:
    """Shares of the kinds of rows in the world's own data."""
    kinds = [row["data_type"] for row in load_scp(data)]
    return {kind: kinds.count(kind) / len(kinds) for kind in sorted(set(kinds))}


def train(args: ComparisonArguments, name: str, data: Path) -> Path:
    out = Path(args.folder) / name
    shutil.rmtree(out, ignore_errors=True)
    fixed = {"train_file": data, "output_dir": out, "max_steps": args.steps}
    fixed |= {"validation_file": Path(args.nano_world, "scp_validation.jsonl"), "validation_limit": 32}
    fixed |= {"model_name_or_path": args.start, "seed": args.seed, "eval_strategy": "no", "save_strategy": "no"}
    fixed["data_mix"] = json.dumps(world_mix(Path(args.nano_world, "scp_train.jsonl")))
    fixed |= {"warmup_steps": max(1, args.steps // 10), "disable_tqdm": "true"}
    if not (torch.accelerator.is_available() or cpu_computes_bfloat16()):
        fixed |= {"bf16": "false", "attn_implementation": "sdpa"}
    stages.scp(
        ["--config", str(ROOT / CONFIG), *(str(part) for key, value in fixed.items() for part in (f"--{key}", value))]
    )
    return out


def row_accuracies(checkpoint: Path, rows: Dataset) -> dict[str, np.ndarray]:
    """Per row and part of its target, the share of tokens that are the most likely ones given those before; NaN where
    a row has no such part."""
    model = CLaRaForRetrievalGeneration.from_pretrained(checkpoint)
    config = SCPConfig(output_dir=str(checkpoint), per_device_eval_batch_size=64, disable_tqdm=True)
    found = SCPTrainer(model=model, args=config, eval_dataset=rows)
    prediction = found.predict(found.eval_dataset)
    accuracies = {name: [] for name in PARTS}
    for row, labels, predicted in zip(rows, prediction.label_ids, prediction.predictions, strict=True):
        is_target = labels != IGNORE_INDEX
        is_right = predicted[is_target] == labels[is_target]
        is_answer = answer_tokens(model.processor, row, labels[is_target].tolist())
        is_qa = row["data_type"] == "qa"
        parts = (is_right, is_right[is_answer & is_qa], is_right[is_answer & (not is_qa)], is_right[~is_answer & is_qa])
        for name, part in zip(PARTS, parts, strict=True):
            accuracies[name].append(part.mean() if len(part) else np.nan)
    return {name: np.array(values) for name, values in accuracies.items()}


def answer_tokens(processor, row: dict, labels: list[int]) -> np.ndarray:
    """Which of a row's target tokens hold something of an answer, or of the paraphrase."""
    text = processor.target(row["data_type"], row["answers"], row["question"])
    encoded = processor.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    if labels[: len(encoded["input_ids"])] != encoded["input_ids"]:
        raise ValueError(f"the target {text!r} is tokenized otherwise alone: its answers cannot be found.")
    spans, end = [], 0
    for answer in row["answers"]:
        start = text.index(answer, text.index("\nA: ", end) + 4 if row["data_type"] == "qa" else 0)
        end = start + len(answer)
        spans.append((start, end))
    inside = [any(begin < stop and last > start for start, stop in spans) for begin, last in encoded["offset_mapping"]]
    return np.array(inside + [False] * (len(labels) - len(inside)))


def compare(own: np.ndarray, synthesized: np.ndarray, seed: int) -> dict[str, dict[str, float]]:
    known = ~np.isnan(own)
    columns = {"own": own[known], "synthesized": synthesized[known], "difference": (synthesized - own)[known]}
    values = np.stack(list(columns.values()), axis=1)
    bounds = zip(values.mean(axis=0), *bootstrap_interval(values, seed), strict=True)
    return {
        name: {"value": float(mean), "low": float(low), "high": float(high)}
        for name, (mean, low, high) in zip(columns, bounds, strict=True)
    }


def main(arguments: list[str] | None = None) -> None:
    args = parse(ComparisonArguments, arguments, description=__doc__)
    world.ensure(args.nano_world, args.seed)
    data = {"synthesized": synthesized(args), "own": Path(args.nano_world, "scp_train.jsonl")}
    if not args.steps:
        return
    rows = Dataset.from_list(load_scp(Path(args.nano_world, "scp_validation.jsonl"))[: args.validation_rows])
    accuracies = {name: row_accuracies(train(args, name, path), rows) for name, path in data.items()}
    figures = {part: compare(accuracies["own"][part], accuracies["synthesized"][part], args.seed) for part in PARTS}
    for part, numbers in figures.items():
        texts = (
            f"{name} {100 * n['value']:.2f} [{100 * n['low']:.2f}, {100 * n['high']:.2f}]"
            for name, n in numbers.items()
        )
        print(f"{part}: " + "; ".join(texts))
    settings = {"steps": args.steps, "start": args.start, "validation_rows": len(rows), "seed": args.seed}
    write_json(Path(args.folder, "comparison.json"), {"token_accuracy": figures, "settings": settings})


if __name__ == "__main__":
    run_program(main)
