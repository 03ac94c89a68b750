"""Distances between features of one shape."""

from typing import Literal, TypeAlias

import torch
from torch import Tensor

from kdlayers.functional._checks import full_precision
from kdlayers.functional._cosine import cosine

Distance: TypeAlias = Literal["cosine", "mse", "smooth_l1"]


@full_precision
def feature_distance(student: Tensor, teacher: Tensor, distance: Distance) -> Tensor:
    """The mean distance: over positions for ``"cosine"``, over all elements for the others."""
    if distance == "cosine":
        return 1 - cosine(student, teacher, channel_dim(teacher)).mean()
    # The operators themselves, because the functions of torch.nn.functional broadcast first. With
    # equal shapes that changes nothing, and on small features it takes longer than the loss.
    loss: Tensor
    if distance == "smooth_l1":
        loss = torch.ops.aten.smooth_l1_loss.default(student, teacher.to(student.dtype))
    elif student.dtype == teacher.dtype:
        loss = torch.ops.aten.mse_loss.default(student, teacher)
    else:  # written out, because the operator's backward on torch 2.9 refuses a float64 teacher
        loss = (student - teacher).square().mean()
    return loss


def channel_dim(features: Tensor) -> int:
    """The axis of the channels: the last one of tokens, the second one of maps and vectors."""
    return -1 if features.dim() == 3 else 1
