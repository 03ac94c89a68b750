r"""Does it help, how much, and is it the supervision or the size?

For each seed, every method starts from the same weights, and sees the same images in the same order
with the same augmentation. The accuracy is that of the last epoch. ``--regime`` sets data, teacher
and recipe; every option may still be given.

On Fashion-MNIST a teacher learns from all training images (but 5,000 for validation), once, and is
kept in ``--cache``. Students see a tenth of them:

    python examples/benchmarks/accuracy.py --root data --download --out runs/accuracy.jsonl

On CIFAR the teacher's weights are yours to bring. ``--root`` has torchvision's files, or
``train/CLASS/*`` and ``test/CLASS/*`` in any image format:

    python examples/benchmarks/accuracy.py --regime cifar100-10000 --root CIFAR100 \
        --teacher-checkpoint resnet56.pt --teacher-accuracy 72.63 --cache runs \
        --out docs/data/results/cifar100-10000.jsonl
    python examples/benchmarks/accuracy.py --regime cifar10-500 --root CIFAR10 \
        --teacher-checkpoint resnet56.pt --teacher-data cifar100 --teacher-root CIFAR100 \
        --cache runs --out docs/data/results/cifar10-500.jsonl

As many epochs and templates as the papers have, for those with a GPU; the teacher runs each time:

    python examples/benchmarks/accuracy.py --regime cifar100-all --root CIFAR100 --epochs 240 \
        --teacher-checkpoint resnet56.pt --device cuda --templates 4096 --subclasses 8 \
        --validation 500 --cache runs --out runs/cifar100-240.jsonl

Accuracy against the number of recorded views, and against the live teacher; report.py makes a table
of the file beside that of the regime:

    for views in 1 16 live; do
        python examples/benchmarks/accuracy.py --regime cifar100-10000 --root CIFAR100 \
            --teacher-checkpoint resnet56.pt --cache runs --seeds 0 1 2 --views $views \
            --methods KD letKD-2 --out docs/data/results/cifar100-10000.views.jsonl
    done

Every run is one JSON line in ``--out``, with its whole recipe. A run whose method, recipe and seed
are there already is skipped; one that was stopped goes on after its last epoch, which ``--cache``
has. So this may be stopped at any time and called again, and called twice at a time to use two
cores: no run is done twice. ``--tuning`` leaves the test images alone.

The committed runs on Fashion-MNIST are continued, with the committed teacher, on the device that
they are of, by

    python examples/benchmarks/accuracy.py --cache docs/data/results \
        --out docs/data/results/fashion-mnist-6000.jsonl

and ``python examples/benchmarks/report.py`` makes the pages.
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

# Idle threads sleep instead of spinning, which matters where a machine has other work too.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch
from _accuracy_methods import Options, Recipe, add_options, attach, chosen, recipes
from _accuracy_probe import probes, pruned
from _accuracy_progress import Progress, claimed
from _accuracy_regimes import REGIMES, Regime, add_regimes, prepared
from _accuracy_train import (
    accuracy,
    device_of,
    digest,
    macs,
    matching_width,
    new_model,
    parameters,
    seconds,
    train,
)
from torch import nn

import kdlayers
from kdlayers import KDHandle


def main(arguments: list[str] | None = None) -> None:
    """Run what the command line asks for and what is not there yet."""
    args = parse(arguments)
    torch.set_num_threads(args.threads)
    regime = prepared(args, teacher_recipe(args))
    methods = recipes(with_widths(chosen(args), regime), regime.splits.classes)
    for seed in args.seeds:
        for name in args.methods or methods:
            recipe = common_recipe(args) | {"teacher": regime.facts["recipe_hash"]} | methods[name]
            kept = args.cache / f"{digest(recipe)}-{seed}.run"
            if key(name, recipe, seed) in finished(args.out):
                continue
            with claimed(kept.with_suffix(".lock")) as mine:
                # Another process may have finished it since the file was read.
                if mine and key(name, recipe, seed) not in finished(args.out):
                    complete(name, recipe, seed, regime, Progress(kept))


def complete(name: str, recipe: Recipe, seed: int, regime: Regime, progress: Progress) -> None:
    """One run, from its start or its last epoch to its line."""
    args = regime.args
    line = run(name, recipe, seed, regime, progress)
    line = {"method": name, "seed": seed, "recipe_hash": digest(recipe)} | line
    append(args.out, line | {"recipe": recipe, "teacher": regime.facts} | circumstances(args))
    progress.done()
    accuracies = [line["validation_accuracy"], line["test_accuracy"]]
    shown = " and ".join(f"{value:.2f}" for value in accuracies if value is not None)
    print(f"seed {seed}  {name:28} {shown} %  {line['clock_seconds']:.0f} s", flush=True)


def run(name: str, recipe: Recipe, seed: int, regime: Regime, progress: Progress) -> dict[str, Any]:
    """Train and measure one student."""
    start = time.perf_counter()
    splits, args = regime.splits, regime.args
    split, batches, teacher = regime.given(recipe, seed)
    student = new_model(recipe["student"], splits, seed, width=recipe["width"]).to(args.device)
    device = device_of(student)
    example = splits.blank(2).to(device)
    kd = attach(recipe, student, teacher, example, batches.steps, splits.classes)
    fitted = seconds(device)
    if kd is not None and not progress.started:
        kd.fit(batches.plain(128), seed=seed, progress=False)
    fitted = seconds(device) - fitted
    spent = train(student, kd, batches, recipe, progress, recipe["ce_weight"])
    terms = {} if kd is None else {name: rounded(value) for name, value in kd.terms.items()}
    if args.save and kd is not None:
        torch.save(kd.state_dict(), saved_at(args.save, name, seed).with_suffix(".kd.pt"))
    let_go(kd, recipe)
    if args.save and any(".kd." in name for name, _ in student.named_parameters()):
        kdlayers.save_student(student, saved_at(args.save, name, seed))
    shown = splits.validation if args.tuning else splits.test
    return {
        "validation_accuracy": accuracy(student, splits.validation),
        "test_accuracy": None if args.tuning else accuracy(student, splits.test),
        "training_accuracy": accuracy(student, split),
        "parameters": parameters(student),
        "macs": macs(student, splits),
        "seconds_per_epoch": round(spent, 3),
        "seconds_of_fit": round(fitted, 2),
        "clock_seconds": round(time.perf_counter() - start, 1),
        "last_terms": terms,
        "curve": progress.curve,
        "scales": scales(student),
        "probes": probes(student, args.last.partition(":")[0], split, shown),
        "pruned": pruned(student, split, shown, splits) if args.pruning else [],
    }


def with_widths(options: Options, regime: Regime) -> Options:
    """The options with the widths of the control students that are as large as letKD-2's."""
    splits, teacher = regime.splits, regime.teacher
    larger = new_model(options.student, splits, 0, width=options.width).to(device_of(teacher))
    example = splits.blank(2).to(device_of(teacher))
    attach(recipes(options, splits.classes)["layers only (2)"], larger, teacher, example, 1)
    found = {"width_parameters": parameters, "width_macs": macs}
    widths = {
        name: matching_width(options.student, splits, count(larger, splits), count)
        for name, count in found.items()
        if not getattr(options, name)
    }
    return replace(options, **widths)


