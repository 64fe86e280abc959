"""Published data sets in the schema of this package.

python eval/convert.py --format nq-open --input NQ-open.dev.jsonl --output questions.jsonl
"""

from clara_hf.data.convert import main
from clara_hf.program import run_program


if __name__ == "__main__":
    run_program(main)
