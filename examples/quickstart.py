"""A student that learns digits from 50 images and a good teacher, in a minute or two on two cores.

The teacher was trained on 3,500 images. The student, half as wide, sees five images of each digit:
with their labels only, with the teacher's logits (KD), with two KD layers (letKD-2), or with both.
For each seed, all methods start from the same weights and see the same images.

    python examples/quickstart.py
"""

from __future__ import annotations

import data
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset

import kdlayers
from kdlayers import CodebookTargets, DecisionTargets, KDHandle, KDLoss, KDPoint, attach_kd

SEEDS, T95 = range(5), 2.776  # 97.5 % quantile of Student's t for five seeds


def main() -> None:
    """Train a teacher, and five students for each method, and print the table."""
    args = data.options(__doc__, epochs=60).parse_args()
    images = data.load(args)
    classes, labels = len(images.classes), torch.tensor([y for _, y in images.plain])
    torch.manual_seed(0)
    teacher = network(32, classes)
    train(teacher, images.augmented, 4)
    print(f"the teacher: {accuracy(teacher, images.test):.2f} %")
    print(f"{'':12}  test accuracy %   above labels only (95 % interval)   parameters")
    found = {}
    for method in ("labels only", "KD", "letKD-2", "letKD-2 + KD"):
        for seed in SEEDS:
            torch.manual_seed(seed)
            order = torch.randperm(len(labels))
            few = torch.cat([order[labels[order] == c][:5] for c in range(classes)]).tolist()
            student = network(16, classes)
            kd = attach(method, student, teacher, images.example)
            if kd:
                kd.fit(DataLoader(Subset(images.plain, few), 25))
            torch.manual_seed(seed)
            train(student, Subset(images.augmented, few), args.epochs, kd)
            found.setdefault(method, []).append(accuracy(student, images.test))
        ours, theirs = (torch.tensor(found[name]) for name in (method, "labels only"))
        middle = (ours - theirs).mean()  # mean of the differences, paired by seed
        half = T95 * (ours - theirs).std() / len(SEEDS) ** 0.5
        interval = f"{middle:+.2f} ({middle - half:+.2f} to {middle + half:+.2f})"
        row = f"{method:12}  {ours.mean():.2f} ± {ours.std():.2f}      {interval:33}"
        print(f"{row}   {sum(p.numel() for p in student.parameters()):10,}", flush=True)
    kdlayers.save_student(student, args.out / "student.pt")
    print(f"the last student, {accuracy(student, images.test):.2f} %: {args.out / 'student.pt'}")


def attach(method: str, student: nn.Module, teacher: nn.Module, x: torch.Tensor) -> KDHandle | None:
    """What each method adds to the student."""
    first = KDPoint("first", targets=DecisionTargets(subclasses=2))
    last = KDPoint("last", targets=CodebookTargets(64))
    points = [first, last] if "letKD-2" in method else []
    losses = [KDLoss()] if "+ KD" in method or method == "KD" else []
    plain = method == "labels only"
    return None if plain else attach_kd(student, teacher, points, losses=losses, example=x)


def network(width: int, classes: int) -> nn.Sequential:
    """Four convolutions, each with a batch norm and a ReLU, and a classifier."""
    model, sizes = nn.Sequential(), (3, width, 2 * width, 3 * width, 4 * width)
    for i, name in enumerate(("stem", "second", "first", "last")):
        conv = nn.Conv2d(sizes[i], sizes[i + 1], 3, 2 if i < 2 else 1, padding=1, bias=False)
        model.add_module(name, nn.Sequential(conv, nn.BatchNorm2d(sizes[i + 1]), nn.ReLU()))
    return model.extend([nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4 * width, classes)])


def train(model: nn.Module, images: Dataset, epochs: int, kd: KDHandle | None = None) -> None:
    """An ordinary loop, with one more term if there is a handle."""
    loader = DataLoader(images, min(25, len(images)), shuffle=True, drop_last=True)
    parameters = [*model.parameters(), *(kd.parameters() if kd else [])]
    optimizer = torch.optim.SGD(parameters, 0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, epochs * len(loader))
    model.train()
    for _ in range(epochs):
        for x, y in loader:
            loss = F.cross_entropy(model(x), y) + (kd.loss(y) if kd else 0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


@torch.no_grad()
def accuracy(model: nn.Module, images: Dataset) -> float:
    """Percentage of images whose class has the largest logit."""
    right = [model.eval()(x).argmax(1) == y for x, y in DataLoader(images, 250)]
    return 100 * torch.cat(right).double().mean().item()


if __name__ == "__main__":
    main()
