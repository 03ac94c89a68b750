"""letKD on ImageNet, ResNet-34 to ResNet-18 or ResNet-50 to a MobileNet, on one or more GPUs.

    torchrun --nproc-per-node 4 examples/recipes/imagenet.py --root imagenet --amp --compile

The paper trains for 100 epochs with a learning rate of 0.1, divided by 10 after 30, 60 and 90. It
does not give batch size, weight decay, templates, sharpness and sub-classes for ImageNet; the
defaults are ours. One command trains one student. Its last line is JSON. If a run is interrupted,
the same command resumes it.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import asdict
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
sys.path.append(str(Path(__file__).resolve().parents[1]))  # for examples/common and models

import torch
import torch.distributed as dist
from _imagenet import PAIRS, in_order, load, network, shuffled, teacher_of
from _methods import WITHOUT_TEACHER, Sizes, attach, ce_weight
from _train import finish, measured, milestones, train
from common.testing import parameters
from common.training import rank, say
from torch import nn
from torch.nn.parallel import DistributedDataParallel

METHODS = ("labels", "kd", "dkd", "layers", "quest", "letkd-1", "letkd-2")


def main(arguments: list[str] | None = None) -> None:
    """Run one process."""
    args = parse(arguments)
    device = start(args)
    world = dist.get_world_size() if dist.is_initialized() else 1
    augmented, plain, validation, classes = load(args)
    each = args.batch_size // world
    batches = shuffled(augmented, each, rank(), world, args)
    tests = in_order(validation, each, rank(), world, args)
    pair, teacher, facts = PAIRS[args.pair], None, {}
    if args.method not in WITHOUT_TEACHER:
        torch.manual_seed(0)  # random weights are the same on all ranks
        teacher = teacher_of(pair.teacher, args.teacher_weights, classes)
        teacher = teacher.to(device, memory_format=torch.channels_last)
        facts = measured(teacher, pair.teacher, tests)
        say(f"the published teacher has {pair.published['teacher']} %")

    torch.manual_seed(args.seed)
    student = network(pair.student, classes).to(device, memory_format=torch.channels_last)
    sizes = Sizes(args.num_templates, args.sharpness, args.subclasses, args.components)
    example = torch.zeros(2, 3, args.size, args.size, device=device)
    kd = attach(args.method, pair, student, teacher, len(batches), example, classes, sizes)
    say(f"student {pair.student}: {parameters(student):,} parameters with its layers")
    recipe = {
        "data": "imagenet" if args.stand_in is None else f"{args.stand_in} random images",
        "pair": args.pair,
        "method": args.method,
        "seed": args.seed,
        "epochs": args.epochs,
        "milestones": milestones((0.3, 0.6, 0.9), args.epochs),
        "lr": pair.lr,
        "batch_size": args.batch_size,
        "weight_decay": args.weight_decay,
        "ce_weight": ce_weight(args.method, pair),
        "amp": args.amp,
        "size": args.size,
        "processes": world,
        "teacher": facts,
        "sizes": asdict(sizes),
    }
    folder = args.out / f"{args.pair}-{args.method}-{args.seed}"
    fit_on = in_order(plain, each, rank(), world, args)
    options = {"forward": wrapped(student, device, args), "compiled": args.compile}
    training = train(student, kd, recipe, batches, fit_on, tests, folder, args, **options)
    published = {key: pair.published.get(key) for key in ("teacher", args.method)}
    finish(training, tests, published, take_out=args.method == "quest")
    if dist.is_initialized():
        dist.destroy_process_group()


def start(args: argparse.Namespace) -> torch.device:
    """Initialise the process group if torchrun started several processes; returns the device."""
    torch.backends.cudnn.benchmark = True
    if "RANK" not in os.environ:
        return torch.device(args.device)
    if torch.device(args.device).type == "cpu":
        dist.init_process_group("gloo")
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("nccl", device_id=device)
    return device


def wrapped(student: nn.Module, device: torch.device, args: argparse.Namespace) -> nn.Module:
    """The student as called in training: optionally in DDP and compiled."""
    model = student
    if dist.is_initialized():
        model = DistributedDataParallel(
            student, device_ids=[device] if device.type == "cuda" else None
        )
    return torch.compile(model) if args.compile else model


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--root", type=Path, help="folder with train/CLASS/ and val/CLASS/")
    add("--pair", choices=PAIRS, default="resnet34-resnet18", metavar="PAIR",
        help=f"teacher and student: {', '.join(PAIRS)}; default: %(default)s")  # fmt: skip
    add("--method", choices=METHODS, default="letkd-2", metavar="METHOD",
        help=f"{', '.join(METHODS)}; layers: letKD-2's without supervision, to control for "
        "capacity; default: %(default)s")  # fmt: skip
    add("--teacher-weights", default="IMAGENET1K_V1", metavar="NAME",
        help="name of torchvision's weights, file, or 'random'; default: %(default)s")  # fmt: skip
    add("--seed", type=int, default=0, help="seed of initial weights and batches; default: 0")
    add("--epochs", type=int, default=100, help="default: %(default)s, as published")
    add("--batch-size", type=int, default=256, help="sum over all processes; default: 256")
    add("--weight-decay", type=float, default=1e-4, help="default: %(default)s")
    add("--num-templates", type=int, default=4096, metavar="K", help="default: %(default)s")
    add("--sharpness", type=float, default=1.0, metavar="T", help="default: %(default)s")
    add("--subclasses", type=int, default=8, metavar="S", help="default: %(default)s")
    add("--components", type=int, default=60, help="default: %(default)s")
    add("--size", type=int, default=224, help="height and width; default: %(default)s")
    add("--workers", type=int, default=8, help="per process, to load images; default: 8")
    add("--test-every", type=int, default=1, metavar="N", help="epochs between printed tests; "
        "the result is always the last epoch's; 0: no tests; default: 1")  # fmt: skip
    add("--amp", action="store_true", help="autocast to bfloat16")
    add("--compile", action="store_true", help="compile the student and its losses")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu",
        help="default: cuda if available, else cpu")  # fmt: skip
    add("--out", type=Path, default=Path("runs/imagenet"), help="folder for checkpoints and "
        "results; a run resumes from its checkpoint there; default: %(default)s")  # fmt: skip
    add("--stand-in", type=int, metavar="N", help="use N random images instead of ImageNet, to "
        "check that all works; accuracies mean nothing")  # fmt: skip
    add("--classes", type=int, default=1000, help="of the random images; default: 1000")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
