"""Images with several labels: BinaryKDLoss beside binary cross-entropy.

Each image is two images of the data set side by side, and its labels are the classes of both. The
teacher sees many pairs, the students few. The score is the mean average precision (mAP) over the
classes, in percent, on pairs of test images.

    python examples/several_labels.py              # digits, three seeds, in a few minutes
    python examples/several_labels.py --data DIR   # your images: DIR/train/CLASS/, DIR/val/CLASS/
"""

from __future__ import annotations

import json

import data
import torch
import torch.nn.functional as F
from sklearn.metrics import average_precision_score
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision.models.regnet import BlockParams, RegNet

from kdlayers import BinaryKDLoss, KDHandle, attach_kd

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class Pairs(Dataset):
    """Two images side by side, and a 1 for each of their classes."""

    def __init__(self, images: Dataset, classes: int, number: int) -> None:
        self.images, self.classes = images, classes
        draw = torch.Generator().manual_seed(0)
        self.pairs = torch.randint(len(images), (number, 2), generator=draw).tolist()

    def __len__(self) -> int:
        return len(self.pairs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        (left, first), (right, second) = (self.images[place] for place in self.pairs[index])
        labels = F.one_hot(torch.tensor([first, second]), self.classes).amax(dim=0)
        return torch.cat([left, right], dim=2), labels.float()


def main() -> None:
    """A teacher, and students that learn from labels only and from the teacher too."""
    args = data.options(__doc__, epochs=60).parse_args()
    images = data.load(args)
    classes, tested = len(images.classes), 300 if args.quick else 1500
    many = Pairs(images.augmented, classes, 400 if args.quick else 7000)
    few = Pairs(images.first(100).augmented, classes, 100)
    test = Pairs(images.test, classes, tested)
    example = torch.stack([image for image, _ in (test[0], test[1])])
    torch.manual_seed(0)
    teacher = regnet([1, 2, 2], [32, 64, 128], classes)
    train(teacher, many, 1 if args.quick else 3)
    print(json.dumps({"model": "teacher", "mAP": precision(teacher, test)}))
    for seed in range(1 if args.quick else 3):
        for name in ("labels only", "BinaryKDLoss"):
            torch.manual_seed(seed)
            student, kd = regnet([1, 1, 2], [16, 32, 64], classes), None
            if name == "BinaryKDLoss":
                losses = [BinaryKDLoss(weight=10.0)]
                kd = attach_kd(student, teacher, losses=losses, example=example)
            train(student, few, args.epochs, kd)
            if kd:
                kd.detach()
            print(json.dumps({"model": name, "mAP": precision(student, test), "seed": seed}))


def regnet(depths: list[int], widths: list[int], classes: int) -> nn.Module:
    """A RegNet of torchvision for small images."""
    params = BlockParams(depths, widths, [widths[0]] * 3, [1.0] * 3, [1, 2, 2])
    return RegNet(params, num_classes=classes, stem_width=widths[0]).to(DEVICE)


def train(model: nn.Module, images: Dataset, epochs: int, kd: KDHandle | None = None) -> None:
    """An ordinary loop with binary cross-entropy, and one more term if there is a handle."""
    loader = DataLoader(images, 50, shuffle=True, drop_last=True)
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.01, epochs * len(loader))
    for x, y in (batch for _ in range(epochs) for batch in loader):
        logits, y = model.train()(x.to(DEVICE)), y.to(DEVICE)
        loss = F.binary_cross_entropy_with_logits(logits, y) + (kd.loss(y) if kd else 0)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


@torch.no_grad()
def precision(model: nn.Module, images: Dataset) -> float:
    """The mean over classes of the average precision, in percent."""
    found = [(y, model.eval()(x.to(DEVICE)).cpu()) for x, y in DataLoader(images, 250)]
    labels, scores = (torch.cat(part).numpy() for part in zip(*found, strict=True))
    return round(100 * float(average_precision_score(labels, scores)), 2)


if __name__ == "__main__":
    main()