def let_go(kd: KDHandle | None, recipe: Recipe) -> None:
    """End the distillation; layers that add nothing are taken out, as one would before use."""
    if kd is None:
        return
    layers = recipe.get("layers", [])
    if layers and all(layer["alpha"] == 0 for layer in layers):
        kd.remove()
    else:
        kd.detach()


def scales(student: nn.Module) -> dict[str, float]:
    """The learnt scales of the KD layers: those of the scores tell how hard they have become."""
    return {
        name: rounded(value)
        for name, value in student.state_dict().items()
        if ".kd." in name and name.endswith(".scale")
    }


def saved_at(folder: Path, name: str, seed: int) -> Path:
    """The file of a student, such as letKD-2-KD-seed-0.pt, in a folder that is there."""
    folder.mkdir(parents=True, exist_ok=True)
    words = "".join(char if char.isalnum() or char == "-" else " " for char in name).split()
    return folder / f"{'-'.join(words)}-seed-{seed}.pt"


def rounded(value: torch.Tensor) -> float | None:
    """Five digits of a number; ``None`` where it is none, which JSON has no word for."""
    number = float(value)
    return float(f"{number:.5g}") if math.isfinite(number) else None


# ------------------------------------------------------------------ recipes and lines


def teacher_recipe(args: argparse.Namespace) -> Recipe:
    """What determines the teacher; what cannot be chosen suits all networks of this kind."""
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
    """What all students have in common."""
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
    """When, and with what."""
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


