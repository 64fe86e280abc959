"""Stage 2, instruction tuning: train compressor and generator on questions with their documents.

accelerate launch recipes/instruct.py --config recipes/nano/instruct.yaml
accelerate launch recipes/instruct.py --config recipes/nano/instruct.yaml --learning_rate 5e-4 --output_dir runs/x
"""

from clara_hf.program import run_program
from clara_hf.program.stages import instruct as main


if __name__ == "__main__":
    run_program(main)
