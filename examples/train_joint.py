"""Joint training from Python: retrieval learned from answers alone, on a handful of questions of the nano world.

    python examples/train_joint.py --steps 20
    python examples/train_joint.py --questions mine.jsonl --model runs/nano/joint   # fine-tune on your own questions

Rows are questions with their answers and candidate documents; relevance labels (`pos_index`) are only used to measure
Recall@k before and after.
"""

import argparse
import json
import random
from pathlib import Path

from datasets import Dataset

from clara_hf.data.schema import load_examples
from trainers import JointConfig, JointTrainer


ROOT = Path(__file__).resolve().parents[1]


def make_rows(count: int, seed: int = 0) -> list[dict]:
    """Questions about invented people, with ten candidates each."""
    chance = random.Random(seed)
    animals, trades = ["goat", "cat", "dog", "snake", "parrot"], ["is a baker", "is a lawyer", "is a shepherd"]
    people = [
        f"{first} {last}" for first in ("Zora", "Boryn", "Lunon", "Kiria") for last in ("Vinson", "Dorberg", "Garsen")
    ]
    rows = []
    for _ in range(count):
        chosen = chance.sample(people, 10)
        pets = [chance.choice(animals) for _ in chosen]
        docs = [
            f"{name} comes from Galholm. She {chance.choice(trades)} and keeps a {pet}."
            for name, pet in zip(chosen, pets, strict=True)
        ]
        gold = chance.randrange(len(docs))
        question = f"Which animal does {chosen[gold]} keep?"
        rows.append({"question": question, "answers": [pets[gold]], "docs": docs, "pos_index": [gold]})
    return rows


def main(arguments: list[str] | None = None) -> dict[str, dict[str, float]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ROOT / "recipes/nano/pretrained/scp"), help="a CLaRa checkpoint")
    parser.add_argument("--questions", help="JSONL with question, answers, docs and, where known, pos_index")
    parser.add_argument("--output_dir", default="runs/example-joint")
    parser.add_argument("--steps", type=int, default=20)
    args = parser.parse_args(arguments)
    config = JointConfig(
        args.output_dir,
        max_steps=args.steps,
        per_device_train_batch_size=8,
        learning_rate=5e-4,
        top_k=1,
        temperature=0.05,
        save_strategy="no",
        disable_tqdm=True,
    )
    rows = make_rows(160) if args.questions is None else [vars(row) for row in load_examples(args.questions)]
    held_out = max(1, len(rows) // 5)
    train, validation = Dataset.from_list(rows[held_out:]), Dataset.from_list(rows[:held_out])
    trainer = JointTrainer(args.model, config, train_dataset=train, eval_dataset=validation)
    figures = {"before": trainer.evaluate()}
    trainer.train()
    figures["after"] = trainer.evaluate()
    for when, found in figures.items():
        print(when, json.dumps({name: round(found[name], 3) for name in ("eval_f1", "eval_recall@1")}))
    trainer.save_model(args.output_dir)
    return figures


if __name__ == "__main__":
    main()
