"""Checks of arguments, and the reduction over samples or positions."""

from collections.abc import Sequence
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from kdlayers._utils.torch_internals import is_functional
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
    _number(name, value)
    if not 0 < value < float("inf"):
        raise ArgumentError(f"{name} must be above 0 and finite, got {value}")


def not_negative(name: str, value: float) -> None:
    """Raise unless ``value`` is a finite number, 0 or more."""
    _number(name, value)
    if not 0 <= value < float("inf"):
        raise ArgumentError(f"{name} must be 0 or more and finite, got {value}")


def _number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ArgumentTypeError(f"{name} must be a number, got {type(value).__name__}")


def count(name: str, value: int, least: int = 1) -> int:
    """``value``; raise unless it is an integer of at least ``least``."""
    if isinstance(value, bool) or not isinstance(value, int):
        raise ArgumentTypeError(f"{name} must be an integer, got {type(value).__name__}")
    if value < least:
        raise ArgumentError(f"{name} must be {least} or more, got {value}")
    return value


def one_of(name: str, value: object, known: Sequence[str]) -> None:
    """Raise unless ``value`` is one of the words ``known``."""
    if value not in known:
        raise ArgumentError(f"{name} must be one of {', '.join(known)}, got {value!r}")


def tensor(name: str, value: object) -> Tensor:
    """``value``; raise unless it is a tensor."""
    if not isinstance(value, Tensor):
        raise ArgumentTypeError(f"{name} must be a tensor, got {type(value).__name__}")
    return value


def floats(name: str, value: object) -> Tensor:
    """``value``; raise unless it is a tensor of real floating-point numbers."""
    found = tensor(name, value)
    if not found.is_floating_point():
        order = "; the order of arguments is student, teacher, targets"
        hint = order if name in ("student", "teacher") else ""
        raise ArgumentTypeError(f"{name} must be a floating-point tensor, got {found.dtype}{hint}")
    return found


def filled(what: str, values: Tensor) -> None:
    """Raise if ``values`` is empty, as the last batch of a filtered loader may be."""
    if not values.numel():
        raise ShapeError(
            f"{what} must have at least one sample and one element, got {shape(values)}: a mean "
            "over nothing is not defined; skip empty batches"
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
    filled("logits", student)
    if student.shape[1] < 2:
        raise ShapeError(f"logits need at least 2 classes, got {shape(student)}")


def given(targets: Tensor | None, loss: object) -> Tensor:
    """The labels; raise if there are none."""
    if targets is None:
        raise ArgumentTypeError(
            f"{type(loss).__name__} needs the labels: call it with (student, teacher, targets)"
        )
    return targets


def labels(targets: object, student: Tensor) -> Tensor:
    """The labels as int64 [B]; raise unless they are class indices that fit ``student``."""
    targets = class_indices("targets", targets)
    if targets.shape != student.shape[:1]:
        raise ShapeError(
            f"targets must be class indices of shape {list(student.shape[:1])}, one a sample, "
            f"got {shape(targets)}; for one-hot rows pass targets.float()"
        )
    in_range("targets", targets, student.shape[1])
    return targets


def class_indices(name: str, value: object) -> Tensor:
    """``value`` as int64; raise unless it is a tensor of integers."""
    found = tensor(name, value)
    if found.is_floating_point() or found.is_complex() or found.dtype == torch.bool:
        raise ArgumentTypeError(
            f"{name} must be integer class indices, one for each sample, got {found.dtype} of "
            f"shape {shape(found)}, or probabilities [batch, classes]; for one-hot rows pass "
            f"{name}.float()"
        )
    return found.long()


def in_range(name: str, indices: Tensor, classes: int) -> None:
    """Raise unless all indices lie in 0..classes - 1, where they can be read at no cost.

    Not on an accelerator, where reading waits for the device and indexing reports a wrong label
    anyway; nor in a graph of ``torch.compile`` or under ``torch.func``.
    """
    if not readable(indices):
        return
    low, high = int(indices.min()), int(indices.max())
    if low < 0 or high >= classes:
        raise ArgumentError(
            f"{name} must lie in 0..{classes - 1} for {classes} classes, got labels from {low} "
            f"to {high}"
        )


def readable(values: Tensor) -> bool:
    """Whether values can be looked at here without waiting for a device or leaving a graph."""
    on_cpu = values.device.type == "cpu" and values.numel() > 0
    return on_cpu and not torch.compiler.is_compiling() and not is_functional(values)


def shape(tensor: Tensor) -> list[int]:
    """The shape as a plain list, as messages show it."""
    return list(tensor.shape)
