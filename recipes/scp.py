"""Stage 1, SCP: train compressor, generator and memory embeddings on question lists and paraphrases.

accelerate launch recipes/scp.py --config recipes/nano/scp.yaml
accelerate launch recipes/scp.py --config recipes/nano/scp.yaml --learning_rate 5e-4 --output_dir runs/x
"""

from clara_hf.program import run_program
from clara_hf.program.stages import scp as main


if __name__ == "__main__":
    run_program(main)
