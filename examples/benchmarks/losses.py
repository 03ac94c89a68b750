"""Losses, compared with their plain formulas, with torchdistill and with a step without them.

Each loss is measured alone and in a training step. Alone means forward and backward on given logits
or features, including the loss's own layers. A training step means forward of student and teacher,
backward and SGD; it is compared with the same step without a distillation loss. All variants take
turns in one process. Ratios are computed within each round.

torchdistill takes part where it has the same loss (`pip install torchdistill`).
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from functools import partial

# Idle threads sleep instead of spinning, which makes steps ten times faster on a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import _textbook as textbook
import _textbook_relations as relations
import torch
from _cases import Case, add_losses, make_networks, run_teacher, sgd, training_step
from _tables import Report, Table, command_line, read, settings
from _timing import Step, alternate, ratio, spread
from _torchdistill import torchdistill_losses
from torch import Tensor, nn

import kdlayers
from kdlayers import (
    AEKTLoss,
    ChannelWiseLoss,
    DISTLoss,
    DKDLoss,
    FeatureLoss,
    KDLoss,
    MutualLoss,
    RKDLoss,
    SimilarityPreservingLoss,
    StudentFriendlyKDLoss,
)

FORMS = ("chi2", "ratio_sq", "ratio", "is")


class OnEveryPixel(KDLoss):
    """Class maps without labels, so that every pixel counts."""

    def forward(self, student: Tensor, teacher: Tensor, targets: Tensor | None = None) -> Tensor:  # noqa: ARG002
        """The divergence at every pixel."""
        return super().forward(student, teacher)


# The library's loss, and a function that makes the textbook's loss for a number of classes.
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
    "KD, standardised": (partial(KDLoss, standardize=True), lambda _: textbook.standardized_kd),
    "DIST": (DISTLoss, lambda _: relations.dist),
}
# The same for features or class maps, with their shape and a small one.
FEATURES: dict[str, tuple[Callable[[], nn.Module], Callable, tuple[int, ...], tuple[int, ...]]] = {
    "RKD": (RKDLoss, relations.rkd, (64, 512), (4, 8)),
    "similarity-preserving": (
        SimilarityPreservingLoss,
        relations.similarity,
        (64, 128, 8, 8),
        (4, 3, 2, 2),
    ),
    "channel-wise": (ChannelWiseLoss, relations.channelwise, (8, 21, 64, 64), (2, 3, 4, 4)),
    "KD on class maps": (OnEveryPixel, relations.pixels, (8, 21, 64, 64), (2, 3, 4, 4)),
    "FeatureLoss, cosine": (
        partial(FeatureLoss, projector=None),
        relations.cosine,
        (64, 128, 8, 8),
        (4, 3, 2, 2),
    ),
    "FeatureLoss, mse": (
        partial(FeatureLoss, projector=None, distance="mse"),
        relations.mse,
        (64, 128, 8, 8),
        (4, 3, 2, 2),
    ),
}
AGAIN = "none, once more"
SHAPES = ((64, 100), (256, 1000))
COLUMNS = ("kdlayers, ms", "of the textbook's", "of torchdistill's")


def main() -> None:
    """Measure what the command line asks for."""
    args = read(command_line(__doc__, rounds=25))
    report = Report("losses", "Losses on logits and features", settings(args))
    for shape in ((8, 10),) if args.quick else SHAPES:
        alone(report, shape, args)
    on_features(report, args)
    whole_step(report, args)
    report.save(args.out)


def alone(report: Report, shape: tuple[int, int], args: argparse.Namespace) -> None:
    """Compare the losses on logits [B, K] with the textbook's and torchdistill's."""
    rows = []
    for name, (ours, theirs) in LOSSES.items():
        key = f"{name}, logits {shape[0]}x{shape[1]}"
        losses = {"kdlayers": ours(), "textbook": theirs(shape[1])}
        rows.append([name, *compared(report, name, key, losses, shape, args)])
    title = f"The loss alone, {shape[0]} samples of {shape[1]} classes"
    note = "Forward and backward to the student's logits and to the loss's own parameters."
    report.add(Table(title, ("loss", *COLUMNS), rows, note))


def on_features(report: Report, args: argparse.Namespace) -> None:
    """Compare the losses on features or class maps with the textbook's and torchdistill's."""
    rows = []
    for name, (ours, theirs, whole, small) in FEATURES.items():
        shape = small if args.quick else whole
        size = "x".join(map(str, shape))
        losses = {"kdlayers": ours(), "textbook": theirs}
        key = f"{name}, features {size}"
        rows.append([name, size, *compared(report, name, key, losses, shape, args)])
    note = "Forward and backward to the student's features or class maps."
    report.add(Table("The loss alone, on features", ("loss", "shape", *COLUMNS), rows, note))


def compared(
    report: Report,
    name: str,
    key: str,
    losses: dict[str, Callable],
    shape: tuple[int, ...],
    args: argparse.Namespace,
) -> list[str]:
    """Cells of a row: our time, and our time divided by the others'."""
    found = torchdistill_losses().get(name)
    losses = losses if found is None else {**losses, "torchdistill": found}
    # All read the same tensors, because times depend on where tensors lie in memory.
    given = inputs(shape, args.device)
    steps = {variant: on_logits(loss, *given) for variant, loss in losses.items()}
    times = report.times_ms[key] = alternate(steps, args.rounds, device=args.device)
    cells = [f"{spread(times['kdlayers'])}"]
    for other in ("textbook", "torchdistill"):
        text = "-"
        if other in times:
            slower = ratio(times["kdlayers"], times[other])
            text = report.compare(key, "time", "kdlayers", other, slower)
        cells.append(text)
    return cells


def inputs(shape: tuple[int, ...], device: str) -> tuple[Tensor, Tensor, Tensor]:
    """Logits or features of the student and of the teacher, and labels."""
    torch.manual_seed(0)
    student = (2 * torch.randn(shape, device=device)).requires_grad_()
    teacher, labels = 4 * torch.randn(shape, device=device), torch.arange(shape[0], device=device)
    return student, teacher, labels % shape[1]


def on_logits(
    loss: Callable[..., Tensor], student: Tensor, teacher: Tensor, labels: Tensor
) -> Step:
    """Forward and backward of a loss on fixed logits or features."""
    if isinstance(loss, nn.Module):
        if hasattr(loss, "build"):
            loss.build(student, teacher)
        loss.to(student.device)
    parameters = [student, *(loss.parameters() if isinstance(loss, nn.Module) else [])]

    def step() -> None:
        loss(student, teacher, labels).backward()
        for parameter in parameters:
            parameter.grad = None

    return step


def whole_step(report: Report, args: argparse.Namespace) -> None:
    """Compare a training step with each loss with the same step without a loss."""
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
        "last row repeats the first one; the difference between them is noise."
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
    if not torchdistill_losses():
        print("torchdistill is not installed and was skipped: pip install torchdistill")
