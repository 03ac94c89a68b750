"""AEKT: decoupled distillation behind a train-only linear layer, with an adaptive term.

Cross-entropy is on the student's own logits, the distillation on what the layer makes of them. Its
matrix can be read as relations between classes: the largest of them are printed at the end.
"""

from __future__ import annotations

import torch.nn.functional as F
from _digits import EXAMPLE, accuracy
from _method import labels_only, new_student, report, sgd, show, shuffled, start, trained_teacher

from kdlayers import AEKTLoss, attach_kd
from kdlayers.schedules import LinearWarmup


def main() -> None:
    """Train a teacher, a student with it, and one without."""
    args, whole, few = start(__doc__)
    teacher = trained_teacher(whole, args)

    student = new_student(args.seed)
    # The ratio of the teacher's to the student's probability is largest in the first epochs.
    epoch = len(few.plain) // args.batch_size
    warmup = LinearWarmup(args.epochs // 4, start=0.1, steps_per_epoch=epoch)
    aekt = AEKTLoss(beta=2.0, gamma=1.0, ratio_clip=10.0, weight=warmup, name="AEKT")
    kd = attach_kd(student, teacher, losses=[aekt], example=EXAMPLE)

    loader = shuffled(few, args)
    parameters = [*student.parameters(), *kd.parameters()]  # the linear layer is in the second
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
    kd.detach()  # the linear layer goes with the teacher, aekt still has it

    relations = aekt.relations().clone().fill_diagonal_(0)
    for index in relations.flatten().abs().topk(5).indices.tolist():
        row, column = divmod(index, 10)
        print(f"relation of {row} with {column}: {relations[row, column]:+.3f}")

    plain = labels_only(args.seed, few, args)
    report(few, {"labels only": plain, "AEKT": accuracy(student, few)})


if __name__ == "__main__":
    main()
