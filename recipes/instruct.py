"""Stage 2, instruction tuning: train compressor and generator on questions with their documents.

accelerate launch recipes/instruct.py --config recipes/nano/instruct.yaml
accelerate launch recipes/instruct.py --config recipes/nano/instruct.yaml --learning_rate 5e-4 --output_dir runs/x
"""

import sys
from pathlib import Path


if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from recipes.common import answer_metrics, read_questions, train_recipe
from trainers.cli import run
from trainers.instruction import InstructionConfig, InstructionTrainer


def main(arguments: list[str] | None = None) -> None:
    default_config = "recipes/nano/instruct.yaml"
    train_recipe(InstructionTrainer, InstructionConfig, default_config, read_questions, answer_metrics, arguments)


if __name__ == "__main__":
    run(main)
