"""Labels of images or positions: class indices, or probabilities such as those of mixup."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from kdlayers.errors import ArgumentError, ArgumentTypeError, ShapeError
from kdlayers.functional._mixed import classes_of, is_mixed


def hard_labels(features: Tensor, labels: object) -> Tensor:
    """Class indices, int64, for every position [...] of features [..., D]; for fits.

    Raises:
        ArgumentError: if there are no labels.
        ArgumentTypeError: if the labels are not integers, such as those of mixup.
        ShapeError: if there is not one label for each image, or one for each position.
    """
    if is_mixed(_checked(labels)):
        raise ArgumentTypeError(
            f"DecisionTargets is fitted to integer class labels, got {_found(labels)}; pass fit() "
            "a loader without mixup, CutMix and label smoothing. Training batches may use them"
        )
    return _spread(features, labels)


def soft_labels(features: Tensor, labels: object, classes: int) -> tuple[Tensor, Tensor | None]:
    """Classes and shares of every position [...] of features [..., D].

    Returns:
        Class indices ``[...]`` and None; or, if the labels are probabilities of several classes,
        class indices and shares ``[..., m]``.

    Raises:
        ArgumentError: if there are no labels, or negative ones.
        ArgumentTypeError: if the labels are not a tensor of numbers.
        ShapeError: if there is not one label for each image, or one for each position, with
            an axis of ``classes`` for probabilities.
    """
    labels = _checked(labels)
    if not is_mixed(labels):
        return _spread(features, labels), None
    indices, shares = classes_of(labels, classes)
    if shares is None:
        return _spread(features, indices), None
    where, several = list(features.shape[:-1]), shares.shape[-1:]
    if not _per_image_or_position(shares.shape[:-1], where):
        raise ShapeError(
            "labels given as probabilities need one row for each image or position, so their "
            f"shape must be {_shapes(where, classes)}, got {_found(labels)}"
        )
    between = (1,) * (len(where) - shares.dim() + 1)
    shape = (*shares.shape[:-1], *between, *several)
    whole = (*where, *several)
    return indices.reshape(shape).expand(whole), shares.reshape(shape).expand(whole)


def _spread(features: Tensor, labels: object) -> Tensor:
    labels = _checked(labels)
    where = list(features.shape[:-1])
    if labels.dim() == 4 and len(where) == 3 and labels.shape[1] == 1:
        labels = labels[:, 0]  # masks with an axis of channels, as KDLoss takes them too
    if labels.dim() == len(where) == 3 and len(labels) == where[0]:
        labels = _resized(labels, (where[1], where[2]))
    if not _per_image_or_position(labels.shape, where):
        raise ShapeError(
            "labels must be integer classes, one for each image or position, so their shape must "
            f"be {_shapes(where)}, got {_found(labels)}; pass one-hot rows as labels.float()"
        )
    return labels.long().reshape(labels.shape + (1,) * (len(where) - labels.dim())).expand(where)


def _per_image_or_position(shape: Sequence[int], where: list[int]) -> bool:
    """Whether labels of ``shape`` fit; one for each row of a map would be one-hot integers."""
    return list(shape) in (where[:1], where)


def _shapes(where: list[int], *last: int) -> str:
    """The shapes that labels may have, for messages."""
    shapes = dict.fromkeys((str([*where[:1], *last]), str([*where, *last])))
    return " or ".join(shapes)


def _resized(masks: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize masks ``[B, H, W]`` to the grid of the features (nearest pixel)."""
    if tuple(masks.shape[1:]) == size:
        return masks
    return F.interpolate(masks[:, None].double(), size, mode="nearest")[:, 0].long()


def _checked(labels: object) -> Tensor:
    if labels is None:
        raise ArgumentError(
            "DecisionTargets needs the class labels: call kd.loss(labels) or soft_assignment("
            "features, labels), or use CodebookTargets at this point"
        )
    if not isinstance(labels, Tensor):
        raise ArgumentTypeError(f"labels must be a tensor, got {type(labels).__name__}")
    if labels.is_complex() or labels.dtype == torch.bool:
        raise ArgumentTypeError(
            "DecisionTargets needs integer class labels or probabilities [batch, classes], got "
            f"{_found(labels)}; pass one-hot rows as labels.float()"
        )
    return labels


def _found(labels: object) -> str:
    if not isinstance(labels, Tensor):
        return type(labels).__name__
    return f"{str(labels.dtype).removeprefix('torch.')} of shape {list(labels.shape)}"
