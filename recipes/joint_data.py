"""Make joint-training data of synthesized pairs: each verified question with candidates from the same passages.

    python recipes/joint_data.py --scp scp/ --out joint/
    python recipes/joint_data.py --scp scp/ --out joint/ --mode normal --retriever BAAI/bge-small-en-v1.5

`scp/` is what `recipes/synthesize.py` wrote: its passages are the corpus, a pair's own passage is the positive.
Training and validation share no document. `recipes/joint.py` takes the files as they are. All passages are in memory;
for questions of one's own see `eval/candidates.py`.
"""

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from transformers import HfArgumentParser

from eval.candidates import build_candidates
from eval.data import read_jsonl
from recipes.synthesis.errors import UsageError, run_program
from recipes.synthesis.store import digest_of


SPLITS = ("train", "validation")


@dataclass
class JointDataArguments:
    """Where the pairs are, and how their candidates are chosen."""

    scp: str = field(metadata={"help": "Output folder of recipes/synthesize.py."})
    out: str = field(metadata={"help": "Folder for joint_train.jsonl and joint_validation.jsonl."})
    size: int = field(default=20, metadata={"help": "Candidates per question (the paper's N)."})
    mode: str = field(default="oracle", metadata={"help": "oracle (the positive, filled up) or normal (retrieved)."})
    retriever: str = field(default="bm25", metadata={"help": "bm25, or a sentence-transformers bi-encoder."})
    validation_share: float = field(default=0.02, metadata={"help": "Share of the documents for validation."})
    limit: int | None = field(default=None, metadata={"help": "Questions to take, from the start."})
    seed: int = field(default=0, metadata={"help": "Of the split, the candidates' order and what chance draws."})

    def __post_init__(self):
        for name in ("scp.jsonl", "passages.jsonl"):
            if not Path(self.scp, name).is_file():
                raise UsageError(f"--scp {self.scp} holds no {name}: finish recipes/synthesize.py first.")
        if not 0 <= self.validation_share < 1:
            raise UsageError(f"--validation_share must be at least 0 and less than 1, but is {self.validation_share}.")


def questions_of(folder: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """Each pair as a question row, with the text of its passage."""
    for _, row in read_jsonl(folder / "scp.jsonl"):
        for question, answer in zip(row["question"], row["answers"] if row["data_type"] == "qa" else [], strict=True):
            yield {"question": question, "answers": [answer], "positives": [row["passage_id"]]}, row["docs"][0]


def split_of(document: str, share: float, seed: int) -> str:
    """A document's split, by a hash: the same whatever else there is."""
    return SPLITS[int.from_bytes(digest_of(seed, document)[:4], "big") < share * 2**32]


def main(arguments: list[str] | None = None) -> None:
    (args,) = HfArgumentParser(JointDataArguments).parse_args_into_dataclasses(arguments)
    folder = Path(args.scp)
    document_of = {row["id"]: row["document"] for _, row in read_jsonl(folder / "passages.jsonl")}
    corpus: dict[str, dict[str, str]] = {name: {} for name in SPLITS}
    questions: dict[str, list[dict[str, Any]]] = {name: [] for name in SPLITS}
    for number, (question, passage) in enumerate(questions_of(folder), start=1):
        if args.limit is not None and number > args.limit:
            break
        (positive,) = question["positives"]
        split = split_of(document_of[positive], args.validation_share, args.seed)
        corpus[split][positive] = passage
        questions[split].append({"id": f"{positive}-{number}", **question})
    if not questions["train"]:
        raise UsageError(f"--scp {args.scp} holds no pair for training.")
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    for split in filter(questions.get, SPLITS):
        options = {"retriever": args.retriever, "size": args.size, "mode": args.mode, "seed": args.seed}
        rows = build_candidates(questions[split], corpus[split], **options, show_progress=True)
        path = out / f"joint_{split}.jsonl"
        beside = path.with_name(path.name + ".partial")
        with open(beside, "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        os.replace(beside, path)
        print(f"{path}: {len(rows)} questions with {args.size} of {len(corpus[split])} passages each.")


if __name__ == "__main__":
    run_program(main)
