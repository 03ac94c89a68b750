"""From the student's call to the teacher's: the images, whatever they are called; no labels."""

from inspect import Parameter, signature
from typing import Any

from torch import Tensor, nn

_LABELS = ("labels", "targets", "target")
"""Keywords that hold what the student's own loss compares with; also any name ``..._labels``."""


def for_teacher(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of the student's call, as the teacher's forward takes them.

    Labels stay with the student. Images given by keyword are passed by position where the teacher
    knows no such keyword (``pixel_values`` and a model of torchvision), and switches without
    tensors that it does not know are left out.
    """
    if not kwargs:
        return args, kwargs
    kept = {key: value for key, value in kwargs.items() if not _is_label(key)}
    parameters = signature(model.forward).parameters.values()
    if any(p.kind is Parameter.VAR_KEYWORD for p in parameters):
        return args, kept
    known = {p.name for p in parameters if p.kind is not Parameter.VAR_POSITIONAL}
    if not args:
        first = next((k for k, v in kept.items() if isinstance(v, Tensor)), None)
        if first is not None and first not in known:
            args = (kept.pop(first),)
    # An unknown keyword with a tensor stays: the teacher's own error says what it misses.
    return args, {k: v for k, v in kept.items() if k in known or isinstance(v, Tensor)}


def _is_label(key: str) -> bool:
    return key in _LABELS or key.endswith("_labels")
