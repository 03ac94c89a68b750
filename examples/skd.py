"""Student-friendly distillation: a learnt attention simplifies the teacher's logits.

It is trained by the same loss as the student. The first step equals plain distillation; then watch
`agreement` (of the simplified logits with the teacher's class) and `entropy`: a simplifier that
copies the student has a low loss, and teaches nothing.
"""

from __future__ import annotations

import torch.nn.functional as F
from _digits import EXAMPLE, accuracy
from _method import labels_only, new_student, report, sgd, show, shuffled, start, trained_teacher

from kdlayers import StudentFriendlyKDLoss, attach_kd


def main() -> None:
    """Train a teacher, a student with it, and one without."""
    args, whole, few = start(__doc__)
    teacher = trained_teacher(whole, args)

    student = new_student(args.seed)
    simplified = StudentFriendlyKDLoss(temperature=4.0, weight=1.0, name="SKD")
    kd = attach_kd(student, teacher, losses=[simplified], example=EXAMPLE)

    loader = shuffled(few, args)
    # Without kd.parameters() the attention would stay as it is, and this plain distillation.
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
    kd.detach()  # the attention goes with the teacher

    plain = labels_only(args.seed, few, args)
    report(few, {"labels only": plain, "student-friendly KD": accuracy(student, few)})


if __name__ == "__main__":
    main()
