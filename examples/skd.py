"""Student-friendly distillation: a learnt attention simplifies the teacher's logits.

It is trained by the same loss as the student. The first step equals plain distillation; then watch
`agreement` (of the simplified logits with the teacher's class) and `entropy`: a simplifier that
copies the student has a low loss, and teaches nothing.
"""

from __future__ import annotations

import _method as shared
import torch.nn.functional as F

from kdlayers import StudentFriendlyKDLoss, attach_kd


def main() -> None:
    """Train a teacher, a student with it, and one without."""
    args, whole, few = shared.start(__doc__)
    teacher = shared.trained_teacher(whole, args)

    student = shared.new_student(args.seed)
    # The loss's factor temperature² is for the student; on the attention it makes it collapse here.
    simplified = StudentFriendlyKDLoss(
        temperature=4.0, simplifier_grad_scale=1 / 4.0**2, name="SKD"
    )
    kd = attach_kd(student, teacher, losses=[simplified], example=shared.EXAMPLE)

    loader = shared.shuffled(few, args)
    # Without kd.parameters() the attention would stay as it is, and this plain distillation.
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
    kd.detach()  # the attention goes with the teacher

    plain = shared.labels_only(args.seed, few, args)
    shared.report(few, {"labels only": plain, "student-friendly KD": shared.accuracy(student, few)})


if __name__ == "__main__":
    main()
