"""How AEKT and student-friendly KD fail and what keeps them stable; prints their pages' tables.

Trains the small student of examples/aekt.py and examples/skd.py on digits, with three seeds and a
learning rate that is high for these losses. The tables show how a loss fails, not which method is
better.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # the examples

import data
import torch
from _tables import Table
from aekt import accuracy, regnet, train
from torch import nn

from kdlayers import AEKTLoss, DistillLoss, DKDLoss, KDLoss, StudentFriendlyKDLoss, attach_kd
from kdlayers.schedules import LinearWarmup

SEEDS = range(3)
Make = Callable[[LinearWarmup], DistillLoss]
CLIPPED = {"beta": 2.0, "ratio_clip": 10.0}
TABLES: dict[str, dict[str, Make]] = {
    "AEKT, ten epochs of warm-up, beta=2": {
        "`DKDLoss`": lambda ramp: DKDLoss(beta=2.0, weight=1.0 * ramp),
        "`AEKTLoss(ratio_clip=10)`, weight 0.2": lambda ramp: AEKTLoss(
            **CLIPPED, weight=0.2 * ramp
        ),
        "`AEKTLoss(ratio_clip=10, gamma=0.1)`, weight 1": lambda ramp: AEKTLoss(
            **CLIPPED, gamma=0.1, weight=1.0 * ramp
        ),
        "`AEKTLoss(ratio_clip=10)`, weight 1": lambda ramp: AEKTLoss(**CLIPPED, weight=1.0 * ramp),
    },
    "Student-friendly KD": {
        "`KDLoss()`": lambda _: KDLoss(),
        "`StudentFriendlyKDLoss(simplifier_grad_scale=1 / 16)`": lambda _: StudentFriendlyKDLoss(
            simplifier_grad_scale=1 / 16
        ),
        "`StudentFriendlyKDLoss()`": lambda _: StudentFriendlyKDLoss(),
    },
}


def main() -> None:
    """Train all students of both tables and print the tables."""
    options = data.options(__doc__)
    options.set_defaults(epochs=40)
    args = options.parse_args()
    torch.set_num_threads(1)  # rounding decides which seeds fail
    images = data.load(args)
    torch.manual_seed(0)
    teacher = regnet([1, 2, 2], [32, 64, 128], len(images.classes))
    train(teacher, images.augmented, 1 if args.quick else 4)
    print(f"teacher: {accuracy(teacher, images.test):.2f} %", flush=True)
    for title, losses in TABLES.items():
        rows = []
        for name, make in losses.items():
            found = [run(make, teacher, images.first(200), args.epochs, seed) for seed in SEEDS]
            accuracies, agreements = zip(*found, strict=True)
            rows.append([name, ", ".join(accuracies), ", ".join(filter(None, agreements))])
        print(f"\n{Table(title, ('', 'test accuracy %', 'agreement at the end'), rows).markdown()}")


def run(
    make: Make, teacher: nn.Module, images: data.Images, epochs: int, seed: int
) -> tuple[str, str]:
    """Accuracy of a student, or "diverged"; and the simplifier's agreement if there is one."""
    torch.manual_seed(seed)
    student = regnet([1, 1, 2], [16, 32, 64], len(images.classes))
    ramp = LinearWarmup(max(1, epochs // 4), start=0.1, steps_per_epoch=len(images.plain) // 50)
    kd = attach_kd(student, teacher, losses=[make(ramp)], example=images.example)
    train(student, images.augmented, epochs, kd)
    if not all(value.isfinite().all() for value in student.state_dict().values()):
        return "diverged", ""
    agreement = [f"{value:.2f}" for key, value in kd.terms.items() if key.endswith("agreement")]
    kd.detach()
    return f"{accuracy(student, images.test):.1f}", "".join(agreement)


if __name__ == "__main__":
    main()
