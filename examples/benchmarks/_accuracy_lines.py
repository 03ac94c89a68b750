"""Reads the lines of the accuracy benchmark, and refuses runs that cannot be compared."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

from _accuracy_methods import Options, recipes
from _accuracy_words import Line

# The settings that all methods of a regime share.
COMMON = (
    *("data", "teacher", "student", "validation", "images", "draw", "views", "padding", "flips"),
    *("epochs", "batch_size", "lr", "weight_decay", "precision"),
)


def read(path: Path) -> list[Line]:
    """The lines of a file."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines() if line]


def by_method(lines: Iterable[Line]) -> dict[str, list[Line]]:
    """Lines by method, sorted by seed.

    Raises:
        SystemExit: if the lines mix devices, common settings or images, one has no test accuracy,
            or a method has two recipes or two runs of one seed.
    """
    every = list(lines)
    check_shared(every)
    runs: dict[str, list[Line]] = {}
    for line in every:
        runs.setdefault(line["method"], []).append(line)
    for name, own in runs.items():
        if any(line["test_accuracy"] is None for line in own):
            raise SystemExit(f"{name!r} has a run of --tuning: put it into a file *.tuning.jsonl")
        if len({line["recipe_hash"] for line in own}) > 1:
            raise SystemExit(f"{name!r} has runs of several recipes: put them into separate files")
        if len({line["seed"] for line in own}) < len(own):
            raise SystemExit(f"{name!r} has two runs of one seed")
    order = {name: index for index, name in enumerate(recipes(Options()))}
    names = sorted(runs, key=lambda name: order.get(name, len(order)))
    return {name: sorted(runs[name], key=lambda line: line["seed"]) for name in names}


def check_shared(lines: Sequence[Line]) -> None:
    """Exit if what all methods share differs: device, settings, and the images of a seed."""
    if len({line.get("device") for line in lines}) > 1:
        raise SystemExit("there are runs of several devices: put them into separate files")
    for name in COMMON:
        found = {line.get("recipe", {}).get(name) for line in lines}
        if len(found) > 1:
            raise SystemExit(
                f"there are runs with {name} {' and '.join(sorted(map(str, found)))}, which cannot "
                "be compared: put them into separate files"
            )
    images: dict[int, str] = {}
    for line in lines:
        seed, noted = line["seed"], line.get("images_hash")  # the first runs did not note it
        if noted is not None and images.setdefault(seed, noted) != noted:
            raise SystemExit(f"the runs of seed {seed} have other images: use the same --root")
