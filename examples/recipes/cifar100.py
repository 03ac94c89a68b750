"""letKD and the methods it is compared with on CIFAR-100, by the published protocol.

One command trains one student of a published pair. Its last line is JSON with the accuracy of the
last epoch. If a run is interrupted, the same command resumes it.

    python examples/recipes/cifar100.py --root data --download --train-teacher
        --pair resnet56-resnet20 --method letkd-2
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import asdict
from pathlib import Path

# Idle threads sleep instead of spinning, which matters on a machine with other jobs.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.append(str(Path(__file__).resolve().parents[1]))  # for examples/common and models

import torch
from _cifar100 import PAIRS, network
from _methods import METHODS, WITHOUT_TEACHER, Pair, Sizes, attach, ce_weight
from _options import Options, find_teacher, images_of, recipe_of, train_student
from _train import finish
from common.images import Images
from common.testing import parameters
from common.training import Recipe, say
from torch import nn

FRACTIONS = (150 / 240, 180 / 240, 210 / 240)  # of the run, at which the learning rate falls
TEACHER_LR = 0.05
AUTHORS = "default: %(default)s, the authors' value"


def main(arguments: list[str] | None = None) -> None:
    """Train the student that the command line asks for."""
    args = parse(arguments)
    pair = PAIRS[args.pair]
    images = images_of("cifar100", args)
    common = recipe_of("cifar100", args, FRACTIONS) | {"batch_size": args.batch_size}
    teacher, facts = None, {}
    if args.method not in WITHOUT_TEACHER:
        teacher, facts = teacher_of(pair, common | {"lr": TEACHER_LR}, images, args)

    torch.manual_seed(args.seed)
    student = network(pair.student).to(args.device, memory_format=torch.channels_last)
    sizes = Sizes(args.num_templates, args.sharpness, args.subclasses, args.components)
    steps = len(images[0]) // args.batch_size
    example = torch.zeros(2, 3, 32, 32, device=args.device)
    kd = attach(args.method, pair, student, teacher, steps, example, 100, sizes)
    say(f"student {pair.student}: {parameters(student):,} parameters with its layers")
    recipe = common | {
        "pair": args.pair,
        "method": args.method,
        "lr": pair.lr,
        "ce_weight": ce_weight(args.method, pair),
        "teacher": facts,
        "sizes": asdict(sizes),
    }
    training = train_student(student, kd, recipe, images, images[0].batches(), args)
    published = {key: pair.published.get(key) for key in ("teacher", args.method)}
    finish(training, images[1].batches(), published, take_out=args.method == "quest")


def teacher_of(
    pair: Pair, recipe: Recipe, images: tuple[Images, Images], args: argparse.Namespace
) -> tuple[nn.Module, Recipe]:
    """The teacher of the pair; prints its accuracy and the published one."""
    name = pair.teacher
    found = find_teacher(lambda: network(name), name, recipe, images, args)
    say(f"the published teacher has {pair.published['teacher']} %")
    return found


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = Options(__doc__, "cifar100", 240)
    add = parser.add_argument
    add("--pair", choices=PAIRS, default="resnet56-resnet20", metavar="PAIR",
        help=f"teacher and student: {', '.join(PAIRS)}; default: %(default)s")  # fmt: skip
    add("--method", choices=METHODS, default="letkd-2", metavar="METHOD",
        help=f"{', '.join(METHODS)}; layers: letKD-2's layers without supervision, to control for "
        "capacity; default: %(default)s")  # fmt: skip
    add("--batch-size", type=int, default=64, help=AUTHORS)
    add("--num-templates", type=int, default=4096, metavar="K",
        help=f"centres of the last codebook; {AUTHORS}")  # fmt: skip
    add("--sharpness", type=float, default=1.0, metavar="T",
        help=f"of the codebook; larger gives harder targets; {AUTHORS}")  # fmt: skip
    add("--subclasses", type=int, default=8, metavar="S",
        help=f"per class, for letKD-2's first layer; {AUTHORS}")  # fmt: skip
    add("--components", type=int, default=60,
        help=f"of its discriminant analysis; {AUTHORS}")  # fmt: skip
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
