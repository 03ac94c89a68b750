"""Loads Fashion-MNIST from its four IDX files, plain or gzipped."""

from __future__ import annotations

import gzip
from pathlib import Path

import torch
from torch import Tensor

from common.images import Images

MEAN, STD = (0.2860,), (0.3530,)
DEBIAN = Path("/usr/share/datasets/fashion-mnist")  # of the package dataset-fashion-mnist


def load(root: Path, *, download: bool) -> tuple[Images, Images]:
    """The training and test images, as bytes."""
    folder = find(root, download=download)
    return read(folder, "train"), read(folder, "t10k")


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


def read(folder: Path, name: str) -> Images:
    """The images whose files start with ``name``."""
    pixels = idx(folder / f"{name}-images-idx3-ubyte")
    labels = idx(folder / f"{name}-labels-idx1-ubyte").long()
    if len(pixels) != len(labels):
        raise SystemExit(f"{folder} has {len(pixels)} images and {len(labels)} labels in {name}")
    return Images(pixels, labels, MEAN, STD)


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
