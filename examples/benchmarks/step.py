"""letKD in a training step: the library compared with a straightforward implementation.

Measures whole steps of student and teacher (forward, backward, SGD). Also measures the KD part
alone, on given features without a network: layers, the teacher's targets, loss and backward.
`floor` is the same step without a KD layer or loss; `plain` is the implementation in _plain.py. All
variants take turns in one process; memory is measured in fresh processes. Ratios are computed
within each round; the tables show their median and quartiles.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import replace

# Idle threads sleep instead of spinning, which makes steps ten times faster on a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from _cases import VARIANTS, Case, build
from _tables import Report, Table, command_line, read, settings
from _timing import alternate, difference, digits, peak_memory, ratio, spread

CASES = {
    "CIFAR ResNet-56 to ResNet-20": Case(
        "cifar", 64, (32, 32), 64, 64, 4096, points=("layer3.0", "layer3")
    ),
    "ResNet-34 to ResNet-18": Case(
        "resnet", 32, (224, 224), 512, 512, 4096, points=("layer4.0", "layer4")
    ),
    "ViT-small to ViT-tiny": Case(
        "vit", 32, (224, 224), 192, 384, 1024, points=("blocks.10", "blocks.11")
    ),
}
FEATURES = {"cifar": (8, 8), "resnet": (7, 7), "vit": (196,)}
OURS = VARIANTS[2:]


def main() -> None:
    """Measure what the command line asks for."""
    parser = command_line(__doc__, rounds=9)
    parser.add_argument("--cases", nargs="+", choices=[c.networks for c in CASES.values()],
        default=[c.networks for c in CASES.values()], help="default: all")  # fmt: skip
    parser.add_argument("--part", choices=("both", "alone", "step"), default="both",
        help="the KD part alone, whole steps, or both (default)")  # fmt: skip
    args = read(parser)
    report = Report("step", "letKD in a training step", settings(args))
    cases = {name: case for name, case in chosen(args).items() if case.networks in args.cases}
    if args.part != "step":
        kd_part(report, {name: alone(case) for name, case in cases.items()}, args)
    if args.part != "alone":
        whole_step(report, cases, args)
    report.save(args.out)


def chosen(args: argparse.Namespace) -> dict[str, Case]:
    """Each pair with a KD layer at one point (letKD-1) and at two points (letKD-2)."""
    cases = {
        f"{name}, letKD-{layers}": replace(case, layers=layers)
        for name, case in CASES.items()
        for layers in (1, 2)
    }
    if args.quick:
        return {
            name: replace(case, batch=4, size=(16, 16), templates=32, classes=10)
            for name, case in cases.items()
            if case.networks == "cifar"
        }
    return cases


def alone(case: Case) -> Case:
    """The case with the same layers on given features."""
    size = (4, 4) if case.size == (16, 16) else FEATURES[case.networks]
    return replace(case, networks=None, size=size, points=("first", "last"))


def measure(report: Report, name: str, case: Case, args: argparse.Namespace) -> None:
    """Measure time and memory of all variants of a case."""
    print(f"{name} ...", flush=True)
    steps = {variant: build(case, variant, args.device) for variant in VARIANTS}
    report.times_ms[name] = alternate(steps, args.rounds, device=args.device)
    del steps
    if not args.no_memory:
        report.memory_mib[name] = {
            variant: peak_memory(build, case, variant, args.device, device=args.device)
            for variant in VARIANTS
        }


def kd_part(report: Report, cases: dict[str, Case], args: argparse.Namespace) -> None:
    """The main comparison: layers and loss on given features."""
    rows = []
    for pair, case in cases.items():
        name = f"KD part: {pair}"
        measure(report, name, case, args)
        times = report.times_ms[name]
        rows.append([pair, "plain", f"{spread(times['plain'])}", "1", *memory(report, name)])
        for ours in OURS:
            against = ratio(times[ours], times["plain"])
            text = report.compare(name, "time", ours, "plain", against)
            rows.append(["", ours, f"{spread(times[ours])}", text, *memory(report, name, ours)])
    columns = ("pair", "variant", "ms", "of plain", "extra MiB", "of plain")
    note = (
        "Forward of the KD layers, the teacher's targets, the loss and the backward, on random "
        "features that a linear classifier follows. Extra memory: the peak minus that of the same "
        "step without KD layers and loss."
    )
    report.add(Table("The KD part alone", columns, rows, note))


def memory(report: Report, name: str, ours: str | None = None) -> tuple[str, str]:
    """MiB above the floor, and their ratio to those of the plain version."""
    peaks = report.memory_mib.get(name, {})
    floor, plain = peaks.get("floor"), peaks.get("plain")
    if floor is None or plain is None:
        return "-", "-"
    if ours is None:
        return digits(plain - floor), "1"
    extra = peaks[ours] - floor
    if plain <= floor:  # tiny sizes: too small to be seen in the peak
        return digits(extra), "-"
    return digits(extra), report.compare(name, "memory", ours, "plain", extra / (plain - floor))


def whole_step(report: Report, cases: dict[str, Case], args: argparse.Namespace) -> None:
    """Measure whole steps: student and teacher, forward, backward and SGD."""
    rows = []
    for pair, case in cases.items():
        name = f"step: {pair}"
        measure(report, name, case, args)
        times = report.times_ms[name]
        floor = times["floor"]
        rows.append([pair, "floor", f"{spread(floor)}", "1", "", "", ""])
        for variant in VARIANTS[1:]:
            ours = None if variant == "plain" else variant
            slower = ratio(times[variant], floor)
            text = f"{slower}" if ours is None else report.compare(
                name, "time", variant, "floor", slower)  # fmt: skip
            part = spread(difference(times[variant], floor))
            if ours is not None:
                report.compare(name, "time", ours, "plain", ratio(times[ours], times["plain"]))
            cells = [f"{spread(times[variant])}", text, f"{part}", *memory(report, name, ours)]
            rows.append(["", variant, *cells])
    columns = ("pair", "variant", "ms", "of floor", "ms above floor", "extra MiB", "of plain")
    note = "Student and teacher on random images, cross-entropy, backward, SGD with momentum."
    report.add(Table("Whole steps", columns, rows, note))


if __name__ == "__main__":
    main()
