"""AEKT: decoupled distillation behind a train-only linear layer, with an adaptive term.

Cross-entropy is on the student's own logits, the distillation on what the layer makes of them. Its
matrix can be read as relations between classes: the largest of them are printed at the end.
"""

from __future__ import annotations

import _method as shared
import torch.nn.functional as F

from kdlayers import AEKTLoss, attach_kd
from kdlayers.schedules import LinearWarmup


def main() -> None:
    """Train a teacher, a student with it, and one without."""
    args, whole, few = shared.start(__doc__)
    teacher = shared.trained_teacher(whole, args)

    student = shared.new_student(args.seed)
    # The ratio of the teacher's to the student's probability is largest in the first epochs.
    steps = len(few.plain) // args.batch_size
    warmup = LinearWarmup(args.epochs // 4, start=0.1, steps_per_epoch=steps)
    # With a weight of 1 the training of this small network diverges.
    aekt = AEKTLoss(beta=2.0, ratio_clip=10.0, weight=0.2 * warmup, name="AEKT")
    kd = attach_kd(student, teacher, losses=[aekt], example=shared.EXAMPLE)

    loader = shared.shuffled(few, args)
    parameters = [*student.parameters(), *kd.parameters()]  # the linear layer is in the second
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
    kd.detach()  # the linear layer goes with the teacher, aekt still has it

    relations = aekt.relations().clone().fill_diagonal_(0)
    for index in relations.flatten().abs().topk(5).indices.tolist():
        row, column = divmod(index, 10)
        print(f"relation of {row} with {column}: {relations[row, column]:+.3f}")

    plain = shared.labels_only(args.seed, few, args)
    shared.report(few, {"labels only": plain, "AEKT": shared.accuracy(student, few)})


if __name__ == "__main__":
    main()
