"""Stage 3, joint training: train query reasoner and generator from the answer's loss, over candidates.

accelerate launch recipes/joint.py --config recipes/nano/joint.yaml
accelerate launch recipes/joint.py --config recipes/nano/joint.yaml --learning_rate 5e-4 --output_dir runs/x
"""

from clara_hf.program import run_program
from clara_hf.program.stages import joint as main


if __name__ == "__main__":
    run_program(main)
