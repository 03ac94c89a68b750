"""The regimes: each one sets the data, the teacher and matching defaults of the options."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _accuracy_data import Splits, few, load
from _accuracy_record import RecordedBatches, Replay, recorded
from _accuracy_teacher import given_teacher, trained_teacher
from common.images import Augmented, Images
from common.training import Recipe, device_of
from torch import nn

CIFAR: dict[str, Any] = {
    "data": "cifar100",
    "teacher_data": "cifar100",
    "teacher": "resnet56",
    "student": "resnet20",
    "width": 16.0,
    "validation": 5000,
    "padding": 4,
    "augment": True,
    "precision": "float32",
    "templates": 512,
    "temperature": 1.0,
    "subclasses": 4,
    "components": 60,
    "layer_weight": 10.0,  # these three chosen on the validation images
    "layer_weight_beside": 10.0,
    "aekt_gamma": 0.1,
    "pruning": False,
}
FOREIGN = CIFAR | {
    "data": "cifar10",
    "validation": 1000,
    "components": 9,
    "templates": 128,  # these three chosen on the validation images too
    "temperature": 0.1,
    "feature_weight": 100.0,
    "epochs": 100,
    "views": 16,
    "methods": [
        *("labels only", "FitNet", "AT", "IE-KD", "letKD-1", "letKD-2", "layers only (2)"),
        *("letKD-2 + FitNet", "FeatureLoss"),
    ],
}

# The defaults that a regime sets. The command line can still override each of them.
REGIMES: dict[str, dict[str, Any]] = {
    "fashion-mnist": {},
    "cifar100-10000": CIFAR | {"images": 10_000, "epochs": 20, "views": 4, "draw": 0, "warmup": 2},
    "cifar100-all": CIFAR
    | {"validation": 0, "images": 0, "epochs": 30, "views": 4, "draw": 0, "warmup": 3}
    | {"layer_epochs": 30},
    "cifar10-500": FOREIGN | {"images": 500},
    "cifar10-5000": FOREIGN
    | {"images": 5000, "epochs": 30, "views": 4}
    | {"layer_weight": 1.0, "layer_weight_beside": 1.0, "fitnet_weight": 3.0},
}


def add_regimes(parser: argparse.ArgumentParser) -> None:
    """Add the options that choose the data and the teacher."""
    add = parser.add_argument
    add("--regime", choices=list(REGIMES), default="fashion-mnist", help="default: %(default)s")
    sets = ("fashion-mnist", "cifar10", "cifar100")
    add("--data", choices=sets, default="fashion-mnist", help="data set; default: %(default)s")
    add("--root", default="data", help="folder of the data set; default: %(default)s")
    add("--download", action="store_true", help="download the data set if it is missing")
    add("--teacher-checkpoint", type=Path, help="weights of a trained teacher; default: train one")
    add("--teacher-accuracy", type=float, help="test accuracy in %% to check it against")
    add("--teacher-data", default="fashion-mnist", help="data set of the checkpoint")
    add("--teacher-root", help="folder of that data set; default: --root")


@dataclass(frozen=True)
class Regime:
    """Data, teacher and options of a call.

    Attributes:
        splits: the student's data.
        teacher: the teacher.
        facts: recipe, size and accuracies of the teacher.
        args: the parsed command line.
    """

    splits: Splits
    teacher: nn.Module
    facts: dict[str, Any]
    args: argparse.Namespace

    def given(self, recipe: Recipe, seed: int) -> tuple[Images, Any, nn.Module]:
        """Images, batches and teacher of one run.

        The recipe's ``draw`` is the seed for drawing the images; without it, ``seed`` is used. If
        the recipe has ``views``, batches and teacher come from a record.
        """
        split = few(self.splits.train, recipe["images"], recipe.get("draw", seed))
        if not recipe.get("views"):
            moved = split.to(device_of(self.teacher))
            how = {key: recipe[key] for key in ("padding", "flips")}
            return split, Augmented(moved, recipe["batch_size"], **how, seed=seed), self.teacher
        names = ("layer1", "layer2", self.args.first, self.args.last)
        points = [name.rpartition(":")[2] for name in names]
        record = recorded(
            self.teacher,
            self.facts["recipe_hash"],
            split,
            points,
            self.args.cache,
            views=recipe["views"],
            padding=recipe["padding"],
        )
        teacher = Replay(record)
        return split, RecordedBatches(teacher, recipe["batch_size"], seed), teacher


def prepared(args: argparse.Namespace, teacher_recipe: Recipe) -> Regime:
    """Read the data, and load or train the teacher."""
    splits = data_of(args, args.data, args.root)
    path, kind = args.teacher_checkpoint, args.teacher_data
    if path is None and args.data != "fashion-mnist":
        raise SystemExit(f"{args.data} needs a trained teacher: pass --teacher-checkpoint FILE")
    if path is None:
        teacher, facts = trained_teacher(splits, teacher_recipe, args.cache, args.device)
        print(f"teacher: {facts['validation_accuracy']:.2f} % of validation images", flush=True)
        return Regime(splits, teacher, facts, args)
    own = splits if kind == args.data else data_of(args, kind, args.teacher_root or args.root)
    teacher, facts = given_teacher(path, args.teacher, own, args.cache, args.teacher_accuracy)
    facts["recipe"]["data"] = kind
    return Regime(splits, teacher.to(args.device), facts, args)


def data_of(args: argparse.Namespace, name: str, root: str) -> Splits:
    """The splits of a data set."""
    return load(name, root, args.cache, validation=args.validation, download=args.download)
