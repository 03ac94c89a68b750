"""IE-KD: half of the student's last channels inherit from the teacher, the other half explore."""

from __future__ import annotations

import torch.nn.functional as F
from _digits import EXAMPLE, accuracy
from _method import labels_only, new_student, report, sgd, show, shuffled, start, trained_teacher
from _models import LAST
from torch.utils.data import DataLoader

from kdlayers import InheritExploreLoss, attach_kd


def main() -> None:
    """Train a teacher, a student with it, and one without."""
    args, whole, few = start(__doc__)
    teacher = trained_teacher(whole, args)

    student = new_student(args.seed)
    # The last feature map, after its ReLU. By default both halves have a weight of 50.
    halves = InheritExploreLoss(at=LAST, name="IE-KD", epochs=2 if args.quick else 30)
    kd = attach_kd(student, teacher, losses=[halves], example=EXAMPLE)
    kd.fit(DataLoader(few.plain, args.batch_size, shuffle=True))  # the teacher's auto-encoder

    loader = shuffled(few, args)
    # The encoders of the two halves are trained with the student, and end with the handle.
    parameters = [*student.parameters(), *kd.parameters()]
    optimizer, schedule = sgd(parameters, args.epochs * len(loader), args)
    for epoch in range(args.epochs):
        student.train()
        for x, y in loader:
            loss = F.cross_entropy(student(x), y) + kd.loss(y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        show(epoch, args, kd.terms)
    kd.detach()

    plain = labels_only(args.seed, few, args)
    report(few, {"labels only": plain, "IE-KD": accuracy(student, few)})


if __name__ == "__main__":
    main()
