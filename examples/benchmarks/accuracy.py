r"""Does a method help, how much, and is the reason its supervision or the student's size?

For each seed, all methods start from the same weights and see the same images in the same order
with the same augmentation. The reported accuracy is that of the last epoch. ``--regime`` sets the
defaults of data, teacher and recipe; other options override them.

On Fashion-MNIST the script trains a teacher on all training images except 5,000 validation images.
It does so once and stores the teacher in ``--cache``. Students see about a tenth of these images:

    python examples/benchmarks/accuracy.py --root data --download --out runs/accuracy.jsonl

On CIFAR you pass a trained teacher. ``--root`` is a folder with torchvision's files, or with
``train/CLASS/*`` and ``test/CLASS/*`` in any image format:

    python examples/benchmarks/accuracy.py --regime cifar100-10000 --root CIFAR100 \
        --teacher-checkpoint resnet56.pt --teacher-accuracy 72.63 --cache runs \
        --out docs/data/results/cifar100-10000.jsonl
    python examples/benchmarks/accuracy.py --regime cifar10-500 --root CIFAR10 \
        --teacher-checkpoint resnet56.pt --teacher-data cifar100 --teacher-root CIFAR100 \
        --cache runs --out docs/data/results/cifar10-500.jsonl

On a GPU you can use as many epochs and templates as the papers. Here the teacher runs in every
step; without ``--views live`` its recorded outputs are kept in the GPU's memory:

    python examples/benchmarks/accuracy.py --regime cifar100-all --root CIFAR100 --epochs 240 \
        --teacher-checkpoint resnet56.pt --device cuda --templates 4096 --subclasses 8 \
        --views live --cache runs --out runs/cifar100-240.jsonl

To compare numbers of recorded views, and recorded views with a live teacher, write a second file
next to the file of the regime; report.py makes a table of it:

    for views in 1 16 live; do
        python examples/benchmarks/accuracy.py --regime cifar100-10000 --root CIFAR100 \
            --teacher-checkpoint resnet56.pt --cache runs --seeds 0 1 2 --views $views \
            --methods KD letKD-2 --out docs/data/results/cifar100-10000.views.jsonl
    done

Each run appends one JSON line with its whole recipe to ``--out``. A run is skipped if the file has
a line with its method, recipe and seed. A run that was interrupted resumes from its last epoch,
which is stored in ``--cache``. So you can stop the script at any time and call it again. You can
also call it several times at once, to use all cores or to fill a GPU: no run is done twice. With
``--tuning`` the script does not use the test images.

To add runs to the committed ones on Fashion-MNIST, with the committed teacher and on the same kind
of device, call

    python examples/benchmarks/accuracy.py --cache docs/data/results \
        --out docs/data/results/fashion-mnist-6000.jsonl

Then ``python examples/benchmarks/report.py`` writes the pages.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import sys
import time
from dataclasses import replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

# Idle threads sleep instead of spinning, which matters on a machine with other jobs.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from _accuracy_methods import Options, add_options, attach, chosen, recipes
from _accuracy_probe import probes, pruned
from _accuracy_record import CHANNELS_MEAN
from _accuracy_regimes import REGIMES, Regime, add_regimes, prepared
from _accuracy_train import digest, macs, matching_width, new_model, one_cycle
from common.files import claimed
from common.testing import accuracy, parameters
from common.training import Recipe, device_name, device_of
from torch import nn

import kdlayers
from kdlayers import KDHandle


def main(arguments: list[str] | None = None) -> None:
    """Do all runs that the command line asks for and that are not in the file yet."""
    args = parse(arguments)
    torch.set_num_threads(args.threads)
    regime = prepared(args, teacher_recipe(args))
    methods = recipes(with_widths(chosen(args), regime), regime.splits.classes)
    for seed in args.seeds:
        for name in args.methods or methods:
            recipe = common_recipe(args) | {"teacher": regime.facts["recipe_hash"]} | methods[name]
            kept = args.cache / f"{digest(recipe)}-{seed}.run"
            if key(name, recipe, seed) in finished(args.out, args.tuning):
                continue
            with claimed(kept.with_suffix(".lock")) as mine:
                # Another process may have finished the run since the file was read.
                if mine and key(name, recipe, seed) not in finished(args.out, args.tuning):
                    complete(name, recipe, seed, regime, kept)


def complete(name: str, recipe: Recipe, seed: int, regime: Regime, kept: Path) -> None:
    """Do one run, from its start or its last epoch, and append its line."""
    args = regime.args
    line = run(name, recipe, seed, regime, kept)
    line = {"method": name, "seed": seed, "recipe_hash": digest(recipe)} | line
    append(args.out, line | {"recipe": recipe, "teacher": regime.facts} | circumstances(args))
    kept.unlink(missing_ok=True)
    accuracies = [line["validation_accuracy"], line["test_accuracy"]]
    shown = " and ".join(f"{value:.2f}" for value in accuracies if value is not None)
    print(f"seed {seed}  {name:28} {shown} %  {line['clock_seconds']:.0f} s", flush=True)


def run(name: str, recipe: Recipe, seed: int, regime: Regime, kept: Path) -> dict[str, Any]:
    """Train and measure one student; ``kept`` is its checkpoint."""
    start = time.perf_counter()
    splits, args = regime.splits, regime.args
    split, batches, teacher = regime.given(recipe, seed)
    student = new_model(recipe["student"], splits, seed, width=recipe["width"]).to(args.device)
    example = splits.blank(2).to(device_of(student))
    kd = attach(recipe, student, teacher, example, len(batches), splits.classes)
    training = one_cycle(student, kd, recipe, len(batches), kept)
    training.fit(batches.plain(128), seed)
    training.run(batches.epoch)
    terms = {} if kd is None else {name: rounded(value) for name, value in kd.terms.items()}
    if args.save and kd is not None:
        torch.save(kd.state_dict(), saved_at(args.save, name, seed).with_suffix(".kd.pt"))
    let_go(kd, recipe)
    if args.save and any(".kd." in name for name, _ in student.named_parameters()):
        kdlayers.save_student(student, saved_at(args.save, name, seed))
    shown, held_out = splits.validation if args.tuning else splits.test, splits.validation
    return {
        "validation_accuracy": accuracy(student, held_out.batches()).top1 if held_out else None,
        "test_accuracy": None if args.tuning else accuracy(student, splits.test.batches()).top1,
        "training_accuracy": accuracy(student, split.batches()).top1,
        "images_hash": split.digest(),
        "parameters": parameters(student),
        "macs": macs(student, splits),
        "seconds_per_epoch": round(sum(training.seconds) / recipe["epochs"], 3),
        "seconds_of_fit": round(training.fit_seconds, 2),
        "clock_seconds": round(time.perf_counter() - start, 1),
        "last_terms": terms,
        "curve": training.curve,
        "scales": scales(student),
        "probes": probes(student, args.last.partition(":")[0], split, shown),
        "pruned": pruned(student, split, shown, splits) if args.pruning else [],
    }


def with_widths(options: Options, regime: Regime) -> Options:
    """The options, with the widths at which control students are as large as letKD-2's."""
    if not any(name.startswith("wider") for name in regime.args.methods or ["wider"]):
        return options
    splits, teacher = regime.splits, regime.teacher
    larger = new_model(options.student, splits, 0, width=options.width).to(device_of(teacher))
    example = splits.blank(2).to(device_of(teacher))
    attach(recipes(options, splits.classes)["layers only (2)"], larger, teacher, example, 1)
    found = {"width_parameters": parameters, "width_macs": lambda model: macs(model, splits)}
    widths = {
        name: matching_width(options.student, splits, count(larger), count)
        for name, count in found.items()
        if not getattr(options, name)
    }
    return replace(options, **widths)


