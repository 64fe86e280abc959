"""The supervised twin of stage 3: train the query reasoner from relevance labels, over candidates.

accelerate launch recipes/contrastive.py --config recipes/nano/contrastive.yaml
accelerate launch recipes/contrastive.py --config recipes/nano/contrastive.yaml --learning_rate 5e-4 --output_dir runs/x
"""

import sys
from pathlib import Path


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from recipes.common import ranking_metrics, read_labelled_questions, train_recipe
from trainers.cli import run
from trainers.contrastive import ContrastiveConfig, ContrastiveTrainer


def main(arguments: list[str] | None = None) -> None:
    default_config = "recipes/nano/contrastive.yaml"
    train_recipe(
        ContrastiveTrainer, ContrastiveConfig, default_config, read_labelled_questions, ranking_metrics, arguments
    )


if __name__ == "__main__":
    run(main)
