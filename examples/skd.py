"""Student-friendly KD: a learnt attention simplifies the teacher's logits for the student.

It is trained by the same loss as the student. The first step equals plain distillation. Then watch
`SKD.agreement` (of the simplified logits with the teacher's class) and `SKD.entropy`: a simplifier
that copies the student has a low loss and teaches nothing.

    python examples/skd.py                # digits, in a minute or two
    python examples/skd.py --data DIR     # your images: DIR/train/CLASS/, DIR/val/CLASS/
"""

from __future__ import annotations

import data
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.models.regnet import BlockParams, RegNet

from kdlayers import KDHandle, StudentFriendlyKDLoss, attach_kd

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def main() -> None:
    """A teacher, a student that learns from it, and one that learns from labels only."""
    args = data.options(__doc__).parse_args()
    images = data.load(args)
    few = images.first(200)  # the student sees fewer images than the teacher
    classes = len(images.classes)
    torch.manual_seed(0)
    teacher = regnet([1, 2, 2], [32, 64, 128], classes)
    train(teacher, images.augmented, 1 if args.quick else 4)
    print(f"teacher: {accuracy(teacher, images.test):.2f} %")

    torch.manual_seed(0)
    student = regnet([1, 1, 2], [16, 32, 64], classes)
    # The loss's factor temperature² is meant for the student. On the attention it causes collapse.
    skd = StudentFriendlyKDLoss(temperature=4.0, simplifier_grad_scale=1 / 4.0**2, name="SKD")
    kd = attach_kd(student, teacher, losses=[skd], example=images.example)
    # `train` gives kd.parameters() to the optimiser. Without them this is plain distillation.
    train(student, few.augmented, args.epochs, kd)
    kd.detach()  # removes the teacher and the attention
    print(f"student-friendly KD: {accuracy(student, images.test):.2f} %")

    torch.manual_seed(0)
    alone = regnet([1, 1, 2], [16, 32, 64], classes)
    train(alone, few.augmented, args.epochs)
    print(f"labels only: {accuracy(alone, images.test):.2f} %; one seed: too few to compare")


def regnet(depths: list[int], widths: list[int], classes: int) -> nn.Module:
    """A RegNet of torchvision for small images."""
    params = BlockParams(depths, widths, [widths[0]] * 3, [1.0] * 3, [1, 2, 2])
    return RegNet(params, num_classes=classes, stem_width=widths[0]).to(DEVICE)


def train(model: nn.Module, images: Dataset, epochs: int, kd: KDHandle | None = None) -> None:
    """An ordinary loop, with one more term if there is a handle."""
    loader = DataLoader(images, 50, shuffle=True, drop_last=True)
    parameters = [*model.parameters(), *(kd.parameters() if kd else [])]
    optimizer = torch.optim.SGD(parameters, 0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    steps = epochs * len(loader)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, steps, pct_start=0.2)
    for epoch in range(epochs):
        model.train()
        for x, y in loader:
            x, y = x.to(DEVICE), y.to(DEVICE)
            loss = F.cross_entropy(model(x), y) + (kd.loss(y) if kd else 0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
        if kd and epoch % 5 == 0:
            print(f"epoch {epoch}:", {name: round(v.item(), 3) for name, v in kd.terms.items()})


@torch.no_grad()
def accuracy(model: nn.Module, images: Dataset) -> float:
    """Percentage of images whose class has the largest logit."""
    model.eval()
    right = [(model(x.to(DEVICE)).argmax(1).cpu() == y) for x, y in DataLoader(images, 250)]
    return 100 * torch.cat(right).double().mean().item()


if __name__ == "__main__":
    main()
