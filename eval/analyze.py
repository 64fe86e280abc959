"""Pictures and a page about evaluations: `clara analyze`.

python eval/analyze.py --runs runs/eval/joint-test --output_dir runs/analysis
"""

from clara_hf.evaluation.analyze import main
from clara_hf.program import run_program


if __name__ == "__main__":
    run_program(main)
