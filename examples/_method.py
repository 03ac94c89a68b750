"""What the examples of one method share: a teacher of digits, few images, labels only, printing.

Import it before torch: it lets waiting threads sleep, which only a busy machine notices.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterable, Mapping

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch.nn.functional as F
from _data import Images
from _digits import EXAMPLE, SIZES, accuracy, digits
from _models import make_student, make_teacher
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader

__all__ = [
    "EXAMPLE",
    "accuracy",
    "labels_only",
    "new_student",
    "report",
    "sgd",
    "show",
    "shuffled",
    "start",
    "trained_teacher",
]


def start(description: str | None) -> tuple[argparse.Namespace, Images, Images]:
    """The command line, all digits for a teacher, and few of them with the same test images."""
    options = argparse.ArgumentParser(description=description)
    options.add_argument("--epochs", type=int, default=40, help="of each student; default: 40")
    options.add_argument("--images", type=int, default=200, help="it trains on; default: 200")
    options.add_argument("--batch-size", type=int, default=50, help="images a step; default: 50")
    options.add_argument("--lr", type=float, default=0.1, help="highest rate of SGD; default: 0.1")
    options.add_argument("--seed", type=int, default=0, help="of weights and batches; default: 0")
    options.add_argument(
        "--quick", action="store_true", help="two epochs, which show every part in seconds"
    )
    args = options.parse_args()
    if args.quick:
        args.epochs = 2
    whole = digits(args.quick)
    return args, whole, whole.first(args.images, 0)


def trained_teacher(images: Images, args: argparse.Namespace) -> nn.Module:
    """The larger network, after a few epochs on all images."""
    torch.manual_seed(0)
    teacher = make_teacher(*SIZES)
    train(teacher, images, 1 if args.quick else 4, args)
    print(f"teacher, {len(images.plain)} images: {accuracy(teacher, images):.2f} %", flush=True)
    return teacher


def new_student(seed: int) -> nn.Module:
    """The smaller network, with the initial weights of ``seed``."""
    torch.manual_seed(seed)
    return make_student(*SIZES)


def shuffled(images: Images, args: argparse.Namespace) -> DataLoader:
    """Augmented batches, from here on the same for every method."""
    torch.manual_seed(args.seed)
    return DataLoader(images.augmented, args.batch_size, shuffle=True, drop_last=True)


def sgd(
    parameters: Iterable[nn.Parameter], steps: int, args: argparse.Namespace
) -> tuple[torch.optim.SGD, OneCycleLR]:
    """An optimiser, and its learning rate's schedule."""
    optimizer = torch.optim.SGD(parameters, args.lr, momentum=0.9, nesterov=True, weight_decay=5e-4)
    return optimizer, OneCycleLR(optimizer, args.lr, total_steps=steps, pct_start=0.2)


def train(model: nn.Module, images: Images, epochs: int, args: argparse.Namespace) -> None:
    """An ordinary training with labels only."""
    loader = shuffled(images, args)
    optimizer, schedule = sgd(model.parameters(), epochs * len(loader), args)
    model.train()
    for _ in range(epochs):
        for x, y in loader:
            loss = F.cross_entropy(model(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


def labels_only(seed: int, images: Images, args: argparse.Namespace) -> float:
    """Accuracy of a student that starts with the same weights and sees the same batches."""
    student = new_student(seed)
    train(student, images, args.epochs, args)
    return accuracy(student, images)


def show(epoch: int, args: argparse.Namespace, terms: Mapping[str, Tensor]) -> None:
    """Print the terms of the last step, ten times in all."""
    if (epoch + 1) % max(1, args.epochs // 10) == 0:
        values = [f"{k} {v.item():.3f}" for k, v in terms.items() if not k.endswith(".weighted")]
        print(f"epoch {epoch + 1}: {', '.join(values)}", flush=True)


def report(images: Images, accuracies: Mapping[str, float]) -> None:
    """Print the accuracies."""
    print(f"\nafter {len(images.plain)} images and one seed, too few to compare methods:")
    for name, percent in accuracies.items():
        print(f"{name:24} {percent:.2f} %")
