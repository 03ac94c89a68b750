"""Helpers of the losses on feature maps."""

from torch import Tensor
from torch.nn import functional as F

from kdlayers.errors import ShapeError
from kdlayers.functional import _checks as check


def check_maps(student: Tensor, teacher: Tensor) -> None:
    """Raise unless both are feature maps of one batch."""
    check_map("student", student)
    check_map("teacher", teacher)
    if len(student) != len(teacher):
        raise ShapeError(
            "student and teacher must be maps of the same images, got batches of "
            f"{len(student)} and {len(teacher)}"
        )


def check_map(name: str, value: Tensor) -> None:
    """Raise unless ``value`` is a feature map with at least one image, channel and position."""
    check.floats(name, value)
    if value.dim() != 4:
        advice = (
            "attach_kd converts tokens and channels-last maps; without it use "
            "tokens.transpose(1, 2).unflatten(2, (height, width)) or maps.movedim(-1, 1)"
        )
        if value.dim() == 2:  # logits, if `at` was forgotten
            advice = "without at=, attach_kd passes logits: give the loss a point, at='layer4'"
        raise ShapeError(
            f"{name} must be feature maps [batch, channels, height, width], got "
            f"{check.shape(value)}; {advice}"
        )
    check.filled(f"{name} maps", value)


def check_positions(student: Tensor, teacher: Tensor, loss: object) -> None:
    """Raise unless both have several positions on one grid, so that these can be compared."""
    height, width = map(min, student.shape[2:], teacher.shape[2:])
    if height * width < 2:
        raise ShapeError(
            f"maps must have at least 2 positions on one grid, got {check.shape(student)} and "
            f"{check.shape(teacher)}; {type(loss).__name__} compares positions: choose an earlier "
            "point, larger images, or RKDLoss for vectors"
        )


def on_one_grid(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """Both maps on the smaller grid, axis by axis; the larger one is average-pooled."""
    if student.shape[2:] == teacher.shape[2:]:
        return student, teacher
    height, width = map(min, student.shape[2:], teacher.shape[2:])
    size = (height, width)
    ours, theirs = (
        maps if maps.shape[2:] == size else F.adaptive_avg_pool2d(maps, size)
        for maps in (student, teacher)
    )
    return ours, theirs
