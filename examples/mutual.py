"""Mutual learning: two students from scratch, each the other's teacher.

Deep mutual learning (DML) compares their logits. The inherit-and-explore form (IE-DML) also lets
half of each one's last channels inherit from the other; it is a reconstruction, as no code or
formula of it is known.
"""

from __future__ import annotations

import argparse

import _method as shared
import torch.nn.functional as F
from _data import Images
from _models import LAST
from torch import nn

from kdlayers import DistillLoss, InheritExploreLoss, MutualLoss, attach_mutual


def learn_together(
    losses: list[DistillLoss], images: Images, args: argparse.Namespace
) -> list[nn.Module]:
    """Two students, trained by ``losses`` on each other."""
    students = [shared.new_student(args.seed), shared.new_student(args.seed + 1)]
    kds = attach_mutual(*students, losses=losses, example=shared.EXAMPLE)
    loader = shared.shuffled(images, args)
    steps = args.epochs * len(loader)
    parts = [
        (student, kd, *shared.sgd([*student.parameters(), *kd.parameters()], steps, args))
        for student, kd in zip(students, kds, strict=True)
    ]
    for epoch in range(args.epochs):
        for student in students:
            student.train()
        for x, y in loader:
            for student, kd, optimizer, schedule in parts:  # the second learns from the updated
                loss = F.cross_entropy(student(x), y) + kd.loss(y)
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
        shared.show(epoch, args, kds[0].terms)
    for kd in kds:
        kd.detach()
    return students


def main() -> None:
    """Pairs of students: each alone, DML, IE-DML."""
    args, _, few = shared.start(__doc__)
    halves = InheritExploreLoss(at=LAST, coder="online", name="IE")
    methods = {"DML": [MutualLoss()], "IE-DML": [MutualLoss(), halves]}
    accuracies = {
        f"labels only, seed {seed}": shared.labels_only(seed, few, args)
        for seed in (args.seed, args.seed + 1)
    }
    for name, losses in methods.items():
        print(name)
        for seed, student in enumerate(learn_together(losses, few, args), args.seed):
            accuracies[f"{name}, seed {seed}"] = shared.accuracy(student, few)
    shared.report(few, accuracies)


if __name__ == "__main__":
    main()
