"""AEKT: decoupled distillation behind a train-only linear layer, with an adaptive term.

Cross-entropy uses the student's own logits; the distillation uses the layer's output. The layer's
matrix can be read as relations between classes. The script prints the largest of them at the end.

    python examples/aekt.py                # digits, in a minute or two
    python examples/aekt.py --data DIR     # your images: DIR/train/CLASS/, DIR/val/CLASS/
"""

from __future__ import annotations

import data
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, Dataset
from torchvision.models.regnet import BlockParams, RegNet

from kdlayers import AEKTLoss, KDHandle, attach_kd
from kdlayers.schedules import LinearWarmup

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
    # The adaptive term is largest in the first epochs, so the weight starts small. With a weight of
    # 1 the training of this small network diverges.
    warmup = LinearWarmup(args.epochs // 4, start=0.1, steps_per_epoch=len(few.plain) // 50)
    aekt = AEKTLoss(beta=2.0, ratio_clip=10.0, weight=0.2 * warmup, name="AEKT")
    kd = attach_kd(student, teacher, losses=[aekt], example=images.example)
    train(student, few.augmented, args.epochs, kd)
    kd.detach()  # removes the teacher and the linear layer; `aekt` keeps the layer
    print(f"AEKT: {accuracy(student, images.test):.2f} %")

    relations = aekt.relations().clone().fill_diagonal_(0)
    for index in relations.flatten().abs().topk(3).indices.tolist():
        row, column = divmod(index, classes)
        names = f"{images.classes[row]} with {images.classes[column]}"
        print(f"relation of {names}: {relations[row, column]:+.3f}")

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
