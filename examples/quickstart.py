"""A teacher that does not know the student's classes, in a minute or two on two CPU cores.

The teacher knows the digits 0 to 4. The student learns 5 to 9 from 50 images, so it can't use the
teacher's logits, only its features: by FitNet, or by one or two KD layers (letKD-1, letKD-2). Every
method starts from the same weights and sees the same images; each seed has others.

    python examples/quickstart.py
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections import OrderedDict
from statistics import mean, stdev

import data
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset

import kdlayers
from kdlayers import CodebookTargets, DecisionTargets, FitNetLoss, KDHandle, KDPoint, attach_kd

METHODS = ("labels only", "FitNet", "letKD-1", "letKD-2")
T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26)  # Student's t for 2, 3, ... seeds


def main() -> None:
    """Train a teacher and many students, and print the table."""
    options = data.options(__doc__)
    options.add_argument("--seeds", type=int, default=5, help="students of a method; default: 5")
    options.add_argument("--check", metavar="FILE", help="only load a student and test it")
    options.set_defaults(epochs=100)
    args = options.parse_args()
    images, seeds = data.load(args), 2 if args.quick else args.seeds
    test = Subset(images.test, [i for i, (_, y) in enumerate(images.test) if y >= 5])
    if args.check:
        student = kdlayers.load_student(network([16, 32, 48, 64]), args.check)
        print(f"loaded in a fresh process, without a teacher: {accuracy(student, test):.2f} %")
        return
    labels = torch.tensor([y for _, y in images.plain])
    torch.manual_seed(0)
    teacher = network([32, 64, 96, 128])
    train(teacher, Subset(images.augmented, torch.where(labels < 5)[0].tolist()), 4)
    print(f"{'':11}  test accuracy %   above labels only, 95 %   parameters   ms per step")
    found = {}
    for method in METHODS:
        found[method] = []
        for seed in range(seeds):
            torch.manual_seed(seed)
            order = torch.randperm(len(labels))
            few = torch.cat([order[labels[order] == c][:10] for c in range(5, 10)]).tolist()
            student = network([16, 32, 48, 64])
            kd = attach(method, student, teacher, images.example)
            if kd:
                kd.fit([(x, y % 5) for x, y in DataLoader(Subset(images.plain, few), 25)])
            torch.manual_seed(seed)
            ms = train(student, Subset(images.augmented, few), args.epochs, kd)
            found[method].append(accuracy(student, test))
            if kd:
                kd.detach()
        above = [a - b for a, b in zip(found[method], found["labels only"], strict=True)]
        half = T95[seeds - 2] * stdev(above) / seeds**0.5
        text = f"{mean(above):+.2f} ({mean(above) - half:+.2f} to {mean(above) + half:+.2f})"
        rest = f"{sum(p.numel() for p in student.parameters()):12,} {ms:13.1f}"
        row = f"{mean(found[method]):.2f} ± {stdev(found[method]):.2f}"
        print(f"{method:11}  {row:15}   {text:23} {rest}", flush=True)
    kdlayers.save_student(student, args.out / "student.pt")
    print(f"the last student: {found[METHODS[-1]][-1]:.2f} %", flush=True)
    command = [sys.executable, *sys.argv, "--check", str(args.out / "student.pt")]
    subprocess.run(command, check=True)


def attach(
    method: str, student: nn.Module, teacher: nn.Module, example: torch.Tensor
) -> KDHandle | None:
    """What each method adds to the student."""
    if method == "labels only":
        return None
    first = KDPoint("first", targets=DecisionTargets(subclasses=2))
    last = KDPoint("last", targets=CodebookTargets(64))
    points = {"letKD-1": [last], "letKD-2": [first, last]}.get(method, [])
    losses = [FitNetLoss(at="last")] if method == "FitNet" else []
    return attach_kd(student, teacher, points, losses=losses, example=example)


def network(widths: list[int]) -> nn.Sequential:
    """Four stages of a convolution each, and a linear classifier of five digits."""
    parts, before = OrderedDict(), 3
    for name, width, stride in zip(("stem", "second", "first", "last"), widths, (2, 2, 1, 1)):
        conv = nn.Conv2d(before, width, 3, stride, padding=1, bias=False)
        parts[name], before = nn.Sequential(conv, nn.BatchNorm2d(width), nn.ReLU()), width
    end = {"pool": nn.AdaptiveAvgPool2d(1), "flat": nn.Flatten(), "fc": nn.Linear(before, 5)}
    return nn.Sequential(parts | end)


def train(model: nn.Module, images: Dataset, epochs: int, kd: KDHandle | None = None) -> float:
    """An ordinary loop, with one more term if there is a handle; milliseconds of a step."""
    loader = DataLoader(images, 25, shuffle=True, drop_last=True)
    optimizer = torch.optim.SGD(
        [*model.parameters(), *(kd.parameters() if kd else [])], 0.1, 0.9, weight_decay=5e-4
    )
    steps, seconds = epochs * len(loader), 0.0
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, steps, pct_start=0.2)
    model.train()
    for _ in range(epochs):
        for x, y in loader:
            start = time.perf_counter()
            loss = F.cross_entropy(model(x), y % 5) + (kd.loss(y % 5) if kd else 0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            seconds += time.perf_counter() - start
    return 1000 * seconds / steps


@torch.no_grad()
def accuracy(model: nn.Module, images: Dataset) -> float:
    """Percentage of images whose class has the largest logit."""
    model.eval()
    right = [model(x).argmax(1) == y % 5 for x, y in DataLoader(images, 250)]
    return 100 * torch.cat(right).double().mean().item()


if __name__ == "__main__":
    main()
