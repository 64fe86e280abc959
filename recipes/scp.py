"""Stage 1, SCP: train compressor, generator and memory embeddings on question lists and paraphrases.

accelerate launch recipes/scp.py --config recipes/nano/scp.yaml
accelerate launch recipes/scp.py --config recipes/nano/scp.yaml --learning_rate 5e-4 --output_dir runs/x
"""

import sys
from pathlib import Path


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from eval.data import iter_scp
from recipes.common import train_recipe
from trainers.base import token_accuracy
from trainers.cli import run
from trainers.scp import SCPConfig, SCPTrainer


def main(arguments: list[str] | None = None) -> None:
    default_config = "recipes/nano/scp.yaml"
    train_recipe(SCPTrainer, SCPConfig, default_config, iter_scp, lambda *_: token_accuracy, arguments)


if __name__ == "__main__":
    run(main)
