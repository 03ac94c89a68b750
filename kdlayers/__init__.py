"""Drop-in knowledge distillation for PyTorch vision models."""

from kdlayers.losses._base import DistillLoss as DistillLoss

__version__ = "0.1.0.dev0"
