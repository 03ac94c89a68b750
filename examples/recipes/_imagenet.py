"""ImageNet for the recipe: pairs, a shard of images for each process, torchvision's teachers."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from _methods import Pair, Taps, published
from common.teachers import load_teacher
from models.mobilenet_v1 import MobileNetV1
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, DistributedSampler, Subset
from torchvision import datasets, models
from torchvision.transforms import InterpolationMode, v2

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)

_RESNET = Taps("layer4.0", "layer4")
_MOBILE = published(76.13, 68.87, 68.58, None, None, 72.05, 72.54, 73.78, 73.98)
# The settings of KD and DKD are those of DKD's authors.
_SETTINGS = {"lr": 0.1, "temperature": 1.0, "kd_weight": 0.5, "warmup": 1}
_ALL = (
    Pair(
        "resnet34",
        "resnet18",
        (_RESNET, _RESNET),
        beta=0.5,
        published=published(73.31, 69.75, 70.66, None, None, 71.70, 71.67, 72.33, 72.38),
        **_SETTINGS,
    ),
    Pair(
        "resnet50",
        "mobilenet_v1",
        (Taps("stage5.0", "stage5"), _RESNET),
        beta=2.0,
        published=_MOBILE,
        **_SETTINGS,
    ),
    Pair(
        "resnet50",
        "mobilenet_v2",
        (Taps("features.14", "features.18"), _RESNET),
        beta=2.0,
        published=_MOBILE,
        **_SETTINGS,
    ),
)
PAIRS = {f"{pair.teacher}-{pair.student}": pair for pair in _ALL}


def network(name: str, classes: int) -> nn.Module:
    """A network by its name: torchvision's, or MobileNet V1, which it does not have."""
    if name == "mobilenet_v1":
        return MobileNetV1(classes)
    return models.get_model(name, weights=None, num_classes=classes)


def teacher_of(name: str, weights: str, classes: int) -> nn.Module:
    """The teacher with torchvision's weights of this name, weights from a file, or ``random``."""
    if weights == "random":
        return network(name, classes)
    if Path(weights).exists():
        teacher = network(name, classes)
        load_teacher(teacher, name, Path(weights), rename=False)
        return teacher
    known = [weight.name for weight in models.get_model_weights(name)]
    if weights not in known:
        raise SystemExit(
            f"{weights} is neither a file nor the name of weights of {name}; the names are {known}"
        )
    if classes != 1000:
        raise SystemExit(
            f"{name} {weights} has 1000 classes, but the images have {classes}: pass a file to "
            "--teacher-weights"
        )
    return models.get_model(name, weights=weights)


class RandomImages(Dataset):
    """Random images, with the same number for each class."""

    def __init__(self, count: int, size: int, classes: int, transform: v2.Transform) -> None:
        self.count, self.size, self.classes = count, size, classes
        self.transform = transform

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        draw = torch.Generator().manual_seed(index)
        shape = (3, self.size, self.size)
        pixels = torch.randint(256, shape, generator=draw, dtype=torch.uint8)
        return self.transform(pixels), index % self.classes


def transforms(size: int) -> tuple[v2.Transform, v2.Transform]:
    """The transform for training, and the one for testing and ``kd.fit``."""
    end = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)]
    start = [v2.ToImage(), v2.RGB()]
    augmented = [v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip()]
    larger = round(size * 256 / 224)
    plain = [v2.Resize(larger, InterpolationMode.BILINEAR, antialias=True), v2.CenterCrop(size)]
    return v2.Compose([*start, *augmented, *end]), v2.Compose([*start, *plain, *end])


def load(args: argparse.Namespace) -> tuple[Dataset, Dataset, Dataset, int]:
    """Augmented training images, plain training images, validation images, number of classes."""
    augmented, plain = transforms(args.size)
    if args.stand_in is not None:
        classes = args.classes
        if args.stand_in < classes:
            raise SystemExit(f"--stand-in needs an image per class: {classes}, not {args.stand_in}")
        parts = [
            RandomImages(count, args.size, classes, transform)
            for count, transform in (
                (args.stand_in, augmented),
                (args.stand_in, plain),
                (50, plain),
            )
        ]
        return (*parts, classes)
    if args.root is None:
        raise SystemExit("no ImageNet folder: pass --root, a folder with train/CLASS and val/CLASS")
    folders = [("train", augmented), ("train", plain), ("val", plain)]
    for name, _ in folders:
        if not (args.root / name).is_dir():
            raise SystemExit(f"there is no {args.root / name}: it must have a folder per class")
    parts = [datasets.ImageFolder(args.root / name, transform) for name, transform in folders]
    if parts[0].classes != parts[2].classes:
        raise SystemExit(f"{args.root}/train and {args.root}/val have different class folders")
    return (*parts, len(parts[0].classes))


def shuffled(
    data: Dataset, batch: int, rank: int, world: int, args: argparse.Namespace
) -> DataLoader:
    """The shard of this process in each epoch's random order, in full batches."""
    sampler = DistributedSampler(data, world, rank, seed=args.seed, drop_last=True)
    return DataLoader(data, batch, sampler=sampler, drop_last=True, **_workers(args))


def in_order(
    data: Dataset, batch: int, rank: int, world: int, args: argparse.Namespace
) -> DataLoader:
    """Every ``world``-th image, so that the shards of all processes cover each image once."""
    part = Subset(data, range(rank, len(data), world))
    return DataLoader(part, batch, **_workers(args))


def _workers(args: argparse.Namespace) -> dict[str, object]:
    return {"num_workers": args.workers, "pin_memory": torch.device(args.device).type == "cuda"}
