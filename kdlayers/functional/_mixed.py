"""Labels that are probabilities, as mixup, CutMix and label smoothing produce them."""

from collections.abc import Callable

import torch
from torch import Tensor

from kdlayers.errors import ArgumentError, ShapeError
from kdlayers.functional import _checks as check
from kdlayers.functional._checks import Reduction, work_dtype

_ROUNDING = 1e-3
"""Labels this close to the uniform part belong to it; more than bfloat16 loses in a product."""


def is_mixed(targets: object) -> bool:
    """Whether these are probabilities ``[..., classes]`` and not class indices."""
    return isinstance(targets, Tensor) and targets.is_floating_point()


def classes_of(targets: Tensor, classes: int) -> tuple[Tensor, Tensor | None]:
    r"""The classes that hold the weight of each label, and their shares of it.

    The classes are those with a label above the uniform part, which is the smallest label where
    more than half of the classes have it, but not all (0 after mixup, :math:`\epsilon / C` after
    smoothing), else 0. Their labels are divided by their sum.

    Args:
        targets: ``[..., classes]``, non-negative; rows need not sum to 1.
        classes: C, the number of classes.

    Returns:
        Class indices ``[..., m]`` and shares ``[..., m]``, with m the largest number of classes
        that a row has; rows with fewer repeat their first class with shares of 0. Where m is 1:
        ``[...]``, and no shares.

    Raises:
        ShapeError: if the last axis does not have ``classes`` entries.
        ArgumentError: if a label is negative or not finite, or a row has no weight.
    """
    if targets.dim() == 0 or targets.shape[-1] != classes:
        raise ShapeError(
            f"labels of dtype {str(targets.dtype).removeprefix('torch.')} are read as "
            f"probabilities [batch, {classes}], one for each class, but their shape is "
            f"{check.shape(targets)}; for class indices pass labels.long()"
        )
    labels = targets.detach().to(work_dtype(targets))
    least = labels.amin(dim=-1, keepdim=True)
    equal = (labels == least).sum(dim=-1, keepdim=True)
    uniform = (equal * 2 > classes) & (equal < classes)
    floor = torch.where(uniform, least * (1 + _ROUNDING), 0.0)
    held = labels > floor
    # One wait for the device, for everything that has to be known here.
    counts = held.sum(dim=-1)
    bad = ~(labels.isfinite() & (labels >= 0)).all()
    most, fewest, wrong = torch.stack([counts.max(), counts.min(), bad.to(counts.dtype)]).tolist()
    if wrong or not fewest:
        raise ArgumentError(
            "labels given as probabilities must be finite and 0 or more, with a class above 0 in "
            "every row, as mixup, CutMix and label smoothing produce them; for several labels per "
            "image, or none, use BinaryKDLoss()"
        )
    if most == 1:
        return labels.argmax(dim=-1), None
    shares, found = torch.where(held, labels, 0.0).topk(most, dim=-1)
    # A row with fewer classes repeats its first: the term of another one may be NaN, times 0 too.
    found = torch.where(shares > 0, found, found[..., :1])
    return found, shares / shares.sum(dim=-1, keepdim=True)


def mean_over_classes(
    term: Callable[[Tensor, Reduction], Tensor],
    targets: Tensor,
    classes: int,
    reduction: Reduction,
) -> Tensor:
    """``term(labels [B], reduction)`` of hard labels, as its label-weighted mean for mixed ones.

    Labels that hold one class each give exactly the term of these classes.
    """
    found, shares = classes_of(targets, classes)
    if shares is None:
        return term(found, reduction)
    values = [term(labels, "none") for labels in found.unbind(dim=-1)]
    return check.reduce((torch.stack(values, dim=-1) * shares).sum(dim=-1), reduction)
