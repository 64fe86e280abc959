"""The supervised baseline of stage 3: train the query reasoner from relevance labels, over candidates.

accelerate launch recipes/contrastive.py --config recipes/nano/contrastive.yaml
accelerate launch recipes/contrastive.py --config recipes/nano/contrastive.yaml --learning_rate 5e-4 --output_dir runs/x
"""

from clara_hf.program.stages import contrastive as main
from clara_hf.program.training import run


if __name__ == "__main__":
    run(main)
