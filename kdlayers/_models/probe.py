"""Finds the spatial axes of a module's output by running larger images."""

import warnings
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kdlayers._models.undisturbed import undisturbed
from kdlayers._utils.tree import Path, leaves, mapped, pick

Shape = tuple[int, ...]
IMAGES = 2
"""This many images are enough to see how shapes grow."""
MOST_PREFIXES = 5
"""The largest number of prefix tokens that is tried without being stated."""


@dataclass(frozen=True)
class Growth:
    """Which axis of an output grows with the height of the images, and which with the width.

    An axis is None if no axis of the output grows, or if several do.
    """

    height: int | None
    width: int | None
    tall: Shape
    """Shape of the output for images of twice the height."""
    wide: Shape
    """Shape of the output for images of twice the width."""


def growth(
    model: nn.Module, example: tuple[Any, ...], paths: Mapping[str, Path]
) -> dict[str, Growth]:
    """Growth of the tensors at ``paths`` of the modules of these names.

    Runs the model in eval mode on a few images of the example, then on images of twice the height,
    then of twice the width. The result is empty if the model does not take one of these sizes.
    """
    images = [tensor for _, tensor in leaves(example) if tensor.dim() == 4]
    if not images:
        return {}
    count, size = len(images[0]), images[0].shape[2:]

    def made(axis: int | None) -> Any:
        def change(tensor: Tensor) -> Tensor:
            part = tensor[:IMAGES] if tensor.dim() and len(tensor) == count else tensor
            grows = axis is not None and tensor.dim() == 4 and tensor.shape[2:] == size
            return torch.cat([part, part], axis or 0) if grows else part.clone()

        return mapped(example, change)

    runs = [_shapes(model, made(axis), paths) for axis in (None, 2, 3)]
    names = set(runs[0]) & set(runs[1]) & set(runs[2])
    return {name: _compare(*(run[name] for run in runs)) for name in names}


def _compare(plain: Shape, tall: Shape, wide: Shape) -> Growth:
    return Growth(_axis(plain, tall), _axis(plain, wide), tall, wide)


def _axis(plain: Shape, larger: Shape) -> int | None:
    """The axis that grew, if it is the only one that changed."""
    if len(plain) != len(larger):
        return None
    changed = [i for i, (a, b) in enumerate(zip(plain, larger, strict=True)) if a != b]
    return changed[0] if len(changed) == 1 and larger[changed[0]] > plain[changed[0]] else None


def _shapes(model: nn.Module, args: tuple[Any, ...], paths: Mapping[str, Path]) -> dict[str, Shape]:
    shapes: dict[str, Shape] = {}

    def note(name: str, output: Any) -> None:
        found = pick(output, paths[name])
        if isinstance(found, Tensor):
            shapes[name] = tuple(found.shape)

    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        warnings.simplefilter("ignore")  # about the size, which only this run uses
        stack.enter_context(undisturbed(model))
        stack.enter_context(torch.no_grad())
        for name in paths:
            module = model.get_submodule(name)
            hook = module.register_forward_hook(lambda _m, _a, out, name=name: note(name, out))
            stack.callback(hook.remove)
        try:
            model(*args)
        except torch.OutOfMemoryError:
            return {}
        except Exception:  # a model with a fixed input size may raise anything
            return {}
    return shapes


def are_fixed_tokens(shape: Shape, own: Growth, maps: Sequence[tuple[Shape, Growth]]) -> bool:
    """Whether larger images give as many tokens, although ``maps`` of the model grow.

    Tokens of a map that was pooled to a fixed size have a grid, and a single token needs none.
    """
    if len(shape) != 3 or shape[1] == 1 or {own.tall[1:], own.wide[1:]} != {shape[1:]}:
        return False
    grows = any(found.height is not None and found.width is not None for _, found in maps)
    pooled = [size[1:] for size, found in maps if found.tall[1:] == found.wide[1:] == size[1:]]
    positions = {count for a, b, c in pooled for count in (a * b, b * c)}
    return grows and positions.isdisjoint(range(shape[1] - MOST_PREFIXES, shape[1] + 1))
