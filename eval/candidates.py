"""Candidate pools for one's own corpus: `clara pools`.

python eval/candidates.py --questions q.jsonl --corpus corpus.jsonl --output pools.jsonl
"""

from clara_hf.data.pools import main
from clara_hf.program import run_program


if __name__ == "__main__":
    run_program(main)
