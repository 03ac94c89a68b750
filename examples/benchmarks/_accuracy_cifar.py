"""Loads CIFAR from torchvision's files or from a folder with one subfolder for each class."""

from __future__ import annotations

from pathlib import Path

import torch
from _accuracy_data import Split, Splits, held_out
from torch import Tensor
from torchvision import datasets
from torchvision.transforms.functional import pil_to_tensor

KINDS: dict[str, type] = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}
CLASSES = {"cifar10": 10, "cifar100": 100}
# Mean and deviation of CIFAR-100's training images. Students on CIFAR-10 use them too, because
# their teacher was trained with them.
MEAN, STD = (0.5070, 0.4865, 0.4409), (0.2673, 0.2564, 0.2761)


def load_cifar(
    name: str, root: str, cache: Path, *, download: bool = False, validation: int
) -> Splits:
    """CIFAR-10 or CIFAR-100 as bytes; part of the training images becomes the validation split.

    Args:
        name: ``"cifar10"`` or ``"cifar100"``.
        root: a folder with torchvision's ``cifar-100-python`` or ``cifar-10-batches-py``, or with
            ``train/CLASS/*`` and ``test/CLASS/*`` in any image format. Classes are numbered in
            alphabetical order, as in torchvision's files.
        cache: folder for the decoded images of class folders; decoding takes a minute.
        download: whether to download torchvision's files if they are missing.
        validation: number of validation images, which no network trains on.
    """
    parts = [read(name, Path(root), cache, part, download) for part in ("train", "test")]
    whole, test = (Split(images, labels, MEAN, STD) for images, labels in parts)
    if not 0 < validation < len(whole):
        raise SystemExit(f"--validation must be between 0 and {len(whole)}, got {validation}")
    return held_out(whole, test, validation)


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
    cache.mkdir(parents=True, exist_ok=True)
    content = {"folder": str(folder.resolve()), "names": names, "images": images, "labels": labels}
    fresh = kept.with_suffix(".part")
    torch.save(content, fresh)
    fresh.replace(kept)  # another process never reads an incomplete file
    return images, labels
