"""Trainers of the CLaRa stages: SCP, instruction tuning, joint training,
joint training's supervised baseline, and DRO, joint training on text."""

from .contrastive import ContrastiveConfig, ContrastiveTrainer
from .dro import DRO, DROConfig, DROTrainer
from .instruction import InstructionConfig, InstructionTrainer
from .joint import JointConfig, JointTrainer
from .scp import SCPConfig, SCPTrainer


__all__ = [
    "ContrastiveConfig",
    "ContrastiveTrainer",
    "DRO",
    "DROConfig",
    "DROTrainer",
    "InstructionConfig",
    "InstructionTrainer",
    "JointConfig",
    "JointTrainer",
    "SCPConfig",
    "SCPTrainer",
]
