"""The teacher runs once, over a few views of each image; then the student trains without it.

    python examples/recorded.py                # digits, in a minute or two
    python examples/recorded.py --data DIR     # your images: DIR/train/CLASS/, DIR/val/CLASS/

The record stays in `--out`. A second call uses it and does not run the teacher.
"""

from __future__ import annotations

import data
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.models.regnet import BlockParams, RegNet

from kdlayers import FitNetLoss, KDHandle, KDLoss, RecordedTeacher, attach_kd, open_record

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAST = "trunk_output.block3"


def main() -> None:
    """A teacher, its record, and a student that has only the record."""
    args = data.options(__doc__).parse_args()
    images = data.load(args)
    few = images.first(200)  # the student sees fewer images than the teacher
    folder = args.out / "record"
    if not (folder / "record.json").exists():
        record(images, few, folder, quick=args.quick)

    # From here on the teacher is not in memory. This part could run in another process.
    torch.manual_seed(0)
    student = regnet([1, 1, 2], [16, 32, 64], len(images.classes))
    kd = attach_kd(student, RecordedTeacher(folder), losses=losses(), example=images.example)
    recorded = open_record(folder, few.augmented)
    train(student, kd, recorded, args.epochs)
    kd.detach()
    print(f"recorded teacher: {accuracy(student, images.test):.2f} %")


def losses() -> list[nn.Module]:
    """The losses. Recording and training use the same ones, at the same points."""
    return [KDLoss(temperature=4.0), FitNetLoss(at=LAST, weight=0.1)]


def record(images: data.Images, few: data.Images, folder: object, *, quick: bool) -> None:
    """Train a teacher and record its outputs for all views."""
    torch.manual_seed(0)
    classes = len(images.classes)
    teacher = regnet([1, 2, 2], [32, 64, 128], classes)
    optimizer = torch.optim.SGD(teacher.parameters(), 0.05, momentum=0.9)
    for _ in range(1 if quick else 4):
        for x, y in DataLoader(images.augmented, 50, shuffle=True, drop_last=True):
            optimizer.zero_grad()
            F.cross_entropy(teacher(x.to(DEVICE)), y.to(DEVICE)).backward()
            optimizer.step()
    print(f"teacher: {accuracy(teacher, images.test):.2f} %")
    student = regnet([1, 1, 2], [16, 32, 64], classes)
    kd = attach_kd(student, teacher, losses=losses(), example=images.example)
    kd.record(few.augmented, folder, views=2 if quick else 8)


def train(student: nn.Module, kd: KDHandle, recorded: Dataset, epochs: int) -> None:
    """An ordinary loop. The dataset also returns a key for each image."""
    parameters = [*student.parameters(), *kd.parameters()]
    optimizer = torch.optim.SGD(parameters, 0.05, momentum=0.9, nesterov=True, weight_decay=5e-4)
    loader = DataLoader(recorded, 50, shuffle=True, drop_last=True)
    for epoch in range(epochs):
        recorded.set_epoch(epoch)  # another view of each image
        student.train()
        for x, y, key in loader:
            x, y = x.to(DEVICE), y.to(DEVICE)
            loss = F.cross_entropy(student(x), y) + kd.loss(y, recorded=key)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if epoch % 5 == 0:
            print(f"epoch {epoch}:", {name: round(v.item(), 3) for name, v in kd.terms.items()})


def regnet(depths: list[int], widths: list[int], classes: int) -> nn.Module:
    """A RegNet of torchvision for small images."""
    params = BlockParams(depths, widths, [widths[0]] * 3, [1.0] * 3, [1, 2, 2])
    return RegNet(params, num_classes=classes, stem_width=widths[0]).to(DEVICE)


@torch.no_grad()
def accuracy(model: nn.Module, images: Dataset) -> float:
    """Percentage of images whose class has the largest logit."""
    model.eval()
    right = [(model(x.to(DEVICE)).argmax(1).cpu() == y) for x, y in DataLoader(images, 250)]
    return 100 * torch.cat(right).double().mean().item()


if __name__ == "__main__":
    main()
