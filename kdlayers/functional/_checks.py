"""Helpers of all closed forms: they check arguments, widen dtypes and reduce values."""

from collections.abc import Callable, Sequence
from functools import wraps
from math import inf
from numbers import Integral, Real
from typing import Literal, ParamSpec, TypeAlias

import torch
from torch import Tensor
from torch.nn import functional as F

from kdlayers._utils.torch_internals import dispatches, is_any_autocast, is_functional
from kdlayers.errors import ArgumentError, ArgumentTypeError, ShapeError

P = ParamSpec("P")
Reduction: TypeAlias = Literal["mean", "sum", "none"]
NARROW = (torch.float16, torch.bfloat16)
"""The dtypes in which nothing is summed."""
_FIVE = (
    ": class maps of volumes are not compared; of stacked maps of images, as of deep supervision, "
    "pass the main one to kd.loss(y, logits=maps[:, 0])"
)
_ONE_CLASS = (
    "the softmax of one class is always 1: compare one logit, which is trained with binary "
    "cross-entropy, with BinaryKDLoss()"
)


def full_precision(function: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """Run ``function`` outside autocast, with float16 and bfloat16 tensors widened to float32."""

    @wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        narrow = False  # a plain loop, because small losses take little longer
        for value in (*args, *kwargs.values()):
            if isinstance(value, Tensor) and value.dtype in NARROW:
                narrow = True
        device = _device((*args, *kwargs.values())) if narrow or is_any_autocast() else None
        if device is None:
            return function(*args, **kwargs)
        wide = [_widened(arg) for arg in args]
        named = {key: _widened(arg) for key, arg in kwargs.items()}
        with torch.autocast(device, enabled=False):
            return function(*wide, **named)  # type: ignore[arg-type]  # the same types, wider

    return wrapper


def _device(values: Sequence[object]) -> str | None:
    return next((value.device.type for value in values if isinstance(value, Tensor)), None)


def _widened(value: object) -> object:
    return value.float() if isinstance(value, Tensor) and value.dtype in NARROW else value


def work_dtype(*tensors: Tensor) -> torch.dtype:
    """The dtype to compute in with these tensors: their common one, float32 or wider."""
    dtype = torch.float32
    for tensor in tensors:
        dtype = torch.promote_types(dtype, tensor.dtype)
    return dtype


@full_precision
def linear(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``inputs @ weight.T + bias`` in float32 or better."""
    return F.linear(inputs, weight, bias)


def reduce(values: Tensor, reduction: Reduction) -> Tensor:
    """Mean, sum or nothing over ``values``, one entry for each sample or position."""
    if reduction == "mean":
        return values.mean()
    if reduction == "sum":
        return values.sum()
    if reduction == "none":
        return values
    raise ArgumentError(f'reduction must be "mean", "sum" or "none", got {reduction!r}')


def positive(name: str, value: float) -> float:
    """``value`` as a number of Python; raise unless it is finite and above 0."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        value = _number(name, value)
    if not 0 < value < inf:
        raise ArgumentError(f"{name} must be above 0 and finite, got {value}")
    return value


def not_negative(name: str, value: float) -> float:
    """``value`` as a number of Python; raise unless it is finite, 0 or more."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        value = _number(name, value)
    if not 0 <= value < inf:
        raise ArgumentError(f"{name} must be 0 or more and finite, got {value}")
    return value


def _number(name: str, value: object) -> float:
    """A number that is not Python's as a float: NumPy's cannot be multiplied by a tensor."""
    if isinstance(value, bool) or not isinstance(value, Real):
        raise ArgumentTypeError(f"{name} must be a number, got {type(value).__name__}")
    return float(value)


def integer(name: str, value: object) -> int:
    """``value`` as an int; raise unless it is an integer."""
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ArgumentTypeError(f"{name} must be an integer, got {type(value).__name__}")
    return int(value)


def count(name: str, value: int, least: int = 1) -> int:
    """``value`` as an int; raise unless it is an integer of at least ``least``."""
    value = integer(name, value)
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
    if isinstance(value, Tensor) and value.is_floating_point():
        return value
    order = "; the order of arguments is student, teacher, targets"
    hint = order if name in ("student", "teacher") else ""
    dtype = tensor(name, value).dtype
    raise ArgumentTypeError(f"{name} must be a floating-point tensor, got {dtype}{hint}")


def filled(what: str, values: Tensor) -> None:
    """Raise if ``values`` is empty, as the last batch of a filtered loader may be."""
    if not values.numel():
        raise ShapeError(
            f"{what} must have at least one sample and one element, got {shape(values)}: the "
            "mean of an empty tensor is undefined; skip empty batches"
        )


def logits(student: Tensor, teacher: Tensor) -> None:
    """Raise unless both are logits [B, K] of one shape, with at least two classes."""
    floats("student", student)
    floats("teacher", teacher)
    if student.dim() != 2 or student.shape != teacher.shape:
        raise ShapeError(
            "student and teacher must be logits of one shape [batch, classes], got "
            f"{shape(student)} and {shape(teacher)}" + (_FIVE if student.dim() == 5 else "")
        )
    filled("logits", student)
    if student.shape[1] < 2:
        raise ShapeError(f"logits need at least 2 classes, got {shape(student)}; {_ONE_CLASS}")


def is_iterable(value: object) -> bool:
    """Whether a loop can run over it; a data set may have only ``__getitem__``."""
    return hasattr(value, "__iter__") or hasattr(value, "__getitem__")


def is_map(value: object) -> bool:
    """Whether it is a tensor of four axes, which losses on logits read as a class map."""
    return isinstance(value, Tensor) and value.dim() == 4


def scores(student: Tensor, teacher: Tensor) -> None:
    """Raise unless both are logits ``[B, K]``, or class maps ``[B, K, H, W]``, of one shape."""
    if is_map(student):
        class_maps(student, teacher)
    else:
        logits(student, teacher)


def class_maps(student: Tensor, teacher: Tensor, *, sized: bool = True) -> None:
    """Raise unless both are class maps of the same images and classes; ``sized``: and one size."""
    floats("student", student)
    floats("teacher", teacher)
    axes = None if sized else 2
    if teacher.dim() != 4 or student.shape[:axes] != teacher.shape[:axes]:
        raise ShapeError(
            "student and teacher must be class maps [batch, classes, height, width] of the same "
            f"images and classes{', and of one size' if sized else ''}, got {shape(student)} and "
            f"{shape(teacher)}"
        )
    if student.shape[1] < 2 or not student.numel() or not teacher.numel():
        raise ShapeError(
            "class maps need a batch of at least 1, a pixel and at least 2 classes, got "
            f"{shape(student)} and {shape(teacher)}"
            + (f"; {_ONE_CLASS}" if student.shape[1] == 1 else "")
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
    targets = class_indices("targets", targets)
    if targets.shape != student.shape[:1]:
        raise ShapeError(
            f"targets must be class indices of shape {list(student.shape[:1])}, one per sample, "
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
    """Raise unless all indices lie in 0..classes - 1, where they are `readable`.

    An accelerator reports a wrong label when it indexes.
    """
    if not (indices.numel() and readable(indices)):
        return
    low, high = int(indices.min()), int(indices.max())
    if low < 0 or high >= classes:
        raise ArgumentError(
            f"{name} must lie in 0..{classes - 1} for {classes} classes, got labels from {low} "
            f"to {high}"
        )


def readable(tensor: Tensor) -> bool:
    """Whether a value of ``tensor`` can be read at no cost.

    Reading from an accelerator waits for the device. Fake and distributed tensors, the graphs of
    ``torch.compile`` and the tensors of ``torch.func`` have no values to read.
    """
    if type(tensor) is not Tensor and dispatches(tensor):
        return False
    return tensor.is_cpu and not torch.compiler.is_compiling() and not is_functional(tensor)


def known_above(least: float, values: Tensor) -> bool:
    """Whether all values are above ``least``; False also where they are not `readable`."""
    return readable(values) and values.detach().min().item() > least


def shape(tensor: Tensor) -> list[int]:
    """The shape as a plain list, as messages show it."""
    return list(tensor.shape)
