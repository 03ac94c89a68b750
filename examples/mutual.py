"""Mutual learning: two students from scratch, each the other's teacher.

Deep mutual learning (DML) compares their logits. The inherit-and-explore form (IE-DML) also lets
half of each student's last channels inherit from the other. It is a reconstruction, because we know
no code or formula of it.

    python examples/mutual.py                # digits, in a minute or two
    python examples/mutual.py --data DIR     # your images: DIR/train/CLASS/, DIR/val/CLASS/
"""

from __future__ import annotations

from collections.abc import Sequence

import data
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.models.regnet import BlockParams, RegNet

from kdlayers import InheritExploreLoss, KDHandle, MutualLoss, attach_mutual

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def main() -> None:
    """Two students alone, by DML and by IE-DML."""
    args = data.options(__doc__).parse_args()
    images = data.load(args)
    few, classes = images.first(200), len(images.classes)
    halves = InheritExploreLoss(at="trunk_output.block3", coder="online", name="IE")
    methods = {"labels only": [], "DML": [MutualLoss()], "IE-DML": [MutualLoss(), halves]}
    for name, losses in methods.items():
        students = []
        for seed in (0, 1):
            torch.manual_seed(seed)
            students.append(regnet([1, 1, 2], [16, 32, 64], classes))
        kds = attach_mutual(*students, losses=losses, example=images.example) if losses else ()
        train(students, few.augmented, args.epochs, kds)
        for kd in kds:
            kd.detach()
        for seed, student in enumerate(students):
            print(f"{name}, seed {seed}: {accuracy(student, images.test):.2f} %")


def regnet(depths: list[int], widths: list[int], classes: int) -> nn.Module:
    """A RegNet of torchvision for small images."""
    params = BlockParams(depths, widths, [widths[0]] * 3, [1.0] * 3, [1, 2, 2])
    return RegNet(params, num_classes=classes, stem_width=widths[0]).to(DEVICE)


def train(
    students: Sequence[nn.Module], images: Dataset, epochs: int, kds: Sequence[KDHandle]
) -> None:
    """Both students take a step on each batch; the second learns from the updated first."""
    loader = DataLoader(images, 50, shuffle=True, drop_last=True)
    parts = []
    for student, kd in zip(students, kds or (None, None), strict=True):
        parameters = [*student.parameters(), *(kd.parameters() if kd else [])]
        optimizer = torch.optim.SGD(parameters, 0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
        steps = epochs * len(loader)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, steps, pct_start=0.2)
        parts.append((student.train(), kd, optimizer, schedule))
    for epoch in range(epochs):
        for x, y in loader:
            x, y = x.to(DEVICE), y.to(DEVICE)
            for student, kd, optimizer, schedule in parts:
                loss = F.cross_entropy(student(x), y) + (kd.loss(y) if kd else 0)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
        if kds and epoch % 5 == 0:
            terms = {name: round(value.item(), 3) for name, value in kds[0].terms.items()}
            print(f"epoch {epoch}:", terms)


@torch.no_grad()
def accuracy(model: nn.Module, images: Dataset) -> float:
    """Percentage of images whose class has the largest logit."""
    model.eval()
    right = [(model(x.to(DEVICE)).argmax(1).cpu() == y) for x, y in DataLoader(images, 250)]
    return 100 * torch.cat(right).double().mean().item()


if __name__ == "__main__":
    main()
