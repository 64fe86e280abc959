"""The supervised baseline of stage 3: train the query reasoner from relevance labels, over candidates.

accelerate launch recipes/contrastive.py --config recipes/nano/contrastive.yaml
accelerate launch recipes/contrastive.py --config recipes/nano/contrastive.yaml --learning_rate 5e-4 --output_dir runs/x
"""

from clara_hf.program import run_program
from clara_hf.program.stages import contrastive as main


if __name__ == "__main__":
    run_program(main)
