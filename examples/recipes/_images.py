"""CIFAR as tensors on the device: loaded once, then cropped and flipped in batches.

All images fit on a GPU. Augmenting a batch there takes less time than augmenting one image in a
worker process.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torchvision import datasets

PADDING = 4


@dataclass(frozen=True)
class DataSet:
    """A data set: torchvision's class, number of classes, mean and standard deviation."""

    kind: type
    classes: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


# Means and standard deviations as in the code of letKD's and IE-KD's authors.
DATA_SETS = {
    "cifar100": DataSet(datasets.CIFAR100, 100, (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "cifar10": DataSet(
        datasets.CIFAR10,
        10,
        (125.3 / 255, 123.0 / 255, 113.9 / 255),
        (63.0 / 255, 62.1 / 255, 66.7 / 255),
    ),
}


@dataclass(frozen=True)
class Images:
    """Images ``[N, 3, H, W]`` as bytes and labels ``[N]``, on one device."""

    pixels: Tensor
    labels: Tensor
    mean: tuple[float, float, float]
    std: tuple[float, float, float]

    def __len__(self) -> int:
        return len(self.labels)

    def plain(self, size: int) -> PlainBatches:
        """All images in order, without augmentation."""
        return PlainBatches(self, size)

    def augmented(self, size: int) -> AugmentedBatches:
        """Batches in random order, with crops and flips; an incomplete last batch is dropped."""
        return AugmentedBatches(self, size)

    def normalised(self, pixels: Tensor) -> Tensor:
        """Normalise bytes to floats."""
        mean = torch.tensor(self.mean, device=pixels.device).view(3, 1, 1)
        std = torch.tensor(self.std, device=pixels.device).view(3, 1, 1)
        return (pixels.float() / 255 - mean) / std


@dataclass(frozen=True)
class PlainBatches:
    """Batches in order; can be iterated several times."""

    images: Images
    size: int

    def __len__(self) -> int:
        return -(-len(self.images) // self.size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        pairs = zip(
            self.images.pixels.split(self.size), self.images.labels.split(self.size), strict=True
        )
        for pixels, labels in pairs:
            yield self.images.normalised(pixels), labels


@dataclass(frozen=True)
class AugmentedBatches:
    """Batches of one epoch; torch's random state at its start determines all randomness."""

    images: Images
    size: int

    def __len__(self) -> int:
        return len(self.images) // self.size

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        device = self.images.labels.device
        draw = torch.Generator().manual_seed(int(torch.randint(2**62, ())))
        order = torch.randperm(len(self.images), generator=draw)
        for chosen in order[: len(self) * self.size].split(self.size):
            shifts = torch.randint(2 * PADDING + 1, (2, self.size), generator=draw)
            flips = torch.rand(self.size, generator=draw) < 0.5
            index = chosen.to(device)
            pixels = cropped(self.images.pixels[index], shifts.to(device), flips.to(device))
            yield self.images.normalised(pixels), self.images.labels[index]


def cropped(pixels: Tensor, shifts: Tensor, flips: Tensor) -> Tensor:
    """Crops of the original size from images padded by reflection.

    Args:
        pixels: bytes ``[B, 3, H, W]``.
        shifts: ``[2, B]``, top and left coordinate of each crop in the padded image.
        flips: ``[B]``, whether each crop is flipped.
    """
    count, _, height, width = pixels.shape
    columns = torch.arange(width, device=pixels.device).expand(count, width)
    columns = torch.where(flips[:, None], columns.flip(1), columns) + shifts[1, :, None]
    rows = torch.arange(height, device=pixels.device) + shifts[0, :, None]
    image = torch.arange(count, device=pixels.device)[:, None, None]
    rows, columns = reflected(rows - PADDING, height), reflected(columns - PADDING, width)
    # Advanced indices on both sides of the channels' slice move the channels to the end.
    return pixels[image, :, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)


def reflected(index: Tensor, size: int) -> Tensor:
    """Reflect positions outside ``0 .. size - 1`` at the edge pixel, which is not repeated."""
    inside = index.abs()
    return torch.where(inside < size, inside, 2 * (size - 1) - inside)


def load(
    name: str, root: Path | None, *, download: bool, device: torch.device
) -> tuple[Images, Images]:
    """Training and test images of torchvision's data set."""
    known = DATA_SETS[name]
    if root is None:
        raise SystemExit(
            f"no folder for {name}: pass --root FOLDER, with --download to download it there, or "
            "--stand-in 1000 to run the script on random images"
        )
    try:
        parts = [known.kind(root, train=train, download=download) for train in (True, False)]
    except RuntimeError as error:
        hint = f"{known.kind.__name__} is not in {root}; pass --download to download it"
        raise SystemExit(f"{hint} ({error})") from None
    made = []
    for part in parts:
        pixels = torch.from_numpy(part.data).permute(0, 3, 1, 2).contiguous().to(device)
        labels = torch.tensor(part.targets, device=device)
        made.append(Images(pixels, labels, known.mean, known.std))
    return made[0], made[1]


def stand_in(name: str, count: int, device: torch.device) -> tuple[Images, Images]:
    """Random images of the data set's shape, balanced over the classes; accuracy is meaningless."""
    known = DATA_SETS[name]
    if count < known.classes:
        raise SystemExit(
            f"--stand-in needs an image per class: {known.classes} or more, not {count}"
        )
    draw = torch.Generator().manual_seed(0)
    made = []
    for size in (count, known.classes):
        pixels = torch.randint(256, (size, 3, 32, 32), generator=draw, dtype=torch.uint8)
        labels = torch.arange(size) % known.classes
        made.append(Images(pixels.to(device), labels.to(device), known.mean, known.std))
    return made[0], made[1]
