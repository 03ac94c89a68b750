"""Checks that the images of `fit` and of training were normalised in the same way."""

from typing import Any

import torch
from torch import Tensor

from kdlayers._utils.tree import leaves
from kdlayers._utils.warn import warn
from kdlayers.functional._checks import work_dtype

ENOUGH = 16
"""Number of images that suffices to estimate the statistics of a channel."""
STD_RATIO, MEAN_SHIFT = 1.6, 0.5
"""Limits above which chance or augmentation cannot explain a difference. Mixup multiplies a
standard deviation by 0.7 at least, and the means of two sets of 16 photographs differ by less than
0.2 standard deviations."""


class Moments:
    """Sums over images for each channel; they stay on the images' device."""

    def __init__(self) -> None:
        self.images = 0
        self._mean: Tensor | None = None
        self._square: Tensor | None = None

    def add(self, images: Tensor) -> None:
        """Add a batch ``[B, C, H, W]``."""
        wide = images.detach().to(work_dtype(images))
        mean, square = (part.mean(dim=(2, 3)).sum(dim=0) for part in (wide, wide.square()))
        if self._mean is None or self._square is None:
            self._mean, self._square = mean, square
        elif len(mean) == len(self._mean):
            self._mean = self._mean + mean.to(self._mean.device)
            self._square = self._square + square.to(self._square.device)
        else:
            return
        self.images += len(images)

    def read(self) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of each channel, on the CPU."""
        if self._mean is None or self._square is None:
            return torch.zeros(0, device="cpu"), torch.zeros(0, device="cpu")
        mean, square = ((t / self.images).double().cpu() for t in (self._mean, self._square))
        return mean, (square - mean.square()).clamp(min=0).sqrt()


class ImageStatistics:
    """Statistics of all images in the first pass of `fit` and of the first training batches."""

    def __init__(self) -> None:
        self._fit = Moments()
        self._training = Moments()
        self.done = True
        """Whether the comparison is done, so that training batches can be ignored."""

    def begin_fit(self) -> None:
        """Start over for a new fit."""
        self._fit, self._training, self.done = Moments(), Moments(), False

    def of_fit(self, images: Any) -> None:
        """Add a batch of `fit`."""
        maps = _maps(images)
        if maps is not None:
            self._fit.add(maps)

    def of_training(self, images: Any) -> None:
        """Add a training batch; once there are enough images, compare and warn."""
        maps = _maps(images)
        if maps is None or self._fit.images < ENOUGH:
            self.done = True
            return
        self._training.add(maps)
        if self._training.images >= ENOUGH:
            self.done = True
            self._compare()

    def _compare(self) -> None:
        mean, std = self._fit.read()
        other_mean, other_std = self._training.read()
        if len(mean) != len(other_mean):
            return
        larger, smaller = torch.maximum(std, other_std), torch.minimum(std, other_std)
        shifted = (mean - other_mean).abs() > MEAN_SHIFT * larger
        if not (shifted | (larger > STD_RATIO * smaller)).any():
            return
        warn(
            "the images of kd.fit and of the training batches are normalised differently: per "
            f"channel, those of fit have mean {_shown(mean)} and std {_shown(std)}, the training "
            f"batches mean {_shown(other_mean)} and std {_shown(other_std)}, so the templates do "
            "not match the training images; give kd.fit a loader with the training normalisation "
            "(for timm's create_loader: mean= and std=), including what the training loop does to "
            "the images before the model; then call kd.fit(loader, refit=True)"
        )


def _maps(images: Any) -> Tensor | None:
    """The first batch of images among the arguments of a model."""
    found = [t for _, t in leaves(images) if t.dim() == 4 and t.is_floating_point() and len(t)]
    return found[0] if found else None


def _shown(values: Tensor) -> str:
    return "(" + ", ".join(f"{value:.2f}" for value in values.tolist()) + ")"