def let_go(kd: KDHandle | None, recipe: Recipe) -> None:
    """Detach the teacher. Layers with alpha 0 do not change the features and are removed."""
    if kd is None:
        return
    layers = recipe.get("layers", [])
    if layers and all(layer["alpha"] == 0 for layer in layers):
        kd.remove()
    else:
        kd.detach()


def scales(student: nn.Module) -> dict[str, float]:
    """The learnt scales of the KD layers; those of the scores show how sharp the scores are."""
    return {
        name: rounded(value)
        for name, value in student.state_dict().items()
        if ".kd." in name and name.endswith(".scale")
    }


def saved_at(folder: Path, name: str, seed: int) -> Path:
    """The file of a student, such as letKD-2-KD-seed-0.pt; creates the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    words = "".join(char if char.isalnum() or char == "-" else " " for char in name).split()
    return folder / f"{'-'.join(words)}-seed-{seed}.pt"


def rounded(value: torch.Tensor) -> float | None:
    """A number with five digits; ``None`` if it is not finite, because JSON cannot hold it."""
    number = float(value)
    return float(f"{number:.5g}") if math.isfinite(number) else None


# ------------------------------------------------------------------ recipes and lines


def teacher_recipe(args: argparse.Namespace) -> Recipe:
    """The recipe of the teacher; its fixed values suit all ResNets for CIFAR."""
    return {
        "data": "fashion-mnist",
        "network": args.teacher,
        "seed": 0,
        "validation": args.validation,
        "epochs": args.teacher_epochs,
        "batch_size": 64,
        "padding": 2,
        "lr": 0.1,
        "weight_decay": 5e-4,
        "precision": args.precision,
    }


def common_recipe(args: argparse.Namespace) -> Recipe:
    """The part of the recipe that all students share."""
    recorded = {"views": args.views} if args.views else {}
    drawn = {} if args.draw is None else {"draw": args.draw}
    return {
        "data": args.data,
        "validation": args.validation,
        "images": args.images,
        "epochs": args.epochs,
        "batch_size": args.batch_size,
        "padding": args.padding if args.augment else 0,
        "flips": args.augment,
        "lr": args.lr,
        "weight_decay": args.weight_decay,
        "precision": args.precision,
    } | (recorded | drawn)


def circumstances(args: argparse.Namespace) -> dict[str, Any]:
    """Date, versions, device and threads of a run."""
    return {
        "date": datetime.now(timezone.utc).date().isoformat(),
        "versions": {
            "kdlayers": kdlayers.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "device": device_name(args.device),
        "threads": args.threads,
    }


def key(method: str, recipe: Recipe, seed: int) -> tuple[str, str, int]:
    """The values that identify a run."""
    return method, digest(recipe), seed


def finished(path: Path, tuning: bool) -> set[tuple[str, str, int]]:
    """The runs in a file, with ``tuning`` those without a test accuracy.

    The file is read each time, because other processes may write to it.
    """
    if not path.exists():
        return set()
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    return {
        (line["method"], line["recipe_hash"], line["seed"])
        for line in lines
        if (line["test_accuracy"] is None) == tuning
    }


def append(path: Path, line: dict[str, Any]) -> None:
    """Append a line with a single write."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def views(text: str) -> int:
    """The number of recorded views; 0 or ``live``: the teacher runs in training."""
    count = 0 if text == "live" else int(text)
    if count < 0:
        raise argparse.ArgumentTypeError(f"expected 'live' or a number of views, got {text}")
    return count


