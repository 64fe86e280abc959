"""Stage 3, joint training: train query reasoner and generator from the answer's loss, over candidates.

accelerate launch recipes/joint.py --config recipes/nano/joint.yaml
accelerate launch recipes/joint.py --config recipes/nano/joint.yaml --learning_rate 5e-4 --output_dir runs/x
"""

import sys
from pathlib import Path


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from recipes.common import answer_metrics, read_questions, train_recipe
from trainers.cli import run
from trainers.joint import JointConfig, JointTrainer


def main(arguments: list[str] | None = None) -> None:
    default_config = "recipes/nano/joint.yaml"
    train_recipe(JointTrainer, JointConfig, default_config, read_questions, answer_metrics, arguments)


if __name__ == "__main__":
    run(main)
