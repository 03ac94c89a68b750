"""Losses on the logits: against the same formulas written down, torchdistill's, and a bare step.

Alone: forward and backward of the loss on given logits, also of its own layers if it has any. In a
step: student and teacher, forward, backward and SGD, against the same step without a distillation
loss. All variants take turns in one process; ratios are taken round by round.

torchdistill is compared where it has the same loss (`pip install torchdistill`).
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from functools import partial

# Idle threads sleep instead of spinning: on a busy machine steps are ten times faster.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import _textbook as textbook
import torch
from _cases import Case, add_losses, make_networks, run_teacher, sgd, training_step
from _tables import Report, Table, command_line, read, settings
from _timing import Step, alternate, ratio, spread
from torch import Tensor, nn

import kdlayers
from kdlayers import AEKTLoss, DKDLoss, KDLoss, MutualLoss, StudentFriendlyKDLoss

FORMS = ("chi2", "ratio_sq", "ratio", "is")
# The library's loss, and the textbook's for a number of classes.
LOSSES: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Callable]]] = {
    "KD": (KDLoss, lambda _: textbook.kd),
    "DKD": (DKDLoss, lambda _: textbook.dkd),
    **{
        f"AEKT {form}": (
            partial(AEKTLoss, form=form, alpha=1.0, beta=8.0, gamma=1.0),
            partial(textbook.AEKT, form=form),
        )
        for form in FORMS
    },
    "student-friendly KD": (StudentFriendlyKDLoss, textbook.StudentFriendly),
    "mutual": (MutualLoss, lambda _: textbook.mutual),
}
AGAIN = "none, once more"
SHAPES = ((64, 100), (256, 1000))


def main() -> None:
    """Measure what the command line asks for."""
    args = read(command_line(__doc__, rounds=25))
    report = Report("losses", "Losses on the logits", settings(args))
    for shape in ((8, 10),) if args.quick else SHAPES:
        alone(report, shape, args)
    whole_step(report, args)
    report.save(args.out)


def alone(report: Report, shape: tuple[int, int], args: argparse.Namespace) -> None:
    """Forward and backward on logits [B, K], against the textbook's and torchdistill's."""
    rows = []
    for name, (ours, theirs) in LOSSES.items():
        key = f"{name}, logits {shape[0]}x{shape[1]}"
        losses = {"kdlayers": ours(), "textbook": theirs(shape[1])}
        if name in ("KD", "mutual") and (found := torchdistill_kd(ours().temperature)):
            losses["torchdistill"] = found
        steps = {variant: on_logits(loss, shape, args.device) for variant, loss in losses.items()}
        times = report.times_ms[key] = alternate(steps, args.rounds, device=args.device)
        cells = [name, f"{spread(times['kdlayers'])}"]
        for other in ("textbook", "torchdistill"):
            text = "-"
            if other in times:
                slower = ratio(times["kdlayers"], times[other])
                text = report.compare(key, "time", "kdlayers", other, slower)
            cells.append(text)
        rows.append(cells)
    title = f"The loss alone, {shape[0]} samples of {shape[1]} classes"
    columns = ("loss", "kdlayers, ms", "of the textbook's", "of torchdistill's")
    note = "Forward and backward to the student's logits and to the loss's own parameters."
    report.add(Table(title, columns, rows, note))


def on_logits(loss: Callable[..., Tensor], shape: tuple[int, int], device: str) -> Step:
    """Forward and backward of a loss on fixed logits."""
    torch.manual_seed(0)
    student = (2 * torch.randn(shape, device=device)).requires_grad_()
    teacher, labels = 4 * torch.randn(shape, device=device), torch.arange(shape[0], device=device)
    labels = labels % shape[1]
    if isinstance(loss, nn.Module):
        if hasattr(loss, "build"):
            loss.build(student, teacher)
        loss.to(device)
    parameters = [student, *(loss.parameters() if isinstance(loss, nn.Module) else [])]

    def step() -> None:
        loss(student, teacher, labels).backward()
        for parameter in parameters:
            parameter.grad = None

    return step


def torchdistill_kd(temperature: float) -> Callable[..., Tensor] | None:
    """The loss of torchdistill with the arguments in our order, or None if it is not installed."""
    try:
        from torchdistill.losses.mid_level import KDLoss as TheirLoss
    except ImportError:
        return None
    loss = TheirLoss("out", "output", "out", "output", temperature, alpha=0.0)  # no cross-entropy

    def call(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        return loss({"out": {"output": student}}, {"out": {"output": teacher}}, labels)

    return call


def whole_step(report: Report, args: argparse.Namespace) -> None:
    """Student and teacher with each loss, against the two without any."""
    size = (4, (8, 8), 10) if args.quick else (64, (32, 32), 100)
    batch, pixels, classes = size
    case = Case("cifar", batch, pixels, 64, 64, 0, classes)
    steps = {"floor": in_step(case, None, args.device)}
    steps |= {name: in_step(case, ours, args.device) for name, (ours, _) in LOSSES.items()}
    steps[AGAIN] = in_step(case, None, args.device)
    key = "step: CIFAR ResNet-56 to ResNet-20"
    times = report.times_ms[key] = alternate(steps, args.rounds, device=args.device)
    rows = [["none", f"{spread(times['floor'])}", "1"]]
    for name in LOSSES:
        slower = ratio(times[name], times["floor"])
        text = report.compare(f"{key}, {name}", "time", "kdlayers", "floor", slower)
        rows.append([name, f"{spread(times[name])}", text])
    noise = ratio(times[AGAIN], times["floor"])
    rows.append([AGAIN, f"{spread(times[AGAIN])}", f"{noise}"])
    note = (
        f"ResNet-56 teaches ResNet-20, {batch} images of {pixels[0]}x{pixels[1]}: both forwards, "
        "cross-entropy, backward and SGD. Mutual learning: one of the two steps. The "
        "last row is the first once more: what differs there is noise."
    )
    report.add(Table("A whole step", ("loss", "ms", "of a step without"), rows, note))


def in_step(case: Case, loss: Callable[[], kdlayers.DistillLoss] | None, device: str) -> Step:
    """A training step with a loss of the library, or without one."""
    torch.manual_seed(0)
    student, teacher, images = (part.to(device) for part in make_networks(case))
    teacher.eval()
    labels = torch.arange(case.batch, device=device) % case.classes
    term, added = run_teacher(teacher), []
    if loss is not None:
        term, added = add_losses([loss()], student, teacher, images)
    optimizer = sgd([*student.parameters(), *added])
    return training_step(student, term, images, labels, optimizer, added)


if __name__ == "__main__":
    main()
    if torchdistill_kd(1.0) is None:
        print("torchdistill was left out: pip install torchdistill")
