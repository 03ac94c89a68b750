"""Images as byte tensors: splits, batches augmented with tensor operations, Fashion-MNIST."""

from __future__ import annotations

import gzip
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MEAN, STD = 0.2860, 0.3530
DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # of the package dataset-fashion-mnist


@dataclass(frozen=True)
class Split:
    """Images as bytes, ``[N, H, W]`` (grey) or ``[N, 3, H, W]``, and their labels ``[N]``.

    ``mean`` and ``std`` have a value for each channel. Batches are normalised with them.
    """

    images: Tensor
    labels: Tensor
    mean: tuple[float, ...] = (MEAN,)
    std: tuple[float, ...] = (STD,)

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, indices: Tensor) -> Split:
        """The images and labels at ``indices``."""
        return replace(self, images=self.images[indices], labels=self.labels[indices])

    def to(self, device: torch.device) -> Split:
        """This split on ``device``."""
        return replace(self, images=self.images.to(device), labels=self.labels.to(device))

    def batches(self, size: int) -> list[tuple[Tensor, Tensor]]:
        """Batches of all images, in order, normalised and not augmented."""
        pairs = zip(self.images.split(size), self.labels.split(size), strict=True)
        return [(self.normalised(images), labels) for images, labels in pairs]

    def normalised(self, images: Tensor) -> Tensor:
        """Convert bytes to floats ``[B, C, H, W]``, normalised with ``mean`` and ``std``."""
        return normalised(images, self.mean, self.std)


@dataclass(frozen=True)
class Splits:
    """Images for training, for tuning (validation) and for the reported accuracies (test)."""

    train: Split
    validation: Split
    test: Split

    @property
    def classes(self) -> int:
        """Number of classes."""
        return int(self.train.labels.max()) + 1

    @property
    def channels(self) -> int:
        """1 for grey images, 3 for colour."""
        return len(self.train.mean)

    def blank(self, count: int) -> Tensor:
        """Images of zeros in the shape of a network's input, for dry runs."""
        return torch.zeros(count, self.channels, *self.test.images.shape[-2:])


def load(root: str, *, download: bool, validation: int) -> Splits:
    """The splits of Fashion-MNIST; ``validation`` training images become the validation split."""
    folder = find(Path(root), download=download)
    whole, test = read(folder, "train"), read(folder, "t10k")
    if not 0 < validation < len(whole):
        raise SystemExit(f"--validation must be between 0 and {len(whole)}, got {validation}")
    return held_out(whole, test, validation)


def held_out(whole: Split, test: Split, validation: int) -> Splits:
    """Hold out the last ``validation`` training images of a fixed random order."""
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(0))
    return Splits(whole.take(order[:-validation]), whole.take(order[-validation:]), test)


def find(root: Path, *, download: bool) -> Path:
    """The folder with the four files: ``root``, torchvision's subfolder, or Debian's package."""
    nested = root / "FashionMNIST" / "raw"
    for folder in (root, nested, DEBIAN):
        if any(folder.glob("train-images-idx3-ubyte*")):
            return folder
    if not download:
        raise SystemExit(
            f"Fashion-MNIST is not in {root}, {nested} or {DEBIAN}; pass --download to download "
            "it, or install Debian's package dataset-fashion-mnist"
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
    """The bytes of an IDX file, plain or gzipped, in the shape that its header gives."""
    packed = path.with_name(f"{path.name}.gz")
    content = path.read_bytes() if path.exists() else gzip.decompress(packed.read_bytes())
    axes = content[3]
    if content[:3] != b"\0\0\x08" or axes == 0:
        raise SystemExit(f"{path} is not an IDX file of bytes")
    head = 4 + 4 * axes
    shape = [int.from_bytes(content[i : i + 4], "big") for i in range(4, head, 4)]
    return torch.frombuffer(bytearray(content[head:]), dtype=torch.uint8).view(shape)


def few(train: Split, images: int, seed: int) -> Split:
    """``images`` training images, the same number of each class, drawn with ``seed``."""
    draw = torch.Generator().manual_seed(7919 + seed)
    order = torch.randperm(len(train), generator=draw)
    labels = train.labels[order]
    # Rank of each image within its class: take the first of each class, then the second, ...
    ranks = torch.zeros(len(train), dtype=torch.long)
    for label in labels.unique():
        mine = labels == label
        ranks[mine] = torch.arange(int(mine.sum()))
    chosen = ranks.argsort(stable=True)[: images or len(train)]
    return train.take(order[chosen])


class Augmented:
    """Batches of augmented images, shuffled anew in each epoch.

    Order and augmentation depend only on the seed and the epoch, so all methods see the same
    batches. All random numbers are drawn on the CPU, so the batches are also the same on every
    device. An incomplete last batch is dropped.

    Args:
        split: the images.
        recipe: batch_size, padding of the random crops, and flips (whether images are mirrored
            with probability 1/2).
        seed: seed of order and augmentation; default: the recipe's.
    """

    def __init__(self, split: Split, recipe: dict[str, Any], seed: int | None = None) -> None:
        self.split = split
        self.size = recipe["batch_size"]
        self.augmentation = recipe["padding"], recipe["flips"]
        self.seed = recipe["seed"] if seed is None else seed
        self.steps = len(split) // self.size

    def epoch(self, epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Images and labels of one epoch."""
        split = self.split
        draw = torch.Generator().manual_seed(1_000_003 * self.seed + epoch)
        order = torch.randperm(len(split), generator=draw)
        order = order[: self.steps * self.size].to(split.images.device)
        for indices in order.split(self.size):
            images = augmented(split.images[indices], *self.augmentation, draw)
            yield split.normalised(images), split.labels[indices]

    def plain(self, size: int) -> list[tuple[Tensor, Tensor]]:
        """The images without augmentation, in a random order."""
        order = torch.randperm(len(self.split), generator=torch.Generator().manual_seed(self.seed))
        return self.split.take(order).batches(size)


def augmented(images: Tensor, padding: int, flips: bool, draw: torch.Generator) -> Tensor:
    """Shift each image by up to ``padding`` and, with ``flips``, mirror it with probability 1/2.

    With neither, the images ``[B, H, W]`` or ``[B, C, H, W]`` are returned unchanged.
    """
    planes = images if images.dim() == 4 else images.unsqueeze(1)
    count, _, height, width = planes.shape
    top, left = torch.randint(2 * padding + 1, (2, count, 1), generator=draw)
    flip = (torch.rand(count, 1, generator=draw) < 0.5) & flips
    columns = torch.arange(width)
    columns = (left + torch.where(flip, columns.flip(0), columns)).to(images.device)
    rows = (top + torch.arange(height)).to(images.device)
    image = torch.arange(count, device=images.device)[:, None, None]
    padded = torch.nn.functional.pad(planes, (padding,) * 4)
    # Advanced indices on both sides of the channels' slice move the channels to the end.
    cropped = padded[image, :, rows[:, :, None], columns[:, None, :]].movedim(-1, 1)
    return cropped.reshape(images.shape)


def normalised(
    images: Tensor, mean: tuple[float, ...] = (MEAN,), std: tuple[float, ...] = (STD,)
) -> Tensor:
    """Convert bytes ``[B, H, W]`` or ``[B, C, H, W]`` to normalised floats ``[B, C, H, W]``."""
    planes = images if images.dim() == 4 else images.unsqueeze(1)
    middle, spread = (
        torch.tensor(value, device=images.device).view(-1, 1, 1) for value in (mean, std)
    )
    return (planes.float() / 255 - middle) / spread
