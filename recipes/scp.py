"""Stage 1, SCP: train compressor, generator and memory embeddings on question lists and paraphrases.

accelerate launch recipes/scp.py --config recipes/nano/scp.yaml
accelerate launch recipes/scp.py --config recipes/nano/scp.yaml --learning_rate 5e-4 --output_dir runs/x
"""

from clara_hf.program.stages import scp as main
from clara_hf.program.training import run


if __name__ == "__main__":
    run(main)
