"""The features before and after a KD layer of a model."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kdlayers._layer.layer import KDLayer, LayerParts
from kdlayers._models.examples import to_model
from kdlayers._models.layouts import Layout
from kdlayers._models.names import readings
from kdlayers._models.trace import trace
from kdlayers._models.undisturbed import undisturbed
from kdlayers._models.wrappers import plainly_named
from kdlayers._step.sites import slots
from kdlayers.errors import (
    ArgumentError,
    AttachError,
    LayoutError,
    NoMatchError,
    ShapeError,
)
from kdlayers.functional import _checks as check


def find_layer(student: nn.Module, at: str | None) -> tuple[str, LayerParts]:
    """The name and the KD layer called ``at``, or those of the only one.

    A layer that hooks call has the name of its point; others have their names as modules.

    Raises:
        AttachError: if there is no KD layer.
        ArgumentError: if there are several and ``at`` is None.
        NoMatchError: if none has this name.
    """
    layers: dict[str, LayerParts] = dict(slots(student))
    layers |= {n: module for n, module in student.named_modules() if isinstance(module, KDLayer)}
    names = ", ".join(map(repr, layers))
    if not layers:
        raise AttachError(
            f"this {type(student).__name__} has no KD layers; call attach_kd first, and instead of "
            "a folded copy pass the student that it was made from"
        )
    if at is None and len(layers) > 1:
        raise ArgumentError(f"this student has KD layers at {names}; choose one with at=")
    wanted = [next(iter(layers))] if at is None else readings(at)
    name = next((each for each in wanted if each in layers), None)
    if name is None:
        raise NoMatchError(f"there is no KD layer at {at!r}; this student has them at {names}")
    return name, layers[name]


def check_images(images: Any) -> Tensor:
    """``images``; raise ArgumentTypeError or ShapeError unless they are a batch."""
    found = check.tensor("images", images)
    if found.dim() != 4:
        raise ShapeError(
            f"images must be [B, channels, height, width], got {tuple(found.shape)}; "
            "use image.unsqueeze(0) for a batch of one"
        )
    return found


def watched(student: nn.Module, layer: LayerParts, images: Tensor) -> list[tuple[Tensor, Tensor]]:
    """Features before and after ``layer``, for each of its calls in one forward of ``student``.

    The forward runs in eval mode; training flags and random states do not change.
    """
    seen: list[tuple[Tensor, Tensor]] = []

    def hook(_module: nn.Module, args: Any, output: Any) -> None:
        after = output[0] if isinstance(output, tuple) else output
        if after is not args[0]:  # a slot returns its input if a parent runs it as a child
            # Copies, because later modules may change them in place.
            seen.append((args[0].detach().clone(), after.detach().clone()))

    handle = layer.register_forward_hook(hook)
    try:
        with undisturbed(student), torch.no_grad():
            student(*to_model((images,), student))
    finally:
        handle.remove()
    return seen


def layout_of(
    features: Tensor, name: str, layer: LayerParts, student: nn.Module, images: Tensor
) -> Layout:
    """The layout of ``layer``'s features; for tokens it needs a dry run of ``student``.

    Raises:
        LayoutError: if the positions do not form a grid, or the first axis is not the batch.
    """
    shape, dim = tuple(features.shape), layer.head.channel_dim % features.dim()
    if shape[0] != len(images):
        raise LayoutError(
            f"the features of {name!r} have shape {shape}, but there are {len(images)} images: "
            "the first axis is not the batch"
        )
    if len(shape) == 4 and dim in (1, 3):
        return Layout("NCHW" if dim == 1 else "NHWC")
    if dim != len(shape) - 1:
        raise LayoutError(
            f"the features of {name!r} have shape {shape} with channels on axis {dim}; maps [B, "
            "C, H, W] or [B, H, W, C], tokens [B, L, C] and vectors [B, C] can be shown"
        )
    if dim == 1:
        return Layout("vector")
    own = next(key for key, module in plainly_named(student) if module is layer)
    # A dry run, as in attach_kd: the number of tokens alone does not tell the grid.
    return trace(student, (images[:2],), "student").layout(own)


def assign(layer: LayerParts, features: Tensor) -> tuple[Tensor, Tensor]:
    """Scores a and assignment p = ReLU(BN(a)), ``[..., K]``, of features ``[..., C]``.

    The batch norm uses its running statistics, as in eval mode.
    """
    scores = layer.head.project(features)
    norm = layer.norm
    normed = F.batch_norm(
        scores.reshape(-1, scores.shape[-1]),
        norm.running_mean,
        norm.running_var,
        norm.weight,
        norm.bias,
        norm.running_mean is None,
        0.0,
        norm.eps,
    )
    return scores, F.relu(normed).view_as(scores)
