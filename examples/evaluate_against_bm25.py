"""CLaRa beside BM25 and the controls, on questions of your own.

    python examples/evaluate_against_bm25.py questions.jsonl --model user/clara-...

A line of the file: {"question": "...", "answers": ["..."], "docs": ["..."], "pos_index": [3]}. `clara eval` has more
systems, writes all tables to files, and compares checkpoints.
"""

import argparse
from pathlib import Path

from clara_hf.evaluation.evaluator import Evaluator


ROOT = Path(__file__).resolve().parents[1]
SYSTEMS = "clara,bm25,gold,no-memory,wrong-memory"


def main(arguments: list[str] | None = None) -> dict[str, float]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("questions")
    parser.add_argument("--model", default=str(ROOT / "recipes/nano/pretrained/joint"), help="a CLaRa checkpoint")
    parser.add_argument(
        "--cache", default="runs/example-cache", help="predictions are kept here: a second call is quick"
    )
    args = parser.parse_args(arguments)
    results = Evaluator(args.questions, SYSTEMS, cache_dir=args.cache)(args.model)
    print(results.to_text())
    return results.metrics()


if __name__ == "__main__":
    main()
