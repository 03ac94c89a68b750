"""Reads maps, tokens and vectors of two models so that they can be compared."""

from typing import Literal, TypeAlias

from torch import Tensor

from kdlayers.errors import ShapeError
from kdlayers.functional import _checks as check
from kdlayers.losses._maps import on_one_grid

Tokens: TypeAlias = Literal["patch", "cls", "pooled"]


def alike(student: Tensor, teacher: Tensor) -> bool:
    """Whether `read_maps` has nothing to check or change: features of one shape."""
    return (
        isinstance(student, Tensor)
        and isinstance(teacher, Tensor)
        and student.shape == teacher.shape
        and student.dim() in (2, 3, 4)
        and bool(student.numel())
        and student.is_floating_point()
        and teacher.is_floating_point()
    )


def read(student: Tensor, teacher: Tensor, tokens: str) -> tuple[Tensor, Tensor]:
    """What ``tokens`` asks for: `read_maps`, or `read_vectors` of class tokens or of means."""
    if tokens == "patch":
        return read_maps(student, teacher)
    return read_vectors(student, teacher, class_token=tokens == "cls")


def read_maps(student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
    """All positions of both: maps on one grid, two vectors, or the same number of tokens."""
    _check(student, teacher)
    if student.dim() == 3 or teacher.dim() == 3:
        if student.dim() != teacher.dim() or student.shape[1] != teacher.shape[1]:
            raise ShapeError(
                "tokens [batch, tokens, channels] can only be compared with the same number of "
                f"tokens, got {check.shape(student)} and {check.shape(teacher)}; attach_kd "
                'converts the tokens of points, at=("student\'s", "teacher\'s"), to maps, or to '
                'vectors with tokens="cls" or "pooled"; without it use '
                "tokens.transpose(1, 2).unflatten(2, (height, width))"
            )
        return student, teacher
    if student.dim() == teacher.dim() == 2:
        return student, teacher
    ours, theirs = (t[:, :, None, None] if t.dim() == 2 else t for t in (student, teacher))
    return on_one_grid(ours, theirs)


def read_vectors(student: Tensor, teacher: Tensor, *, class_token: bool) -> tuple[Tensor, Tensor]:
    """One vector ``[B, C]`` per image of both: the first token, or the mean over positions."""
    _check(student, teacher)
    return _vector(student, class_token), _vector(teacher, class_token)


def _vector(features: Tensor, class_token: bool) -> Tensor:
    if features.dim() == 2:
        return features
    if features.dim() == 4:
        return features.mean(dim=(2, 3))
    return features[:, 0] if class_token else features.mean(dim=1)


def _check(student: Tensor, teacher: Tensor) -> None:
    for name, value in (("student", student), ("teacher", teacher)):
        check.floats(name, value)
        if value.dim() not in (2, 3, 4) or not value.numel():
            raise ShapeError(
                f"{name} must be maps [batch, channels, height, width], tokens [batch, tokens, "
                f"channels] or vectors [batch, channels], got {check.shape(value)}"
            )
    if len(student) != len(teacher):
        raise ShapeError(
            "student and teacher must be features of the same images, got batches of "
            f"{len(student)} and {len(teacher)}"
        )
