"""Published data sets in the schema of this package.

python eval/convert.py --format nq-open --input NQ-open.dev.jsonl --output questions.jsonl
"""

import sys

from clara_hf.data.convert import main


if __name__ == "__main__":
    sys.exit(main())
