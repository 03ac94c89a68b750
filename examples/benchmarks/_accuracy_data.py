"""Fashion-MNIST as tensors of bytes: splits, and batches augmented by tensor operations."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

MEAN, STD = 0.2860, 0.3530
DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # where the package dataset-fashion-mnist is


@dataclass(frozen=True)
class Split:
    """Images ``[N, H, W]`` as bytes, and their labels ``[N]``."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Tensor) -> Split:
        """The images and labels at ``indices``."""
        return Split(self.images[indices], self.labels[indices])

    def to(self, device: torch.device) -> Split:
        """The same on ``device``."""
        return Split(self.images.to(device), self.labels.to(device))

    def batches(self, size: int) -> list[tuple[Tensor, Tensor]]:
        """All images in order and as they are, normalised, in batches."""
        pairs = zip(self.images.split(size), self.labels.split(size), strict=True)
        return [(normalised(images), labels) for images, labels in pairs]


@dataclass(frozen=True)
class Splits:
    """What teachers learn from, what tuning looks at, and what is reported."""

    train: Split
    validation: Split
    test: Split

    @property
    def classes(self) -> int:
        """Number of classes."""
        return int(self.train.labels.max()) + 1


def load(root: str, *, download: bool, validation: int) -> Splits:
    """The training images without the last ``validation`` of a fixed order, those, and the test."""
    folder = find(Path(root), download=download)
    whole, test = read(folder, "train"), read(folder, "t10k")
    if not 0 < validation < len(whole):
        raise SystemExit(f"--validation must be between 0 and {len(whole)}, got {validation}")
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(0))
    return Splits(whole.take(order[:-validation]), whole.take(order[-validation:]), test)


def find(root: Path, *, download: bool) -> Path:
    """The folder with the four files: ROOT, torchvision's place in it, or Debian's package."""
    nested = root / "FashionMNIST" / "raw"
    for folder in (root, nested, DEBIAN):
        if any(folder.glob("train-images-idx3-ubyte*")):
            return folder
    if not download:
        raise SystemExit(
            f"Fashion-MNIST is not in {root}, {nested} or {DEBIAN}; --download fetches it, and so "
            "does Debian's package dataset-fashion-mnist"
        )
    from torchvision.datasets import FashionMNIST

    FashionMNIST(str(root), download=True)
    return nested


def read(folder: Path, name: str) -> Split:
    """The split whose files start with ``name``."""
    images = idx(folder / f"{name}-images-idx3-ubyte")
    labels = idx(folder / f"{name}-labels-idx1-ubyte").long()
    if len(images) != len(labels):
        raise SystemExit(f"{folder} has {len(images)} images and {len(labels)} labels in {name}")
    return Split(images, labels)


def idx(path: Path) -> Tensor:
    """The bytes of an IDX file, packed by gzip or not, in the shape that its head gives."""
    packed = path.with_name(f"{path.name}.gz")
    content = path.read_bytes() if path.exists() else gzip.decompress(packed.read_bytes())
    axes = content[3]
    if content[:3] != b"\0\0\x08" or axes == 0:
        raise SystemExit(f"{path} is no IDX file of bytes")
    head = 4 + 4 * axes
    shape = [int.from_bytes(content[i : i + 4], "big") for i in range(4, head, 4)]
    return torch.frombuffer(bytearray(content[head:]), dtype=torch.uint8).view(shape)


def few(train: Split, images: int, seed: int) -> Split:
    """``images`` training images, equally many of every class, drawn by ``seed``."""
    draw = torch.Generator().manual_seed(7919 + seed)
    order = torch.randperm(len(train), generator=draw)
    labels = train.labels[order]
    # Positions of each class in the random order: the first of every class, then the second ...
    ranks = torch.zeros(len(train), dtype=torch.long)
    for label in labels.unique():
        mine = labels == label
        ranks[mine] = torch.arange(int(mine.sum()))
    chosen = ranks.argsort(stable=True)[: images or len(train)]
    return train.take(order[chosen])


def epoch_batches(
    split: Split, size: int, augmentation: tuple[int, bool], seed: int, epoch: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """One epoch in random order; the last short batch is dropped.

    ``augmentation`` is the padding of random crops, and whether every other image is flipped.

    Order and augmentation depend on ``seed`` and ``epoch`` alone, so every method sees the same, on
    every device: all random numbers are drawn on the CPU.
    """
    draw = torch.Generator().manual_seed(1_000_003 * seed + epoch)
    order = torch.randperm(len(split), generator=draw)
    order = order[: len(order) // size * size].to(split.images.device)
    for indices in order.split(size):
        yield (
            normalised(augmented(split.images[indices], *augmentation, draw)),
            split.labels[indices],
        )


def augmented(images: Tensor, padding: int, flips: bool, draw: torch.Generator) -> Tensor:
    """Each image of ``[B, H, W]`` shifted by up to ``padding``, with ``flips`` every other flipped.

    Without both the images come back as they are.
    """
    count, height, width = images.shape
    top, left = torch.randint(2 * padding + 1, (2, count, 1), generator=draw)
    flip = (torch.rand(count, 1, generator=draw) < 0.5) & flips
    columns = torch.arange(width)
    columns = left + torch.where(flip, columns.flip(0), columns)
    rows = top + torch.arange(height)
    places = torch.arange(count)[:, None, None], rows[:, :, None], columns[:, None, :]
    padded = torch.nn.functional.pad(images, (padding,) * 4)
    return padded[tuple(place.to(images.device) for place in places)]


def normalised(images: Tensor) -> Tensor:
    """Bytes ``[B, H, W]`` to floats ``[B, 1, H, W]`` of mean 0 and deviation 1."""
    return ((images.float() / 255 - MEAN) / STD).unsqueeze(1)
