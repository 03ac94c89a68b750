"""Converts the arguments of the student's call for the teacher: images are kept, labels dropped."""

from collections.abc import Callable, Mapping
from inspect import Parameter, signature
from typing import Any, TypeAlias, TypeVar

from torch import Tensor, nn

from kdlayers._step.tape import version_of
from kdlayers._utils.tree import leaves
from kdlayers.errors import ArgumentError, CaptureError

Transform: TypeAlias = Callable[[Tensor], Tensor]
Key = TypeVar("Key")
_LABELS = ("labels", "targets", "target")
"""Keywords that hold labels for the student's own loss. Names that end in ``_labels`` also do."""


def for_teacher(
    model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of the student's call in the form that the teacher's forward takes.

    Labels are removed. If the teacher does not accept the keyword of the images (such as
    ``pixel_values`` with a torchvision model), the images become a positional argument. Other
    unknown keywords are removed unless they hold a tensor.
    """
    if not kwargs:
        return args, kwargs
    kept = {key: value for key, value in kwargs.items() if not _is_label(key)}
    parameters = signature(model.forward).parameters.values()
    if any(p.kind is Parameter.VAR_KEYWORD for p in parameters):
        return args, kept
    known = {p.name for p in parameters if p.kind is not Parameter.VAR_POSITIONAL}
    if not args:
        first = _images(kept)
        if first is not None and first not in known:
            args = (kept.pop(first),)
    # An unknown keyword with a tensor is kept, so that the teacher itself raises the error.
    return args, {k: v for k, v in kept.items() if k in known or isinstance(v, Tensor)}


def _is_label(key: str) -> bool:
    return key in _LABELS or key.endswith("_labels")


def transformed(
    args: tuple[Any, ...], kwargs: dict[str, Any], transform: Transform
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The inputs of a forward with the images sent through ``transform``.

    The images are the first tensor of three or more axes, which the tokens of a text have not, else
    the first argument or the first tensor among the keywords.
    """
    if args and isinstance(args[0], Mapping):
        raise CaptureError(
            "teacher_transform converts images, but the student was called with a "
            f"{type(args[0]).__name__} with the keys {list(args[0])}: pass the images as in "
            "`with kd.batch(images):` around the call, and the teacher gets these"
        )
    if args:
        at = _images(dict(enumerate(args))) or 0
        return (*args[:at], _converted(args[at], transform), *args[at + 1 :]), kwargs
    key = _images(kwargs)
    if key is not None:
        return args, {**kwargs, key: _converted(kwargs[key], transform)}
    raise CaptureError(
        "teacher_transform found no images: student(...) was called without a tensor; call "
        "student(x) or student(name=x), or wrap the call in `with kd.batch(x):`"
    )


def _images(values: dict[Key, Any]) -> Key | None:
    """The key of the images among the arguments of a call; None if no argument is a tensor."""
    tensors = {key: value for key, value in values.items() if isinstance(value, Tensor)}
    return next((key for key, t in tensors.items() if t.dim() > 2), next(iter(tensors), None))


def _converted(images: Any, transform: Transform) -> Any:
    before = [version_of(tensor) for _, tensor in leaves(images)]
    converted = transform(images)
    if before != [version_of(tensor) for _, tensor in leaves(images)]:
        raise ArgumentError(
            "teacher_transform changes the images in place, but the student and other teachers use "
            "them too: let it return new tensors (leave out inplace=True), or pass "
            "teacher_transform=lambda x: transform(x.clone())"
        )
    return converted
