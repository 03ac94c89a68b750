"""The overhead of the library in a training step, apart from the work that the method needs anyway.

Times `student(x)` + `kd.loss(y)` + backward on a network so small that the time in Python matters.
The same step is written by hand for comparison: with `KDLoss`, and with letKD-1 (the layer and its
loss are written out in _plain.py). The steps take turns in one process. Ratios are computed within
each round; the table shows their median and quartiles. "by hand, again" repeats the first step; its
difference to that step is noise. On the CPU, times are those of this process (`time.process_time`)
on one thread, so that other processes disturb them less.
"""

from __future__ import annotations

import argparse
import os
import time

# Idle threads sleep instead of spinning, which makes steps ten times faster on a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch.nn.functional as F
from _plain import PlainKD, PlainLayer
from _tables import Report, Table, command_line, read, settings
from _timing import Step, alternate, difference, ratio, spread
from torch import Tensor, nn

from kdlayers import CodebookTargets, KDLayer, KDLoss, KDPoint, attach_kd

CLASSES, TEMPLATES, T = 10, 64, 4.0
AGAIN = "by hand, again"


def main() -> None:
    """Measure both methods."""
    args = read(command_line(__doc__, rounds=300))
    if not args.threads:
        torch.set_num_threads(1)
    report = Report("overhead", "What the library adds to a trivial step", settings(args))
    rows = []
    for name, make in {"KDLoss": kd_loss, "letKD-1": letkd}.items():
        rows += measure(report, name, make(args), args)
    columns = ("method", "step", "ms", "of the step by hand", "ms above it")
    note = (
        "Forward of student and teacher, the distillation loss and its backward; 32 images of "
        "16x16 pixels; each network has two convolutions."
    )
    report.add(Table("What the library adds", columns, rows, note))
    report.save(args.out)


def measure(
    report: Report, name: str, steps: dict[str, Step], args: argparse.Namespace
) -> list[list[str]]:
    """Rows of the table: the step by hand, the library's step, and the step by hand again."""
    clock = time.process_time if args.device == "cpu" else time.perf_counter
    times = alternate(steps, args.rounds, least=0.004, device=args.device, clock=clock)
    report.times_ms[name] = times
    by_hand = times["by hand"]
    rows = [[name, "by hand", f"{spread(by_hand)}", "1", ""]]
    for other in ("kdlayers", AGAIN):
        text = f"{ratio(times[other], by_hand)}"
        if other == "kdlayers":
            report.compare(name, "time", other, "by hand", ratio(times[other], by_hand))
        above = spread(difference(times[other], by_hand))
        rows.append(["", other, f"{spread(times[other])}", text, f"{above}"])
    return rows


class Tiny(nn.Module):
    """Two convolutions and a linear classifier, so that student and teacher do little work."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.first = nn.Sequential(nn.Conv2d(3, 8, 3, 2, padding=1), nn.ReLU())
        self.last = nn.Sequential(nn.Conv2d(8, channels, 3, 2, padding=1), nn.ReLU())
        self.fc = nn.Linear(channels, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of images."""
        return self.fc(self.last(self.first(x)).mean((2, 3)))


def networks(device: str) -> tuple[nn.Module, nn.Module, Tensor, Tensor]:
    """Student, teacher, images and labels; every call returns the same ones."""
    torch.manual_seed(0)
    student, teacher = Tiny(16).to(device), Tiny(32).to(device).eval()
    images = torch.randn(32, 3, 16, 16, device=device)
    return student, teacher, images, torch.arange(32, device=device) % CLASSES


def kd_loss(args: argparse.Namespace) -> dict[str, Step]:
    """Distillation of logits, which is one line by hand."""

    def by_hand() -> Step:
        student, teacher, x, _ = networks(args.device)

        def step() -> None:
            logits = student(x)
            with torch.no_grad():
                theirs = teacher(x)
            loss = T**2 * F.kl_div(
                F.log_softmax(logits / T, dim=1),
                F.log_softmax(theirs / T, dim=1),
                reduction="batchmean",
                log_target=True,
            )
            backward(loss, student)

        return step

    student, teacher, x, y = networks(args.device)
    kd = attach_kd(student, teacher, losses=[KDLoss(temperature=T)], example=x[:2])

    def step() -> None:
        student(x)
        backward(kd.loss(y), student)

    return {"by hand": by_hand(), "kdlayers": step, AGAIN: by_hand()}


def letkd(args: argparse.Namespace) -> dict[str, Step]:
    """One KD layer with a codebook; by hand, the same layer, targets and loss with hooks."""
    centers = torch.randn(TEMPLATES, 32, generator=torch.Generator().manual_seed(1)).abs()
    state = {
        "centers": centers.to(args.device),
        "counts": torch.ones(TEMPLATES, dtype=torch.long, device=args.device),
        "inertia": torch.zeros((), device=args.device),
    }

    def by_hand() -> Step:
        student, teacher, x, y = networks(args.device)
        kd = PlainKD(student, teacher, {"last": (16, state)})
        copy_weights(kd.layers[0], attached.layers["last"])

        def step() -> None:
            student(x)
            backward(kd.loss(x, y), student, kd.layers)

        return step

    student, teacher, x, y = networks(args.device)
    targets = CodebookTargets(TEMPLATES)
    targets.load_state_dict(state)
    attached = attach_kd(student, teacher, [KDPoint("last", targets=targets)], example=x[:2])

    def step() -> None:
        student(x)
        backward(attached.loss(y), student)

    return {"by hand": by_hand(), "kdlayers": step, AGAIN: by_hand()}


@torch.no_grad()
def copy_weights(plain: PlainLayer, layer: KDLayer) -> None:
    """Copy the library's weights into the layer written by hand."""
    plain.templates.copy_(layer.head.weight)
    plain.template_scale.copy_(layer.head.scale)
    plain.values.copy_(layer.value.weight)
    plain.value_scale.copy_(layer.value.scale)


def backward(loss: Tensor, *modules: nn.Module) -> None:
    """Run backward and clear the gradients for the next step."""
    loss.backward()
    for module in modules:
        module.zero_grad(set_to_none=True)


if __name__ == "__main__":
    main()
