"""Shared by the CIFAR recipes: options, a teacher (loaded or trained), training of a student."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import torch
from _train import measured, milestones, train
from common import cifar
from common.files import save
from common.images import Augmented, Images
from common.teachers import load_teacher
from common.training import Batches, Recipe, Training, say
from torch import nn

from kdlayers import KDHandle

# Mean and standard deviation as in the code of letKD's and IE-KD's authors.
NORMALISATION = {
    "cifar100": ((0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "cifar10": (
        (125.3 / 255, 123.0 / 255, 113.9 / 255),
        (63.0 / 255, 62.1 / 255, 66.7 / 255),
    ),
}


class Options(argparse.ArgumentParser):
    """A parser with the options of both recipes."""

    def __init__(self, description: str | None, out: str, epochs: int) -> None:
        super().__init__(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        add = self.add_argument
        add("--root", type=Path, help="folder of the data set: torchvision's files, or "
            "train/CLASS/* and test/CLASS/* in any image format")  # fmt: skip
        add("--download", action="store_true", help="let torchvision download the data set to ROOT")
        add("--stand-in", type=int, metavar="N", help="use N random images instead of the "
            "data set, to check that all works; accuracies mean nothing")  # fmt: skip
        add("--teacher-checkpoint", type=Path, metavar="FILE", help="weights of the teacher")
        add("--train-teacher", action="store_true", help="train the teacher first, with the same "
            "schedule, unless it is in --out already")  # fmt: skip
        add("--seed", type=int, default=0, help="seed of initial weights and batches; default: 0")
        add("--epochs", type=int, default=epochs, help="the learning rate falls at the same "
            "fractions of a shorter run; default: %(default)s")  # fmt: skip
        add("--teacher-epochs", type=int, default=epochs, help="default: %(default)s")
        add("--test-every", type=int, default=10, metavar="N", help="epochs between printed "
            "tests; the result is always the last epoch's; 0: no tests; default: 10")  # fmt: skip
        add("--amp", action="store_true", help="autocast to bfloat16")
        add("--compile", action="store_true", help="compile the student and its losses")
        add("--device", default="cuda" if torch.cuda.is_available() else "cpu",
            help="default: cuda if available, else cpu")  # fmt: skip
        add("--out", type=Path, default=Path("runs", out), help="folder for checkpoints and "
            "results; a run resumes from its checkpoint there; default: %(default)s")  # fmt: skip


def images_of(name: str, args: argparse.Namespace) -> tuple[Images, Images]:
    """The training and test images that the command line asks for."""
    torch.backends.cudnn.benchmark = True
    values = NORMALISATION[name]
    if args.stand_in is not None:
        say(f"random images instead of {name}: the accuracies mean nothing")
        found = cifar.stand_in(name, args.stand_in, *values)
    elif args.root is not None:
        found = cifar.load(name, args.root, args.out, *values, download=args.download)
    else:
        raise SystemExit(
            f"no folder for {name}: pass --root FOLDER, with --download to download it there, or "
            "--stand-in 1000 to run the script on random images"
        )
    train, test = (part.to(args.device) for part in found)
    return train, test


def augmented(train: Images, size: int) -> Augmented:
    """Batches with crops of images padded by reflection, and flips."""
    return Augmented(train, size, padding=4, mode="reflect")


def recipe_of(data: str, args: argparse.Namespace, fractions: tuple[float, ...]) -> Recipe:
    """The settings that teacher and students share."""
    return {
        "data": data if args.stand_in is None else f"{args.stand_in} random images",
        "seed": args.seed,
        "epochs": args.epochs,
        "milestones": milestones(fractions, args.epochs),
        "fractions": list(fractions),
        "weight_decay": 5e-4,
        "ce_weight": 1.0,
        "amp": args.amp,
    }


def find_teacher(
    make: Callable[[], nn.Module],
    name: str,
    recipe: Recipe,
    images: tuple[Images, Images],
    args: argparse.Namespace,
) -> tuple[nn.Module, Recipe]:
    """The teacher, loaded from a checkpoint or from ``--out``, or trained; and facts about it."""
    torch.manual_seed(0)
    teacher = make().to(args.device, memory_format=torch.channels_last)
    path = args.teacher_checkpoint
    if path is None:
        path = args.out / f"teacher-{name}.pt"
        if not path.exists() and not args.train_teacher:
            raise SystemExit(
                f"no weights for the teacher {name}: pass --teacher-checkpoint FILE, or "
                f"--train-teacher to train it with the same schedule and save it to {path}"
            )
        if not path.exists():
            train_teacher(teacher, name, recipe, images, path, args)
    load_teacher(teacher, name, path)
    return teacher, measured(teacher, name, images[1].batches())


def train_teacher(
    teacher: nn.Module,
    name: str,
    recipe: Recipe,
    images: tuple[Images, Images],
    path: Path,
    args: argparse.Namespace,
) -> None:
    """Train the teacher with labels only and save it to ``path``; resumes an interrupted run."""
    epochs = args.teacher_epochs
    own = {"epochs": epochs, "milestones": milestones(recipe["fractions"], epochs), "seed": 0}
    recipe = recipe | own | {"network": name, "method": "labels", "ce_weight": 1.0}
    batches = augmented(images[0], recipe["batch_size"])
    train(teacher, None, recipe, batches, (), images[1].batches(), path.with_suffix(""), args)
    save({"model": teacher.state_dict(), "facts": {"recipe": recipe}}, path)


def train_student(
    student: nn.Module,
    kd: KDHandle | None,
    recipe: Recipe,
    images: tuple[Images, Images],
    fit_on: Batches,
    args: argparse.Namespace,
) -> Training:
    """Train an attached student, from the start or from a checkpoint."""
    folder = args.out / "-".join(str(recipe[key]) for key in ("pair", "method", "seed"))
    batches, test = augmented(images[0], recipe["batch_size"]), images[1].batches()
    forward = torch.compile(student) if args.compile else None
    options = {"forward": forward, "compiled": args.compile}
    return train(student, kd, recipe, batches, fit_on, test, folder, args, **options)