def device_name(device: str) -> str:
    """Of a GPU its own name."""
    on_gpu = torch.device(device).type == "cuda"
    return torch.cuda.get_device_name(device) if on_gpu else device


def key(method: str, recipe: Recipe, seed: int) -> tuple[str, str, int]:
    """What makes a run."""
    return method, digest(recipe), seed


def finished(path: Path) -> set[tuple[str, str, int]]:
    """The runs of a file, read anew each time since other processes may write to it."""
    if not path.exists():
        return set()
    lines = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    return {(line["method"], line["recipe_hash"], line["seed"]) for line in lines}


def append(path: Path, line: dict[str, Any]) -> None:
    """Add a line, in one write."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def views(text: str) -> int:
    """The number of recorded views; 0, or the word live: the teacher runs in training."""
    count = 0 if text == "live" else int(text)
    if count < 0:
        raise argparse.ArgumentTypeError(f"live, or a number of views, not {text}")
    return count


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add_regimes(parser)
    add("--out", type=Path, default=Path("runs/accuracy.jsonl"), help="default: %(default)s")
    add("--cache", type=Path, default=Path("runs"), help="of teachers; default: %(default)s")
    add("--methods", nargs="+", help="default: all; a wrong name lists them")
    add("--seeds", nargs="+", type=int, default=list(range(5)), help="default: 0 to 4")
    add("--no-pruning", dest="pruning", action="store_false", help="leave it out, as it takes time")
    add("--tuning", action="store_true", help="do not look at the test images")
    add("--save", type=Path, help="folder for students with KD layers and for what kd has learnt")
    add("--device", default="cpu", help="such as cuda; default: %(default)s")
    add("--threads", type=int, default=1, help="default: %(default)s")
    group = parser.add_argument_group("recipe of all students")
    add = group.add_argument
    add("--teacher", default="resnet14", help="default: %(default)s")
    add("--teacher-epochs", type=int, default=15, help="default: %(default)s")
    add(
        "--validation", type=int, default=5000, help="images nobody trains on; default: %(default)s"
    )
    add("--images", type=int, default=6000, help="students see; 0: all; default: %(default)s")
    add("--epochs", type=int, default=20, help="default: %(default)s")
    add("--batch-size", type=int, default=64, help="default: %(default)s")
    add("--padding", type=int, default=2, help="of the crops; default: %(default)s")
    add("--augment", action="store_true", help="crop and flip the student's images")
    add("--views", type=views, default=0, help="record so many of the teacher; default: live")
    add("--draw", type=int, help="seed of which images students see; default: the run's seed")
    add("--lr", type=float, default=0.1, help="highest rate; default: %(default)s")
    add("--weight-decay", type=float, default=5e-4, help="default: %(default)s")
    add("--precision", choices=("bfloat16", "float32"), default="bfloat16", help="of training")
    add_options(parser)
    parser.set_defaults(**REGIMES[parser.parse_known_args(arguments)[0].regime])
    args = parser.parse_args(arguments)
    unknown = set(args.methods or ()) - set(recipes(chosen(args)))
    if unknown:
        parser.error(f"no method {sorted(unknown)}; there are {list(recipes(chosen(args)))}")
    return args


if __name__ == "__main__":
    main()
