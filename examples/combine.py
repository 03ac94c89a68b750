"""letKD-2, AEKT and student-friendly distillation on one student, in one handle.

Two KD layers stay in the student; everything else ends with the handle. AEKT with the other two is
a combination of ours: nothing is published about it.
"""

from __future__ import annotations

import _method as shared
import torch.nn.functional as F
from _models import FIRST, LAST
from torch.utils.data import DataLoader

from kdlayers import (
    AEKTLoss,
    CodebookTargets,
    DecisionTargets,
    KDPoint,
    StudentFriendlyKDLoss,
    attach_kd,
    bake,
)
from kdlayers.schedules import Cosine, LinearWarmup


def main() -> None:
    """Train a teacher, a student with everything, and one without."""
    args, whole, few = shared.start(__doc__)
    teacher = shared.trained_teacher(whole, args)

    student = shared.new_student(args.seed)
    steps = args.epochs * (len(few.plain) // args.batch_size)
    points = [
        KDPoint(FIRST, targets=DecisionTargets(subclasses=2, components=9)),
        KDPoint(LAST, targets=CodebookTargets(16 if args.quick else 64)),
    ]
    losses = [
        AEKTLoss(beta=1.0, ratio_clip=10.0, weight=0.1 * LinearWarmup(steps // 4)),
        StudentFriendlyKDLoss(
            weight=Cosine(steps, value=0.5, end=0.1), simplifier_grad_scale=1 / 16, name="SKD"
        ),
    ]
    kd = attach_kd(student, teacher, points, losses=losses, example=shared.EXAMPLE)
    print(kd.summary())
    kd.fit(DataLoader(few.plain, args.batch_size))  # decisions and codebook, in the same passes

    loader = shared.shuffled(few, args)
    optimizer, schedule = shared.sgd([*student.parameters(), *kd.parameters()], steps, args)
    for epoch in range(args.epochs):
        student.train()
        for x, y in loader:
            loss = F.cross_entropy(student(x), y) + kd.loss(y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        shared.show(epoch, args, kd.terms)
    kd.detach()

    deployed = bake(student.eval())  # a plain model: no hooks, no teacher, no train-only part
    plain = shared.labels_only(args.seed, few, args)
    shared.report(few, {"labels only": plain, "all together": shared.accuracy(deployed, few)})


if __name__ == "__main__":
    main()
