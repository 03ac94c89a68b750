"""The data of the accuracy benchmark: images for training, for tuning and for testing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from common import cifar, fashion_mnist
from common.images import Images
from torch import Tensor

# Mean and deviation of CIFAR-100's training images. Students on CIFAR-10 use them too, because
# their teacher was trained with them.
MEAN, STD = (0.5070, 0.4865, 0.4409), (0.2673, 0.2564, 0.2761)


@dataclass(frozen=True)
class Splits:
    """Images for training, for tuning (validation) and for the reported accuracies (test)."""

    train: Images
    validation: Images
    test: Images

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
        return torch.zeros(count, self.channels, *self.test.pixels.shape[-2:])


def load(name: str, root: str, cache: Path, *, validation: int, download: bool = False) -> Splits:
    """The splits of a data set, with ``validation`` of the training images held out.

    These are the last ones of a fixed random order.

    Args:
        name: ``"fashion-mnist"``, ``"cifar10"`` or ``"cifar100"``.
        root: its folder, as of `common.fashion_mnist.find` or `common.cifar.load`.
        cache: folder for decoded images.
        validation: number of validation images, which no network trains on; may be 0.
        download: whether to download the data set if it is missing.
    """
    if name == "fashion-mnist":
        whole, test = fashion_mnist.load(Path(root), download=download)
    else:
        whole, test = cifar.load(name, Path(root), cache, MEAN, STD, download=download)
    if not 0 <= validation < len(whole):
        raise SystemExit(f"--validation must be 0 to {len(whole) - 1}, got {validation}")
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(0))
    kept, held_out = order.split([len(whole) - validation, validation])
    return Splits(whole.take(kept), whole.take(held_out), test)


def few(train: Images, images: int, seed: int) -> Images:
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
