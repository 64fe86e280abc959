"""Trainers of the CLaRa stages: SCP, instruction tuning, joint training, and joint training's supervised twin."""

from .contrastive import ContrastiveConfig, ContrastiveTrainer
from .instruction import InstructionConfig, InstructionTrainer
from .joint import JointConfig, JointTrainer
from .scp import SCPConfig, SCPTrainer


__all__ = [
    "ContrastiveConfig",
    "ContrastiveTrainer",
    "InstructionConfig",
    "InstructionTrainer",
    "JointConfig",
    "JointTrainer",
    "SCPConfig",
    "SCPTrainer",
]
