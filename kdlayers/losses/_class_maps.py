"""Helpers of losses on class maps ``[B, K, H, W]``: resizing, and the pixels that count."""

import torch
from torch import Tensor
from torch.nn import functional as F

from kdlayers.errors import ShapeError
from kdlayers.functional import _checks as check
from kdlayers.functional._checks import full_precision


@full_precision
def resized(teacher: Tensor, student: Tensor) -> Tensor:
    """The teacher's class map interpolated to the size of the student's."""
    size = student.shape[2:]
    if teacher.shape[2:] == size:
        return teacher
    return F.interpolate(teacher, size, mode="bilinear", align_corners=False, antialias=True)


def counted(targets: Tensor, student: Tensor, ignore_index: int) -> Tensor:
    """Mask ``[B, H, W]`` of labels that are not ``ignore_index``, at the size of the map.

    Raises:
        ShapeError: if ``targets`` are not labels of pixels.
    """
    if targets.dim() == 4 and targets.shape[1] == 1:
        targets = targets[:, 0]
    if targets.dim() != 3 or len(targets) != len(student):
        raise ShapeError(
            "targets for class maps must be labels of the pixels [batch, height, width], got "
            f"{check.shape(targets)} for maps {check.shape(student)}; pass None to compare every "
            "pixel"
        )
    # In 64 bits: uint8 would turn -100 into 156, the label of a class.
    counts = targets.long() != ignore_index
    if counts.shape[1:] == student.shape[2:]:
        return counts
    found = F.interpolate(counts[:, None].float(), student.shape[2:], mode="nearest-exact")
    return found[:, 0] > 0.5


def mean_where(values: Tensor, counts: Tensor) -> Tensor:
    """The mean of ``values`` where ``counts`` is True; 0 if it is False everywhere."""
    return torch.where(counts, values, 0.0).sum() / counts.sum().clamp_min(1)
