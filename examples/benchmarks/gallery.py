r"""Draw the gallery: what students of the accuracy benchmark and their losses have learnt.

First let accuracy.py save two students. It skips runs that are in --out, so give it a new file.
Then call this with the same options, and with the file whose curves are drawn:

    python examples/benchmarks/accuracy.py --regime cifar100-10000 --root CIFAR100 \
        --teacher-checkpoint resnet56.pt --cache runs --out runs/gallery.jsonl \
        --seeds 0 --methods "letKD-2 + KD" "AEKT chi2" --save runs/students
    python examples/benchmarks/gallery.py --without-images (the same options) \
        --out docs/data/results/cifar100-10000.jsonl

The figures are written to runs/figures, or to the folder of --figures. --without-images leaves out
the figures that show images of the data set, for data whose images must not be published.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the networks of the examples

import torch
from _accuracy_methods import chosen, parts, recipes
from _accuracy_regimes import Regime, prepared
from _accuracy_train import new_model
from _accuracy_words import Line
from _png import save_png
from accuracy import parse, saved_at, teacher_recipe
from common.cifar import KINDS
from common.images import planes
from report import read
from torch import Tensor
from torchvision import datasets

from kdlayers import (
    AEKTLoss,
    DecisionTargets,
    DistillLoss,
    KDPoint,
    attach_kd,
    load_student,
    viz,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LAYERS, RELATIONS = "letKD-2 + KD", "AEKT chi2"
SHOWN = 5
TERMS = {
    "cross-entropy": "cross-entropy",
    "KDLoss": "KDLoss",
    "TemplateLoss.layer3.0": "letKD's first layer",
    "TemplateLoss.last": "letKD's last layer",
}
CURVES = ("labels only", "KD", "letKD-1", "letKD-2", "letKD-2 + KD")


def main(arguments: list[str] | None = None) -> None:
    """Load what was saved, and draw it."""
    own = argparse.ArgumentParser(add_help=False)
    own.add_argument(
        "--figures", type=Path, default=Path("runs/figures"), help="folder to write to"
    )
    own.add_argument("--without-images", action="store_true", help="draw no image of the data set")
    args = parse(arguments, description=__doc__, parents=[own])
    torch.set_num_threads(args.threads)
    regime, seed = prepared(args, teacher_recipe(args)), args.seeds[0]
    students = {name: saved_at(args.save, name, seed) for name in (LAYERS, RELATIONS)}
    names, matrix = class_names(args), relations(regime, students[RELATIONS])
    figures = layer_figures(regime, students[LAYERS], images=not args.without_images)
    figures["decisions"] = viz.plot_decisions(decisions(regime, students[LAYERS]), names, top=12)
    figures["relations"] = viz.plot_relations(matrix, names, top=12)
    figures["curves"] = curves(read(args.out), seed)
    args.figures.mkdir(parents=True, exist_ok=True)
    for name, figure in figures.items():
        file = args.figures / f"gallery-{name}.png"
        save_png(figure, file)
        print(file, flush=True)


def layer_figures(regime: Regime, saved: Path, *, images: bool) -> dict[str, Figure]:
    """What each layer matched: on one test image of each of five classes, and on all of them."""
    recipe = recipes(chosen(regime.args), regime.splits.classes)[LAYERS]
    fresh = new_model(recipe["student"], regime.splits, 0, width=recipe["width"])
    student = load_student(fresh, saved)
    test = regime.splits.test
    first = torch.stack([(test.labels == label).nonzero()[0, 0] for label in range(SHOWN)])
    few = test.take(first)
    inputs, pixels = few.normalised(few.pixels), planes(few.pixels) / 255
    figures = {}
    for layer in recipe["layers"]:
        name = layer["at"].partition(":")[0]
        usage = viz.template_usage(student, test.batches(250), name)
        short = name.replace(".", "-")
        if images:
            view = viz.layer_view(student, inputs, name)
            figures[f"matches-{short}"] = viz.plot_matches(view, pixels)
        figures[f"usage-{short}"] = viz.plot_usage(usage)
    return figures


def restored(regime: Regime, name: str, saved: Path) -> tuple[list[KDPoint], list[DistillLoss]]:
    """The points and losses of a method with what a run has learnt."""
    splits = regime.splits
    recipe = recipes(chosen(regime.args), splits.classes)[name]
    points, losses = parts(recipe, 1, splits.classes)
    student = new_model(recipe["student"], splits, 0, width=recipe["width"])
    kd = attach_kd(student, regime.teacher, points, losses=losses, example=splits.blank(2))
    kd.load_state_dict(torch.load(saved.with_suffix(".kd.pt"), weights_only=True))
    return points, losses


def decisions(regime: Regime, saved: Path) -> DecisionTargets:
    """The targets of the first layer, the teacher's decisions."""
    points, _ = restored(regime, LAYERS, saved)
    (found,) = (p.targets for p in points if isinstance(p.targets, DecisionTargets))
    return found


def relations(regime: Regime, saved: Path) -> Tensor:
    """The matrix of AEKT's linear layer."""
    _, losses = restored(regime, RELATIONS, saved)
    (found,) = (own.relations() for own in losses if isinstance(own, AEKTLoss))
    return found


def curves(lines: Sequence[Line], seed: int) -> Figure:
    """Each term over the epochs, one line per method."""
    from matplotlib.figure import Figure  # only here: --help works without
    from matplotlib.ticker import MaxNLocator

    runs = {line["method"]: line["curve"] for line in lines if line["seed"] == seed}
    runs = {name: runs[name] for name in CURVES if name in runs}
    figure = Figure((9, 5.4), layout="constrained")
    for panel, (term, title) in zip(figure.subplots(2, 2).flat, TERMS.items(), strict=True):
        for name, curve in runs.items():
            if term in curve[0]:
                colour = f"C{CURVES.index(name)}"
                panel.plot([epoch[term] for epoch in curve], color=colour, label=name)
        panel.set_title(title, fontsize=10)
        panel.set_xlabel("epoch", fontsize=9)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        if panel.lines:
            panel.legend(fontsize=8)
    return figure


def class_names(args: argparse.Namespace) -> list[str]:
    """The names of the class folders, or the names that torchvision has."""
    folder = Path(args.root) / "test"
    if folder.is_dir():
        return sorted(child.name for child in folder.iterdir())
    if args.data == "fashion-mnist":
        return datasets.FashionMNIST.classes
    return KINDS[args.data](args.root, train=False).classes


if __name__ == "__main__":
    main()
