r"""The figures of docs/seeing.md: the KD layers of a student of the accuracy benchmark.

python examples/benchmarks/accuracy.py --root DATA --cache docs/data/results \
        --methods letKD-2 --seeds 0 --save runs/students
python examples/benchmarks/figures.py --root DATA runs/students/letKD-2-seed-0.pt
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the networks of the examples

import torch
from _png import save_png
from common import fashion_mnist
from common.images import Images, planes
from models.cifar_resnet import make
from torch import nn

from kdlayers import load_student, viz

CLASSES = 10


def main(arguments: list[str] | None = None) -> None:
    """Load the student and draw the chosen layers."""
    args = parse(arguments)
    _, test = fashion_mnist.load(args.root, download=False)
    fresh = make(args.network, num_classes=CLASSES, in_channels=1, width=args.width)
    student = load_student(fresh, args.student)
    args.out.mkdir(parents=True, exist_ok=True)
    for name in args.at:
        draw(student, name, test, args.out)


def draw(student: nn.Module, name: str, test: Images, out: Path) -> None:
    """Draw the layer's matches on an image of each of five classes, and its usage on all images."""
    first = torch.stack([(test.labels == label).nonzero()[0, 0] for label in range(5)])
    few = test.take(first)
    view = viz.layer_view(student, few.normalised(few.pixels), name)
    figures = {
        "matches": viz.plot_matches(view, planes(few.pixels) / 255),
        "usage": viz.plot_usage(viz.template_usage(student, test.batches(250), name)),
    }
    for kind, figure in figures.items():
        file = out / f"{kind}-{name.replace('.', '-')}.png"
        save_png(figure, file)
        print(file, flush=True)


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("student", type=Path, help="student file written by accuracy.py --save")
    add(
        "--root",
        type=Path,
        default=Path("data"),
        help="folder of Fashion-MNIST; default: %(default)s",
    )
    add("--network", default="resnet8", help="of the student; default: %(default)s")
    add("--width", type=float, default=8.0, help="as in accuracy.py; default: %(default)s")
    add("--at", nargs="+", default=["layer3.0", "last"], help="points; default: letKD-2's")
    add("--out", type=Path, default=Path("runs/figures"), help="default: %(default)s")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
