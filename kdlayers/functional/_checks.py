"""Checks of arguments, and the reduction over samples or positions."""

from typing import Literal, TypeAlias

import torch
from torch import Tensor

from kdlayers.errors import ArgumentError, ArgumentTypeError, ShapeError

Reduction: TypeAlias = Literal["mean", "sum", "none"]


def reduce(values: Tensor, reduction: Reduction) -> Tensor:
    """Mean, sum or nothing over ``values``, one entry for each sample or position."""
    if reduction == "mean":
        return values.mean()
    if reduction == "sum":
        return values.sum()
    if reduction == "none":
        return values
    raise ArgumentError(f'reduction must be "mean", "sum" or "none", got {reduction!r}')


def positive(name: str, value: float) -> None:
    """Raise unless ``value`` is a finite number above 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ArgumentTypeError(f"{name} must be a number, got {type(value).__name__}")
    if not 0 < value < float("inf"):
        raise ArgumentError(f"{name} must be above 0 and finite, got {value}")


def not_negative(name: str, value: float) -> None:
    """Raise unless ``value`` is a finite number, 0 or more."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ArgumentTypeError(f"{name} must be a number, got {type(value).__name__}")
    if not 0 <= value < float("inf"):
        raise ArgumentError(f"{name} must be 0 or more and finite, got {value}")


def count(name: str, value: int, least: int = 1) -> int:
    """``value``; raise unless it is an integer of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ArgumentTypeError(f"{name} must be an integer, got {type(value).__name__}")
    if value < least:
        raise ArgumentError(f"{name} must be {least} or more, got {value}")
    return value


def floats(name: str, value: object) -> None:
    """Raise unless ``value`` is a tensor of real floating-point numbers."""
    if not isinstance(value, Tensor):
        raise ArgumentTypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if not value.is_floating_point():
        raise ArgumentTypeError(
            f"{name} must be a floating-point tensor, got {value.dtype}; "
            "the order of arguments is student, teacher, targets"
        )


def logits(student: Tensor, teacher: Tensor) -> None:
    """Raise unless both are logits [B, K] of one shape, with at least two classes."""
    floats("student", student)
    floats("teacher", teacher)
    if student.dim() != 2 or student.shape != teacher.shape:
        raise ShapeError(
            "student and teacher must be logits of one shape [batch, classes], got "
            f"{shape(student)} and {shape(teacher)}"
        )
    if student.shape[1] < 2 or student.shape[0] == 0:
        raise ShapeError(
            f"logits need a batch of at least 1 and at least 2 classes, got {shape(student)}"
        )


def given(targets: Tensor | None, loss: object) -> Tensor:
    """The labels; raise if there are none."""
    if targets is None:
        raise ArgumentTypeError(
            f"{type(loss).__name__} needs the labels: call it with (student, teacher, targets)"
        )
    return targets


def labels(targets: object, student: Tensor) -> Tensor:
    """The labels as int64 [B]; raise unless they are class indices that fit ``student``."""
    if not isinstance(targets, Tensor):
        raise ArgumentTypeError(f"targets must be a tensor, got {type(targets).__name__}")
    if targets.is_floating_point() or targets.is_complex() or targets.dtype == torch.bool:
        raise ArgumentTypeError(
            f"targets must be class indices [batch] or probabilities [batch, classes], got "
            f"{targets.dtype} {shape(targets)}; for one-hot rows pass targets.float()"
        )
    if targets.shape != student.shape[:1]:
        raise ShapeError(
            f"targets must be class indices of shape {list(student.shape[:1])}, one a sample, "
            f"got {shape(targets)}; for one-hot rows pass targets.float()"
        )
    targets = targets.long()
    # On an accelerator this check would wait for the device; gather reports the label there.
    if targets.device.type == "cpu" and not torch.compiler.is_compiling():
        _in_range(targets, student.shape[1])
    return targets


def _in_range(targets: Tensor, classes: int) -> None:
    low, high = int(targets.min()), int(targets.max())  # on the CPU: nothing to wait for
    if low < 0 or high >= classes:
        raise ArgumentError(
            f"targets must lie in 0..{classes - 1} for {classes} classes, got labels from {low} "
            f"to {high}"
        )


def shape(tensor: Tensor) -> list[int]:
    """The shape as a plain list, as messages show it."""
    return list(tensor.shape)
