"""Helpers of the losses on relations between the samples of a batch."""

from torch import Tensor

from kdlayers.errors import ShapeError
from kdlayers.functional import _checks as check


def samples(student: Tensor, teacher: Tensor, least: int) -> tuple[Tensor, Tensor]:
    """Both as ``[B, D]``; raise unless they are the same ``least`` or more samples."""
    for name, value in (("student", student), ("teacher", teacher)):
        check.floats(name, value)
        if value.dim() < 2 or not value.numel():
            raise ShapeError(
                f"{name} must be features [batch, ...] of at least one sample, got "
                f"{check.shape(value)}"
            )
    if len(student) != len(teacher):
        raise ShapeError(
            "student and teacher must be features of the same samples, got "
            f"{check.shape(student)} and {check.shape(teacher)}"
        )
    if len(student) < least:
        raise ShapeError(
            f"relations between samples need a batch of {least} or more, got "
            f"{check.shape(student)}; use drop_last=True in the DataLoader"
        )
    return student.flatten(1), teacher.flatten(1)
