"""Trainers of the three CLaRa stages: SCP, instruction tuning, joint training."""

from .instruction import InstructionConfig, InstructionTrainer
from .joint import JointConfig, JointTrainer
from .scp import SCPConfig, SCPTrainer


__all__ = ["InstructionConfig", "InstructionTrainer", "JointConfig", "JointTrainer", "SCPConfig", "SCPTrainer"]