def check_views(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Exit if a record would not hold what the recipe says."""
    if not args.augment:
        parser.error("--views records cropped and mirrored images: add --augment")
    for at in (args.first, args.last):
        if at.rpartition(":")[2] in CHANNELS_MEAN:
            parser.error(
                f"a record has only the attention map of {at}, which is no features for a layer: "
                "choose another point, or pass --views live"
            )


def parse(
    arguments: list[str] | None,
    *,
    description: str | None = __doc__,
    parents: list[argparse.ArgumentParser] | None = None,
    out: str = "runs/accuracy.jsonl",
) -> argparse.Namespace:
    """Parse the command line; other scripts give their description and further options."""
    parser = argparse.ArgumentParser(
        description=description,
        parents=parents or [],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add_regimes(parser)
    add("--out", type=Path, default=Path(out), help="default: %(default)s")
    add("--cache", type=Path, default=Path("runs"), help="cache folder; default: %(default)s")
    add("--methods", nargs="+", help="default: all; the message for a wrong name lists them")
    add("--seeds", nargs="+", type=int, default=list(range(5)), help="default: 0 to 4")
    add("--no-pruning", dest="pruning", action="store_false", help="skip pruning, which is slow")
    add("--tuning", action="store_true", help="do not use the test images")
    add("--save", type=Path, help="folder for students with KD layers and the states of kd")
    add("--device", default="cpu", help="such as cuda; default: %(default)s")
    add("--threads", type=int, default=1, help="default: %(default)s")
    group = parser.add_argument_group("recipe of all students")
    add = group.add_argument
    add("--teacher", default="resnet14", help="default: %(default)s")
    add("--teacher-epochs", type=int, default=15, help="default: %(default)s")
    add(
        "--validation",
        type=int,
        default=5000,
        help="validation images, or 0 for none; default: %(default)s",
    )
    add("--images", type=int, default=6000, help="per student; 0: all; default: %(default)s")
    add("--epochs", type=int, default=20, help="default: %(default)s")
    add("--batch-size", type=int, default=64, help="default: %(default)s")
    add("--padding", type=int, default=2, help="padding of the crops; default: %(default)s")
    add("--augment", action="store_true", help="crop and flip the student's images")
    add("--views", type=views, default=0, help="recorded views, with --augment; default: live")
    add("--draw", type=int, help="seed to draw the images; default: the run's seed")
    add("--lr", type=float, default=0.1, help="highest learning rate; default: %(default)s")
    add("--weight-decay", type=float, default=5e-4, help="default: %(default)s")
    add(
        "--precision",
        choices=("bfloat16", "float32"),
        default="bfloat16",
        help="of training; default: %(default)s",
    )
    add_options(parser)
    parser.set_defaults(**REGIMES[parser.parse_known_args(arguments)[0].regime])
    args = parser.parse_args(arguments)
    if args.views:
        check_views(parser, args)
    trained = args.teacher_checkpoint is None and args.data == "fashion-mnist"
    if not args.validation and (args.tuning or trained):
        parser.error("--tuning and a teacher trained here need images: pass --validation N")
    if 0 < args.images < args.batch_size:
        parser.error(f"--images {args.images} is less than a batch of {args.batch_size}")
    unknown = set(args.methods or ()) - set(recipes(chosen(args)))
    if unknown:
        parser.error(f"no method {sorted(unknown)}; the methods are {list(recipes(chosen(args)))}")
    return args


if __name__ == "__main__":
    main()
