"""A run for `torchrun` in which the loss of one process, in one micro-batch, is not a number.

torchrun --nproc_per_node 2 tests/diverging_run.py BASE FOLDER
"""

import sys

from test_trainers import make_trainer
from test_watch import poison_loss

from trainers.cli import run


def main(_) -> None:
    trainer = make_trainer("scp", sys.argv[1], sys.argv[2], save_strategy="steps", save_steps=1)
    if trainer.args.process_index == 1:
        poison_loss(trainer, call=3)
    trainer.train()


if __name__ == "__main__":
    run(main)
