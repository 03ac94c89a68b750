"""Distances between features of one shape."""

from typing import Literal, TypeAlias

from torch import Tensor
from torch.nn import functional as F

from kdlayers.functional._checks import full_precision
from kdlayers.functional._cosine import cosine

Distance: TypeAlias = Literal["cosine", "mse", "smooth_l1"]


@full_precision
def feature_distance(
    student: Tensor, teacher: Tensor, distance: Distance, channel_dim: int
) -> Tensor:
    """The mean distance: over positions for ``"cosine"``, over all elements for the others."""
    if distance == "cosine":
        return 1 - cosine(student, teacher, channel_dim).mean()
    if distance == "smooth_l1":
        return F.smooth_l1_loss(student, teacher.to(student.dtype))
    if student.dtype == teacher.dtype:
        return F.mse_loss(student, teacher)
    # Without F.mse_loss, whose backward on torch 2.9 refuses a teacher in float64.
    return (student - teacher).square().mean()
