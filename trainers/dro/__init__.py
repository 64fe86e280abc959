"""DRO, the text-side joint baseline: selection model and generator learn together on raw text (arXiv 2505.03075)."""

from .model import DRO
from .trainer import DROConfig, DROTrainer


__all__ = ["DRO", "DROConfig", "DROTrainer"]
