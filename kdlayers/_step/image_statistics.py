"""Compares the images of `fit` with those of training: were they normalised alike?"""

from typing import Any

import torch
from torch import Tensor

from kdlayers._utils.tree import leaves
from kdlayers._utils.warn import warn
from kdlayers.functional._checks import work_dtype

ENOUGH = 16
"""Images from which the statistics of a channel can be told."""
STD_RATIO, MEAN_SHIFT = 1.6, 0.5
"""What is no chance and no augmentation: mixup lowers a standard deviation to 0.7 of it at most,
and the mean of 16 photographs differs from another 16 by less than 0.2 standard deviations."""


class Moments:
    """Sums over images, channel by channel, which stay on their device."""

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
            return torch.zeros(0), torch.zeros(0)
        mean, square = ((t / self.images).double().cpu() for t in (self._mean, self._square))
        return mean, (square - mean.square()).clamp(min=0).sqrt()


class ImageStatistics:
    """Watches the images of one handle: all of the first pass of `fit`, then the first batches."""

    def __init__(self) -> None:
        self._fit = Moments()
        self._training = Moments()
        self.done = True
        """Whether nothing is left to compare, so that training batches need not be looked at."""

    def begin_fit(self) -> None:
        """A new fit begins."""
        self._fit, self._training, self.done = Moments(), Moments(), False

    def of_fit(self, images: Any) -> None:
        """Take a batch of `fit`."""
        maps = _maps(images)
        if maps is not None:
            self._fit.add(maps)

    def of_training(self, images: Any) -> None:
        """Take a batch of training; once there are enough, compare and warn."""
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
            "the images of kd.fit and of the training batches are not normalised alike: by "
            f"channel, fit's have mean {_shown(mean)} and std {_shown(std)}, the training batches "
            f"mean {_shown(other_mean)} and std {_shown(other_std)}, so the templates are those of "
            "other images; give kd.fit a loader with the training normalisation (for timm's "
            "create_loader: mean= and std=), and what the loop does to the images before the "
            "model; then call kd.fit(loader, refit=True)"
        )


def _maps(images: Any) -> Tensor | None:
    """The first batch of maps among the arguments of a model."""
    found = [t for _, t in leaves(images) if t.dim() == 4 and t.is_floating_point() and len(t)]
    return found[0] if found else None


def _shown(values: Tensor) -> str:
    return "(" + ", ".join(f"{value:.2f}" for value in values.tolist()) + ")"
