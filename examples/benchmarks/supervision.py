r"""How informative a teacher is: its logits, its codebook assignments and its decisions.

A teacher that has memorised its training images may say little about them. This script compares the
teacher's outputs on the images that students see and on test images. All targets are fitted to the
former. No student is trained.

    python examples/benchmarks/supervision.py --regime cifar100-10000 --root DATA \
        --teacher-checkpoint FILE --cache runs --out docs/data/results/cifar100-10000.teacher.json
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import accuracy
import torch
from _accuracy_record import Record, recorded
from _accuracy_regimes import Regime, prepared
from torch import Tensor

from kdlayers import CodebookTargets, DecisionTargets

SHARPNESSES = (1.0, 0.3, 0.1)
TEMPERATURES = (1.0, 4.0)
SEEN = "students' images"


def main(arguments: list[str] | None = None) -> None:
    """Measure and write one file."""
    args = accuracy.parse(arguments, description=__doc__, out="runs/supervision.json")
    torch.set_num_threads(args.threads)
    if not args.views:
        raise SystemExit(
            "the teacher's record is measured: pass --regime cifar100-10000, or --views N"
        )
    regime = prepared(args, accuracy.teacher_recipe(args))
    _, _, replay = regime.given(accuracy.common_recipe(args), 0)
    seen = Places(replay.record, args.first, args.last)
    tested = Places(of_tests(regime), args.first, args.last)
    views = list(range(1, 1 + replay.record.views))
    places = {
        SEEN: (seen, [0]),
        "their augmented views": (seen, views),
        "test images": (tested, [0]),
    }
    found = {
        "teacher": regime.facts,
        "codebook": of_codebook(places, args.templates),
        "decisions": of_decisions(seen, places, args),
        "options": {k: getattr(args, k) for k in ("templates", "subclasses", "components")},
    }
    # The logits of a teacher of other classes have no accuracy on these images.
    if regime.facts["recipe"]["data"] == args.data:
        found["logits"] = {name: of_logits(*place) for name, place in places.items()}
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(found, indent=1) + "\n", "utf-8")
    print(args.out.read_text("utf-8"))


def of_tests(regime: Regime) -> Record:
    """The teacher's outputs for the test images, without augmentation."""
    args, test = regime.args, regime.splits.test
    points = [args.first.rpartition(":")[2], args.last.rpartition(":")[2]]
    name = regime.facts["recipe_hash"]
    return recorded(regime.teacher, name, test, points, args.cache, views=0, padding=0)


class Places:
    """The features of a record at every position."""

    def __init__(self, record: Record, first: str, last: str) -> None:
        self.record = record
        self.first = first.rpartition(":")[2]
        self.last = last.rpartition(":")[2]

    def rows(self, name: str, view: int) -> Iterator[tuple[Tensor, Tensor]]:
        """Features ``[n, D]`` and labels ``[n]`` of all positions, in batches of images."""
        for index in torch.arange(len(self.record.split)).split(500):
            maps = self.record.take(name, torch.full_like(index, view), index).float()
            labels = self.record.split.labels[index]
            positions = maps[0, 0].numel()
            yield maps.movedim(1, -1).flatten(0, 2), labels.repeat_interleave(positions)


class Rows:
    """View 0 of one point; can be iterated several times, as fits need."""

    def __init__(self, places: Places, name: str) -> None:
        self.places, self.name = places, name

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.places.rows(self.name, 0)


def of_logits(places: Places, views: list[int]) -> dict[str, float]:
    """Accuracy, and the teacher's confidence at each temperature."""
    index = torch.arange(len(places.record.split))
    logits = torch.cat(
        [places.record.take("logits", torch.full_like(index, v), index).float() for v in views]
    )
    labels = places.record.split.labels.repeat(len(views))
    found = {"accuracy": 100 * (logits.argmax(1) == labels).double().mean().item()}
    for temperature in TEMPERATURES:
        soft = (logits / temperature).softmax(1)
        found[f"largest probability, temperature {temperature:g}"] = soft.amax(1).mean().item()
        found[f"perplexity, temperature {temperature:g}"] = perplexity(soft).mean().item()
    return rounded(found)


def of_codebook(
    places: dict[str, tuple[Places, list[int]]], templates: int
) -> dict[str, dict[str, float]]:
    """Perplexity and largest probability of the assignment, averaged over positions."""
    seen = places[SEEN][0]
    targets = CodebookTargets(templates).fit(Rows(seen, seen.last))
    found: dict[str, dict[str, float]] = {}
    for name, (each, views) in places.items():
        sums = torch.zeros(len(SHARPNESSES), 2, dtype=torch.float64)
        count = 0
        for features, _ in each.rows(each.last, views[0]):
            squares = torch.cdist(features, targets.centers).square()
            for part, sharpness in zip(sums, SHARPNESSES, strict=True):
                soft = (-sharpness * squares).softmax(1)
                part += torch.stack([perplexity(soft).sum(), soft.amax(1).sum()])
            count += len(features)
        means = {}
        for (scatter, largest), sharpness in zip((sums / count).tolist(), SHARPNESSES, strict=True):
            means[f"perplexity, sharpness {sharpness:g}"] = scatter
            means[f"largest probability, sharpness {sharpness:g}"] = largest
        found[name] = rounded(means)
    return found


def of_decisions(
    seen: Places, places: dict[str, tuple[Places, list[int]]], args: argparse.Namespace
) -> dict[str, dict[str, float]]:
    """The teacher's decisions at the positions of each sub-class, fitted to the students' images.

    ``own sub-class`` and ``own class`` are the shares of positions that the teacher assigns to
    their own sub-class or class. ``perplexity`` is the mean over the table's rows, weighted by
    their numbers of positions.
    """
    targets = DecisionTargets(args.subclasses, components=args.components)
    targets.fit(Rows(seen, seen.first))
    size, found = len(targets.centers), {}
    for name, (each, views) in places.items():
        table = torch.zeros(size, size)
        for features, labels in each.rows(each.first, views[0]):
            z = features @ targets.projection.T + targets.shift
            own = torch.cdist(z, targets.centers).view(len(z), -1, targets.subclasses)
            best = own[torch.arange(len(z)), labels].argmin(1)
            decided = torch.cdist(z, targets.prototypes).argmin(1)
            places_in_table = (labels * targets.subclasses + best) * size + decided
            table += torch.bincount(places_in_table, minlength=size * size).view(size, size)
        rows = table.sum(1)
        soft = table / rows.clamp_min(1)[:, None]
        classes = table.view(size // targets.subclasses, targets.subclasses, -1, targets.subclasses)
        found[name] = rounded(
            {
                "own sub-class": table.trace().item() / rows.sum().item(),
                "own class": classes.sum((1, 3)).trace().item() / rows.sum().item(),
                "perplexity": (perplexity(soft) * rows).sum().item() / rows.sum().item(),
            }
        )
    return found


def perplexity(soft: Tensor) -> Tensor:
    """The exponential of the entropy, which is the effective number of templates."""
    return torch.special.entr(soft).sum(-1).exp()


def rounded(values: dict[str, float]) -> dict[str, float]:
    """Round to four digits."""
    return {name: float(f"{value:.4g}") for name, value in values.items()}


if __name__ == "__main__":
    main()
