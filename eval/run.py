"""Compare CLaRa with what one would use instead, on one's own questions: `clara eval`.

python eval/run.py --model runs/nano/joint --data questions.jsonl.gz
"""

from clara_hf.evaluation.run import main
from clara_hf.program import run_program


if __name__ == "__main__":
    run_program(main)
