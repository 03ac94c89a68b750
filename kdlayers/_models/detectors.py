"""Finds the backbone of torchvision's detectors, where student and teacher are compared."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

BACKBONE = "backbone"
"""Where a detector keeps the module that is attached; names inside it may begin with this."""
NO_LOGITS = (
    "this is the backbone of a detector, which returns boxes rather than logits; use KD layers, or "
    "losses on features with at="
)
_TRANSFORM = "GeneralizedRCNNTransform"


def is_detector(model: object) -> bool:
    """Whether this is a detector of torchvision: a backbone behind a transform of image lists."""
    transform = getattr(model, "transform", None)
    named = any(base.__name__ == _TRANSFORM for base in type(transform).__mro__)
    return named and isinstance(getattr(model, BACKBONE, None), nn.Module)


def inside(model: Any) -> Any:
    """The backbone of a detector; any other model as it is."""
    return getattr(model, BACKBONE) if is_detector(model) else model


class Pictures:
    """The input of a detector's backbone for a list of pictures: normalised, resized, padded.

    The sizes are those of validation, so that every pass of `kd.fit` sees the same images, even if
    the detector draws a random size in training.
    """

    def __init__(self, detector: nn.Module) -> None:
        self.transform: Any = detector.transform

    def __call__(self, pictures: Sequence[Tensor]) -> Tensor:
        """``pictures``, each ``[C, H, W]``, as one batch."""
        training, self.transform.training = self.transform.training, False
        try:
            with torch.no_grad():
                tensors: Tensor = self.transform(list(pictures))[0].tensors
            return tensors
        finally:
            self.transform.training = training


def is_list_of_pictures(images: Any) -> bool:
    """Whether these are pictures of any sizes, as detectors take them."""
    listed = isinstance(images, (list, tuple)) and len(images) > 0
    return listed and all(isinstance(i, Tensor) and i.dim() == 3 for i in images)
