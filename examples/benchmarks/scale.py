"""How time and memory of the KD part grow with the number of templates, positions and channels.

One size is varied at a time, and the others stay the same. The exponent e in time or memory =
constant * size ** e is fitted by least squares of the logarithms. Fixed costs, which matter at the
smallest sizes, make it smaller.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import replace

# Idle threads sleep instead of spinning, which makes steps ten times faster on a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from _cases import VARIANTS, Case, build
from _tables import Report, Table, command_line, read, settings
from _timing import alternate, digits, exponent, peak_memory, spread

BASE = Case(None, 32, (8, 8), 64, 64, 1024)
SIZES = {
    "templates": (256, 1024, 4096, 16384),
    "positions": (256, 1024, 4096, 16384),
    "channels": (32, 128, 512, 1024),
}
QUICK = {"templates": (16, 64), "positions": (128, 512), "channels": (8, 32)}
OURS = tuple(variant for variant in VARIANTS if variant not in ("floor", "plain"))


def main() -> None:
    """Measure what the command line asks for."""
    args = read(command_line(__doc__, rounds=5))
    report = Report("scale", "How the KD part grows", settings(args))
    base = replace(BASE, batch=2, templates=32) if args.quick else BASE
    for what, sizes in (QUICK if args.quick else SIZES).items():
        grow(report, what, {size: sized(base, what, size) for size in sizes}, args)
    report.save(args.out)


def sized(case: Case, what: str, size: int) -> Case:
    """The case with one size changed. The number of images changes the number of positions."""
    if what == "positions":
        return replace(case, batch=size // (case.size[0] * case.size[1]))
    if what == "channels":
        return replace(case, channels=size, teacher_channels=size)
    return replace(case, templates=size)


def grow(report: Report, what: str, cases: dict[int, Case], args: argparse.Namespace) -> None:
    """Measure one growing size and add its table."""
    for size, case in cases.items():
        print(f"{what} {size} ...", flush=True)
        measure(report, f"{what} {size}", case, args)
    rows = []
    for variant in OURS:
        times = {size: spread(report.times_ms[f"{what} {size}"][variant]) for size in cases}
        fit = exponent(list(times), [time.middle for time in times.values()])
        rows.append(
            [variant, "ms", *(digits(time.middle) for time in times.values()), f"{fit:.2f}"]
        )
        extra = {size: above_floor(report, f"{what} {size}", variant) for size in cases}
        known = {size: value for size, value in extra.items() if value is not None and value > 0}
        fitted = f"{exponent(list(known), list(known.values())):.2f}" if len(known) > 1 else "-"
        cells = ["-" if value is None else digits(value) for value in extra.values()]
        rows.append(["", "extra MiB", *cells, fitted])
    case = next(iter(cases.values()))
    fixed = {
        "templates": f"{case.templates} templates",
        "positions": f"{case.batch * case.size[0] * case.size[1]} positions",
        "channels": f"{case.channels} channels",
    }
    others = ", ".join(text for name, text in fixed.items() if name != what)
    columns = ("variant", "", *map(str, cases), "exponent")
    report.add(Table(f"Number of {what}", columns, rows, f"With {others}."))


def measure(report: Report, name: str, case: Case, args: argparse.Namespace) -> None:
    """Measure time and memory of the library's variants and of the floor."""
    variants = ("floor", *OURS)
    steps = {variant: build(case, variant, args.device) for variant in variants}
    report.times_ms[name] = alternate(steps, args.rounds, device=args.device)
    del steps
    if not args.no_memory:
        report.memory_mib[name] = {
            variant: peak_memory(build, case, variant, args.device, device=args.device)
            for variant in variants
        }


def above_floor(report: Report, name: str, variant: str) -> float | None:
    """MiB that the KD part adds to the peak."""
    peaks = report.memory_mib.get(name, {})
    if peaks.get("floor") is None:
        return None
    return peaks[variant] - peaks["floor"]


if __name__ == "__main__":
    main()
