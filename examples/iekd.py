"""IE-KD: half of the student's last channels inherit from the teacher, the other half explore."""

from __future__ import annotations

import _method as shared
import torch.nn.functional as F
from _models import LAST
from torch.utils.data import DataLoader

from kdlayers import InheritExploreLoss, attach_kd


def main() -> None:
    """Train a teacher, a student with it, and one without."""
    args, whole, few = shared.start(__doc__)
    teacher = shared.trained_teacher(whole, args)

    student = shared.new_student(args.seed)
    # The last feature map, after its ReLU. By default both halves have a weight of 50.
    halves = InheritExploreLoss(at=LAST, name="IE-KD", epochs=2 if args.quick else 30)
    kd = attach_kd(student, teacher, losses=[halves], example=shared.EXAMPLE)
    kd.fit(DataLoader(few.plain, args.batch_size, shuffle=True))  # the teacher's auto-encoder

    loader = shared.shuffled(few, args)
    # The encoders of the two halves are trained with the student, and end with the handle.
    parameters = [*student.parameters(), *kd.parameters()]
    optimizer, schedule = shared.sgd(parameters, args.epochs * len(loader), args)
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

    plain = shared.labels_only(args.seed, few, args)
    shared.report(few, {"labels only": plain, "IE-KD": shared.accuracy(student, few)})


if __name__ == "__main__":
    main()
