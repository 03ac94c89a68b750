"""Class maps ``[B, K, H, W]``: logits for every pixel."""

from torch import Tensor

from kdlayers.errors import ShapeError
from kdlayers.functional import _checks as check


def is_map(value: object) -> bool:
    """Whether it is a tensor of four axes, which stands for a class map where logits are read."""
    return isinstance(value, Tensor) and value.dim() == 4


def check_scores(student: Tensor, teacher: Tensor) -> None:
    """Raise unless both are logits ``[B, K]``, or class maps, of one shape."""
    if is_map(student):
        check_class_maps(student, teacher)
    else:
        check.logits(student, teacher)


def check_class_maps(student: Tensor, teacher: Tensor, *, sized: bool = True) -> None:
    """Raise unless both are class maps of the same images and classes, ``sized``: of one size."""
    check.floats("student", student)
    check.floats("teacher", teacher)
    axes = None if sized else 2
    if teacher.dim() != 4 or student.shape[:axes] != teacher.shape[:axes]:
        raise ShapeError(
            "student and teacher must be class maps [batch, classes, height, width] of the same "
            f"images and classes{', and of one size' if sized else ''}, got "
            f"{check.shape(student)} and {check.shape(teacher)}"
        )
    if student.shape[1] < 2 or not student.numel() or not teacher.numel():
        raise ShapeError(
            "class maps need a batch of at least 1, a pixel and at least 2 classes, got "
            f"{check.shape(student)} and {check.shape(teacher)}"
        )
