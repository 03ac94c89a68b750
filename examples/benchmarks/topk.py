r"""How much `topk` of a record changes the losses on logits, compared with all logits.

A trained teacher's logits for test images are compressed to k logits and the probability of the
other classes, in float16, and read back as from a record. The student is a network of another size,
trained on the same data. The table has, for each loss, the value with all logits, the relative
difference of the value with k logits, and the relative difference of the gradient: the norm of the
difference divided by the norm of the gradient.

    python examples/benchmarks/topk.py --root CIFAR100 --teacher-checkpoint resnet56.pt \
        --student resnet20 --student-checkpoint resnet20.pt

It prints the table of docs/recorded.md.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from _accuracy_data import MEAN, STD
from common.cifar import read
from common.images import Images
from common.teachers import load_teacher
from models.cifar_resnet import make
from torch import Tensor, nn

from kdlayers import DistillLoss, DISTLoss, DKDLoss, KDLoss
from kdlayers._records.topk import compress, expand

KEPT = (5, 20, 100)
LOSSES: dict[str, DistillLoss] = {
    "KDLoss, temperature 1": KDLoss(temperature=1.0),
    "KDLoss, temperature 4": KDLoss(temperature=4.0),
    "DKDLoss": DKDLoss(),
    "DISTLoss": DISTLoss(),
}


def main(arguments: list[str] | None = None) -> None:
    """Measure and print a table in Markdown."""
    args = parse(arguments)
    images, labels = read("cifar100", args.root, args.cache, "test")
    split = Images(images, labels, MEAN, STD)
    theirs = logits_of(args.teacher, args.teacher_checkpoint, split)
    ours = logits_of(args.student, args.student_checkpoint, split)
    for row in rows(ours, theirs, labels, args.kept):
        print(f"| {' | '.join(row)} |")


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--root", type=Path, required=True, help="folder of CIFAR-100, as for accuracy.py")
    add("--cache", type=Path, default=Path("runs"), help="for decoded images; default: runs")
    add("--teacher", default="resnet56", help="default: %(default)s")
    add("--teacher-checkpoint", type=Path, required=True)
    add("--student", default="resnet20", help="default: %(default)s")
    add("--student-checkpoint", type=Path, required=True)
    add("--kept", type=int, nargs="+", default=KEPT, help="values of k; default: 5 20 100")
    return parser.parse_args(arguments)


@torch.no_grad()
def logits_of(name: str, path: Path, split: Images) -> Tensor:
    """A network's logits for all images."""
    model: nn.Module = make(name, num_classes=100)
    load_teacher(model, name, path)
    model.eval()
    return torch.cat([model(x) for x, _ in split.batches(250)])


def rows(ours: Tensor, theirs: Tensor, labels: Tensor, kept: tuple[int, ...]) -> list[list[str]]:
    """The rows of the table: head, rule, probability of the other classes, and each loss."""
    read_back = {k: through(theirs, k) for k in kept}
    rest = [theirs.softmax(1).sort(1).values[:, :-k].sum(1).mean() for k in kept]
    found = [
        ["", "all logits", *(f"`topk={k}`" for k in kept)],
        ["---"] * (2 + len(kept)),
        [
            "probability of the other classes",
            "",
            *(f"{100 * float(value):.2g} %" for value in rest),
        ],
    ]
    for name, loss in LOSSES.items():
        value, gradient = pulled(loss, ours, theirs, labels)
        cells = []
        for logits in read_back.values():
            other, pull = pulled(loss, ours, logits, labels)
            turned = (pull - gradient).norm() / gradient.norm()
            cells.append(f"{100 * (other - value) / value:+.2g} %, {100 * float(turned):.2g} %")
        found.append([name, f"{value:.4g}", *cells])
    return found


def through(logits: Tensor, k: int) -> Tensor:
    """The logits read back from a float16 record; with k = all classes they are only rounded."""
    if k >= logits.shape[1]:
        return logits.half().float()
    values, classes = compress(logits, k)
    return expand(values.half(), classes, logits.shape[1])


def pulled(loss: DistillLoss, ours: Tensor, theirs: Tensor, labels: Tensor) -> tuple[float, Tensor]:
    """The mean loss over batches of 100, and its gradient to the student's logits."""
    ours = ours.clone().requires_grad_()
    batches = list(zip(ours.split(100), theirs.split(100), labels.split(100), strict=True))
    total = sum(loss(*batch) for batch in batches) / len(batches)
    total.backward()
    return float(total.detach()), ours.grad


if __name__ == "__main__":
    main()
