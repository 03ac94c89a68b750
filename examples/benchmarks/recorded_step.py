"""A training step with a recorded teacher, compared with three other kinds of step.

The benchmark uses the three pairs of step.py, with KD and with letKD-1 + KD. The four kinds of step
take turns in one process:

- "student alone": cross-entropy, without distillation;
- "in memory": the teacher's tensors are in memory in float32 and are only looked up;
- "recorded": `kd.loss(y, recorded=key)` reads and checks a float16 record;
- "live teacher": the teacher runs.

Each step takes the next of a few batches. The images of all batches are in memory. The record is in
the system's file cache. On the CPU, times are those of this process (`time.process_time`) on one
thread, so that other processes disturb them less. Ratios are computed within each round.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from itertools import cycle

# Idle threads sleep instead of spinning, which makes steps ten times faster on a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch.nn.functional as F
from _cases import Case, fitted, make_networks, sgd, targets
from _tables import Report, Table, command_line, read, settings
from _timing import Step, alternate, ratio, spread
from step import CASES
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from kdlayers import KDHandle, KDLoss, KDPoint, attach_kd

BATCHES = 4
METHODS = ("KD", "letKD-1 + KD")
STUDENT, MEMORY, RECORDED, LIVE = "student alone", "in memory", "recorded", "live teacher"


def main() -> None:
    """Measure what the command line asks for."""
    parser = command_line(__doc__, rounds=30)
    parser.add_argument("--cases", nargs="+", choices=[c.networks for c in CASES.values()],
        default=[c.networks for c in CASES.values()], help="default: all")  # fmt: skip
    args = read(parser)
    if not args.threads:
        torch.set_num_threads(1)
    report = Report("recorded_step", "A training step from a record", settings(args))
    rows = []
    for pair, case in CASES.items():
        if case.networks in args.cases and (case.networks == "cifar" or not args.quick):
            for method in METHODS:
                rows += measure(report, pair, quick(case) if args.quick else case, method, args)
    columns = ("pair", "step", "ms", "of student alone", "of in memory", "of live teacher")
    note = (
        "Forward and backward of the student, the losses and SGD with momentum. *In memory*: the "
        "teacher's tensors were computed before and are in memory; *recorded*: they are read from "
        "a float16 record, and every row is checked. The images are given: loading and checking "
        "them is the data loader's work and is not measured."
    )
    report.add(Table("Recorded teachers", columns, rows, note))
    report.save(args.out)


def quick(case: Case) -> Case:
    """A small version of the case."""
    return replace(case, batch=4, size=(16, 16), templates=32, classes=10)


def measure(
    report: Report, pair: str, case: Case, method: str, args: argparse.Namespace
) -> list[list[str]]:
    """Rows of the table: the four kinds of step for a pair and a method."""
    name = f"{pair}, {method}"
    print(f"{name} ...", flush=True)
    clock = time.process_time if args.device == "cpu" else time.perf_counter
    with tempfile.TemporaryDirectory() as folder:
        steps = build(case, method, folder, args.device)
        times = alternate(steps, args.rounds, device=args.device, clock=clock)
        del steps
    report.times_ms[name] = times
    rows = []
    for variant, values in times.items():
        ratios = {other: ratio(values, times[other]) for other in (STUDENT, MEMORY, LIVE)}
        if variant == RECORDED:
            for other, found in ratios.items():
                report.compare(name, "time", RECORDED, other, found)
        cells = ["1" if other == variant else str(found) for other, found in ratios.items()]
        rows.append([name if variant == STUDENT else "", variant, str(spread(values)), *cells])
    return rows


def build(case: Case, method: str, folder: str, device: str) -> dict[str, Step]:
    """The four kinds of step; each has its own student, with the same initial weights."""
    handle = partial(attached, case, method, device)
    torch.manual_seed(0)
    _, teacher, images = make_networks(replace(case, batch=BATCHES * case.batch))
    data = TensorDataset(images, torch.arange(len(images)) % case.classes)
    teacher.eval()
    live = handle(teacher, teacher)
    recording = handle(teacher, teacher)
    record = recording.record(data, folder, views=1, batch_size=case.batch, progress=False)
    batches = [(x.to(device), y.to(device), key) for x, y, key in DataLoader(record, case.batch)]
    teacher.to(device)
    known = InMemory(teacher, case.points[1], [x for x, *_ in batches])
    memory = handle(known, teacher)

    def looked_up(number: int, y: Tensor, _: Tensor) -> Tensor:
        known.number = number
        return memory.loss(y)

    torch.manual_seed(0)
    alone = make_networks(case)[0].to(device)
    return {
        STUDENT: training_step(alone, None, lambda *_: 0.0, batches),
        MEMORY: training_step(memory.student, memory, looked_up, batches),
        RECORDED: training_step(
            recording.student, recording, lambda _, y, key: recording.loss(y, recorded=key), batches
        ),
        LIVE: training_step(live.student, live, lambda _, y, __: live.loss(y), batches),
    }


def attached(
    case: Case, method: str, device: str, teacher: nn.Module, fit_to: nn.Module
) -> KDHandle:
    """Attach a new student to ``teacher``, with targets for the features of ``fit_to``."""
    torch.manual_seed(0)
    student, _, images = make_networks(case)
    student, images = student.to(device), images.to(device)
    fit_to.to(device)
    points = []
    if method != "KD":
        states = fitted(case, fit_to, images)
        points = [KDPoint(name, targets=targets(case, state)) for name, state in states.items()]
    losses = [KDLoss(temperature=4.0)]
    return attach_kd(student, teacher, points, losses=losses, example=images[:2])


class InMemory(nn.Module):
    """A teacher whose features and logits are computed in advance, for a few batches.

    Attributes:
        number: index of the batch whose tensors the forward returns.
    """

    num_prefix_tokens = 1

    @torch.no_grad()
    def __init__(self, teacher: nn.Module, point: str, batches: list[Tensor]) -> None:
        super().__init__()
        self.number = 0
        place: nn.Module = self
        for part in point.split("."):
            place.add_module(part, nn.Identity())
            place = place.get_submodule(part)
        self.point = point
        self.register_buffer("device", torch.zeros((), device=batches[0].device))
        found: list[Tensor] = []
        hook = teacher.get_submodule(point).register_forward_hook(
            lambda *args: found.append(args[2])
        )
        self.logits = [teacher(x) for x in batches]
        hook.remove()
        self.features = found

    def forward(self, x: Tensor) -> Tensor:
        """The logits; the point's module returns the features."""
        self.get_submodule(self.point)(self.features[self.number][: len(x)])
        return self.logits[self.number][: len(x)]


def training_step(
    student: nn.Module,
    kd: KDHandle | None,
    loss: Callable[[int, Tensor, Tensor], Tensor | float],
    batches: list[tuple[Tensor, Tensor, Tensor]],
) -> Step:
    """Forward, cross-entropy, distillation, backward and SGD; each call takes the next batch."""
    optimizer = sgd([*student.parameters(), *(kd.parameters() if kd is not None else ())])
    numbers: Iterator[int] = cycle(range(len(batches)))
    student.train()

    def step() -> Tensor:
        number = next(numbers)
        x, y, key = batches[number]
        total = F.cross_entropy(student(x), y) + loss(number, y, key)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        return total.detach()

    return step


if __name__ == "__main__":
    main()
