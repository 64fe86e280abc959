"""Compare CLaRa with what one would use instead, on one's own questions: `clara eval`.

python eval/run.py --model runs/nano/joint --data questions.jsonl.gz
"""

import sys

from clara_hf.evaluation.run import main


if __name__ == "__main__":
    sys.exit(main())
