"""Candidate pools for one's own corpus: `clara pools`.

python eval/candidates.py --questions q.jsonl --corpus corpus.jsonl --output pools.jsonl
"""

import sys

from clara_hf.data.pools import main


if __name__ == "__main__":
    sys.exit(main())
