"""Images as bytes on one device, and batches of them that are normalised, cropped and mirrored.

All images are in memory. Augmenting a batch with tensor operations takes less time than augmenting
single images in worker processes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Images:
    """Images as bytes, ``[N, H, W]`` (grey) or ``[N, 3, H, W]``, and their labels ``[N]``.

    ``mean`` and ``std`` have a value for each channel. Batches are normalised with them.
    """

    pixels: Tensor
    labels: Tensor
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Tensor) -> Images:
        """The images and labels at ``indices``."""
        return replace(self, pixels=self.pixels[indices], labels=self.labels[indices])

    def to(self, device: torch.device | str) -> Images:
        """These images on ``device``."""
        return replace(self, pixels=self.pixels.to(device), labels=self.labels.to(device))

    def digest(self) -> str:
        """A hash of pixels and labels, in their order: twelve hexadecimal digits."""
        found = hashlib.sha256(self.pixels.cpu().numpy().tobytes())
        found.update(self.labels.cpu().numpy().tobytes())
        return found.hexdigest()[:12]

    def batches(self, size: int = 500) -> Batches:
        """Batches of all images, in order, without augmentation."""
        return Batches(self, size)

    def normalised(self, pixels: Tensor) -> Tensor:
        """Convert bytes to floats ``[B, C, H, W]``, normalised with ``mean`` and ``std``."""
        mean, std = (
            torch.tensor(value, device=pixels.device).view(-1, 1, 1)
            for value in (self.mean, self.std)
        )
        return (planes(pixels).float() / 255 - mean) / std


@dataclass(frozen=True)
class Batches:
    """Batches in order; can be iterated several times."""

    images: Images
    size: int

    def __len__(self) -> int:
        return -(-len(self.images) // self.size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        images = self.images
        parts = zip(images.pixels.split(self.size), images.labels.split(self.size), strict=True)
        for pixels, labels in parts:
            yield images.normalised(pixels), labels


@dataclass(frozen=True)
class Augmented:
    """Batches in random order, cropped and mirrored; an incomplete last batch is dropped.

    All random numbers are drawn on the CPU, so the batches are the same on every device.

    Args:
        images: the images.
        size: number of images in a batch.
        padding: padding of the random crops.
        flips: whether images are mirrored with probability 1/2.
        mode: ``"constant"`` pads with zeros, ``"reflect"`` by reflection.
        seed: seed of `epoch` and `plain`.
    """

    images: Images
    size: int
    padding: int
    flips: bool = True
    mode: str = "constant"
    seed: int = 0

    def __len__(self) -> int:
        return len(self.images) // self.size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of one epoch, which depend on torch's random state."""
        return self.drawn(int(torch.randint(2**62, ())))

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of one epoch, which depend only on the seed and the epoch."""
        return self.drawn(1_000_003 * self.seed + epoch)

    def drawn(self, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches in the order and with the augmentation of a seed."""
        images, draw = self.images, torch.Generator().manual_seed(seed)
        order = torch.randperm(len(images), generator=draw)[: len(self) * self.size]
        for chosen in order.to(images.labels.device).split(self.size):
            pixels = augmented(images.pixels[chosen], self.padding, self.flips, draw, self.mode)
            yield images.normalised(pixels), images.labels[chosen]

    def plain(self, size: int) -> Batches:
        """All images without augmentation, in a random order that depends on the seed."""
        draw = torch.Generator().manual_seed(self.seed)
        return self.images.take(torch.randperm(len(self.images), generator=draw)).batches(size)


def augmented(
    pixels: Tensor, padding: int, flips: bool, draw: torch.Generator, mode: str = "constant"
) -> Tensor:
    """Shift each image by up to ``padding`` and, with ``flips``, mirror it with probability 1/2."""
    shifts = torch.randint(2 * padding + 1, (2, len(pixels)), generator=draw)
    mirrored = (torch.rand(len(pixels), generator=draw) < 0.5) & flips
    return cropped(pixels, shifts, mirrored, padding, mode)


def cropped(
    pixels: Tensor, shifts: Tensor, mirrored: Tensor, padding: int, mode: str = "constant"
) -> Tensor:
    """Crops of the original size from padded images.

    Args:
        pixels: bytes ``[B, H, W]`` or ``[B, C, H, W]``.
        shifts: ``[2, B]``, top and left coordinate of each crop in the padded image.
        mirrored: ``[B]``, whether each crop is mirrored.
        padding: number of pixels added at each side.
        mode: as in `Augmented`.
    """
    height, width = pixels.shape[-2:]
    columns = torch.arange(width)
    columns = torch.where(mirrored[:, None], columns.flip(0), columns) + shifts[1, :, None]
    rows = torch.arange(height) + shifts[0, :, None]
    rows, columns = rows.to(pixels.device), columns.to(pixels.device)
    image = torch.arange(len(pixels), device=pixels.device)[:, None, None]
    # On a GPU torch reflects floats only.
    padded = F.pad(planes(pixels).float(), (padding,) * 4, mode).to(pixels.dtype)
    # Advanced indices on both sides of the channels' slice move the channels to the end.
    crops = padded[image, :, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)
    return crops.reshape(pixels.shape)


def planes(pixels: Tensor) -> Tensor:
    """Images ``[B, C, H, W]``, also of grey ones ``[B, H, W]``."""
    return pixels if pixels.dim() == 4 else pixels.unsqueeze(1)
