"""Make joint-training data of synthesized pairs: each verified question with candidates from the same passages.

    python recipes/joint_data.py --scp scp/ --output_dir joint/
    python recipes/joint_data.py --scp scp/ --output_dir joint/ --mode normal --retriever BAAI/bge-small-en-v1.5

`scp/` is what `recipes/synthesize.py` wrote: its passages are the corpus, a pair's own passage is the positive.
Training and validation share no document; where validation has too few passages for a pool, its negatives are
training passages, too. `recipes/joint.py` takes the files as they are. All passages are in memory; for questions of
one's own see `eval/candidates.py`.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from clara_hf.data.pools import MODES, build_candidates, check_pools, distinct_passages
from clara_hf.data.schema import read_jsonl
from clara_hf.program import UsageError, option, parse
from clara_hf.synthesis.outputs import DATA, PASSAGES, SPLITS, VALIDATION, json_line, split_of, written_files


@dataclass
class JointDataArguments:
    """Where the pairs are, and how their candidates are chosen."""

    scp: str = option(help="Output folder of recipes/synthesize.py.")
    output_dir: str = option(help="Folder for joint_train.jsonl and joint_validation.jsonl.", aliases=["--out"])
    size: int = option(20, "Candidates per question (the paper's N).")
    mode: str = option("oracle", "oracle (the positive, filled up) or normal (retrieved).", choices=MODES)
    retriever: str = option("bm25", "bm25, or a sentence-transformers bi-encoder.")
    validation_share: float = option(0.02, "Share of the documents for validation.")
    limit: int | None = option(None, "Questions to take, from the start.")
    seed: int = option(0, "Random seed for the split, the candidates' order and random candidates.")

    def __post_init__(self):
        for name in (DATA, PASSAGES):
            if not Path(self.scp, name).is_file():
                raise UsageError(f"--scp {self.scp} holds no {name}: finish recipes/synthesize.py first.")
        if self.size < 1:
            raise UsageError(f"--size must be at least 1, but is {self.size}.")
        if not 0 <= self.validation_share < 1:
            raise UsageError(f"--validation_share must be at least 0 and less than 1, but is {self.validation_share}.")


def questions_of(folder: Path) -> Iterator[tuple[dict[str, Any], str]]:
    """Each pair as a question row, with the text of its passage."""
    paths = [folder / name for name in (DATA, VALIDATION)]
    for row in (row for path in paths if path.is_file() for _, row in read_jsonl(path)):
        for question, answer in zip(row["question"], row["answers"] if row["data_type"] == "qa" else [], strict=True):
            yield {"question": question, "answers": [answer], "positives": [row["passage_id"]]}, row["docs"][0]


def main(arguments: list[str] | None = None) -> None:
    args: JointDataArguments = parse(JointDataArguments, arguments, description=__doc__)
    folder = Path(args.scp)
    document_of = {row["id"]: row["document"] for _, row in read_jsonl(folder / PASSAGES)}
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
    sizes = {split: len(distinct_passages(passages)[0]) for split, passages in corpus.items()}
    if questions["validation"] and sizes["validation"] < args.size:
        print(
            f"The validation documents have {sizes['validation']} passages, too few for {args.size} candidates: its "
            "negatives are training passages, too."
        )
        corpus["validation"] |= corpus["train"]
    splits = list(filter(questions.get, SPLITS))
    # Before any work, so that there are all files or none.
    if sizes["train"] < args.size:
        raise UsageError(
            f"--size {args.size} is more than the {sizes['train']} distinct passages for training: pass --size "
            f"{sizes['train']} or less, or synthesize more."
        )
    for split in splits:
        check_pools(questions[split], corpus[split], args.size, args.mode)
    out = Path(args.output_dir)
    options: dict[str, Any] = {"retriever": args.retriever, "size": args.size, "mode": args.mode, "seed": args.seed}
    with written_files(out, *(f"joint_{split}.jsonl" for split in splits)) as files:
        for split, file in zip(splits, files, strict=True):
            rows = build_candidates(questions[split], corpus[split], **options, show_progress=sys.stderr.isatty())
            file.writelines(map(json_line, rows))
    for split in SPLITS:
        path = out / f"joint_{split}.jsonl"
        if split in splits:
            print(f"{path}: {len(questions[split])} questions with {args.size} of {len(corpus[split])} passages each.")
        else:
            # One of an earlier call would share documents with the training file.
            path.unlink(missing_ok=True)
            print(f"No document fell to validation: there is no {path.name}; --validation_share takes a larger share.")
