"""Loads CIFAR from torchvision's files or from a folder with one subfolder for each class."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torchvision import datasets
from torchvision.transforms.functional import pil_to_tensor

from common.files import save
from common.images import Images

KINDS: dict[str, type] = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}
CLASSES = {"cifar10": 10, "cifar100": 100}
Values = tuple[float, ...]


def load(
    name: str, root: Path, cache: Path, mean: Values, std: Values, *, download: bool = False
) -> tuple[Images, Images]:
    """The training and test images of CIFAR-10 or CIFAR-100, as bytes.

    Args:
        name: ``"cifar10"`` or ``"cifar100"``.
        root: a folder with torchvision's ``cifar-100-python`` or ``cifar-10-batches-py``, or with
            ``train/CLASS/*`` and ``test/CLASS/*`` in any image format. Classes are numbered in
            alphabetical order, as in torchvision's files.
        cache: folder for the decoded images of class folders; decoding takes a minute.
        mean: mean of each channel, for normalisation.
        std: standard deviation of each channel.
        download: whether to download torchvision's files if they are missing.
    """
    parts = [read(name, root, cache, part, download) for part in ("train", "test")]
    train, test = (Images(pixels, labels, mean, std) for pixels, labels in parts)
    return train, test


def read(
    name: str, root: Path, cache: Path, part: str, download: bool = False
) -> tuple[Tensor, Tensor]:
    """Images ``[N, 3, 32, 32]`` as bytes and labels ``[N]`` of the ``train`` or ``test`` split."""
    if (root / part).is_dir():
        return decoded(name, root / part, cache)
    try:
        data = KINDS[name](str(root), train=part == "train", download=download)
    except RuntimeError as error:
        folder = KINDS[name].base_folder
        raise SystemExit(
            f"{name} is not in {root}: found neither {root / folder} (torchvision's layout; "
            f"--download fetches it) nor {root / part}/CLASS/IMAGE ({error})"
        ) from None
    return torch.from_numpy(data.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(data.targets)


def decoded(name: str, folder: Path, cache: Path) -> tuple[Tensor, Tensor]:
    """The images of class folders, decoded once and stored in ``cache``.

    The cached file is reused only for the same folder with the same files.
    """
    files = datasets.ImageFolder(str(folder))
    if len(files.classes) != CLASSES[name]:
        raise SystemExit(
            f"{folder} has {len(files.classes)} class folders, {name} has {CLASSES[name]} classes"
        )
    names = [Path(path).relative_to(folder).as_posix() for path, _ in files.samples]
    kept = cache / f"{name}-{folder.name}.pt"
    if kept.exists():
        saved = torch.load(kept, weights_only=True)
        if saved["folder"] == str(folder.resolve()) and saved["names"] == names:
            return saved["images"], saved["labels"]
    print(f"decoding {len(names):,} images of {folder} into {kept}", flush=True)
    images = torch.stack([pil_to_tensor(image.convert("RGB")) for image, _ in files])
    if images.shape[1:] != (3, 32, 32):
        raise SystemExit(f"{folder} has images of {tuple(images.shape[2:])}, CIFAR's are 32 x 32")
    labels = torch.tensor(files.targets)
    content = {"folder": str(folder.resolve()), "names": names, "images": images, "labels": labels}
    save(content, kept)
    return images, labels


def stand_in(name: str, count: int, mean: Values, std: Values) -> tuple[Images, Images]:
    """Random images of CIFAR's shape, balanced over the classes; accuracies mean nothing."""
    classes = CLASSES[name]
    if count < classes:
        raise SystemExit(f"--stand-in needs an image per class: {classes} or more, not {count}")
    draw = torch.Generator().manual_seed(0)
    made = []
    for size in (count, classes):
        pixels = torch.randint(256, (size, 3, 32, 32), generator=draw, dtype=torch.uint8)
        made.append(Images(pixels, torch.arange(size) % classes, mean, std))
    return made[0], made[1]
