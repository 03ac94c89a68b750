"""Writes the page on performance from the files that the benchmarks have saved.

`python examples/benchmarks/page.py docs/data/performance docs/performance.md`
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from _tables import Comparison, Table, measured_on
from _timing import Spread

INTRODUCTION = """# Performance

This page compares the cost of the library with plain implementations, with plain PyTorch and with
torchdistill, faiss and scikit-learn. The command below each table reproduces it. It measures all
rows alternately in one process, so that other load on the machine affects all rows alike.

Times are medians with quartiles in brackets. Ratios are computed within each round; the tables show
their median and quartiles over the rounds. A ratio is the library's time divided by the other's:
**below 1 the library is faster**. Memory is the peak of a step above that of the same step without
distillation: on a CPU the resident memory of a fresh process, on a GPU the sum of tensors.

*Plain* is a straightforward implementation of the same layer and loss, and *textbook* one of a loss
on logits or features. *Floor* is the same step without KD layers and loss. *Low memory* is the
library with `memory="low"`.

We had no GPU. All scripts except `fit.py` accept `--device cuda`, but none has run on a GPU yet.

This page is written by `python examples/benchmarks/page.py docs/data/performance
docs/performance.md`."""

# The aims: benchmark, start of the case's name, quantity, alternative, and the largest ratio.
TARGETS = (
    ("KD part of the first pair: three times as fast as plain",
     "step", "KD part: CIFAR", "time", "plain", 1 / 3),
    ("KD part of the first pair: a third of plain's extra memory, a tenth with low memory",
     "step", "KD part: CIFAR", "memory", "plain", 0.1),
    ("A step with a loss on logits: 1.02 of a step without the loss",
     "losses", "step:", "time", "floor", 1.02),
    ("A step from a record: 1.10 of the same step with the teacher's tensors in memory",
     "recorded_step", "", "time", "in memory", 1.1),
    ("A loss on logits: no slower than torchdistill's",
     "losses", "", "time", "torchdistill", 1.0),
    ("Fitting a codebook, CPU time: no more than faiss over all rows",
     "fit", "", "CPU time", "faiss, all rows", 1.0),
    ("Fitting a codebook, CPU time: no more than faiss with 256 rows a centre",
     "fit", "", "CPU time", "faiss, 256 rows a centre", 1.0),
    ("Fitting a codebook, CPU time: no more than MiniBatchKMeans",
     "fit", "", "CPU time", "scikit-learn MiniBatchKMeans", 1.0),
    ("A folded layer: 1.1 of two convolutions of its size",
     "inference", "", "time", "two convolutions", 1.1),
)  # fmt: skip


def main() -> None:
    """Read the files and write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="folder with the *.json files")
    parser.add_argument("page", type=Path, help="Markdown file to write")
    args = parser.parse_args()
    files = sorted(args.data.glob("*.json"), key=order)
    if not files:
        raise SystemExit(f"no *.json in {args.data}; run the benchmarks with --out {args.data}")
    args.page.write_text(page([json.loads(file.read_text("utf-8")) for file in files]), "utf-8")
    print(f"{args.page} written from {', '.join(file.name for file in files)}")


def order(file: Path) -> tuple[int, str]:
    """The sort key of a file, which puts training steps first."""
    names = ("step", "recorded_step", "losses", "fit", "scale", "inference")
    name = file.stem.split("-")[0]
    return names.index(name) if name in names else len(names), file.stem


def page(reports: list[dict]) -> str:
    """The text of the page."""
    parts = [INTRODUCTION, reached(reports), slower(reports)]
    last = ""
    for report in reports:
        title = report["title"] + (" (GPU)" if report["machine"]["gpu"] else "")
        if title != last:
            parts.append(f"## {title}")
        last = title
        parts += [Table(**table).markdown(level=3) for table in report["tables"]]
        parts.append(f"`{command(report)}`  \n{measured_on(report['machine'])}")
    return "\n\n".join(parts) + "\n"


def command(report: dict) -> str:
    """The command that repeats the measurement."""
    options = report["settings"]["options"]
    return f"python examples/benchmarks/{report['benchmark']}.py {options}".strip()


def reached(reports: list[dict]) -> str:
    """The section on the aims and the measured ratios."""
    rows = []
    for text, benchmark, case, quantity, alternative, limit in TARGETS:
        found = [
            comparison.ratio
            for report in reports
            if report["benchmark"] == benchmark
            for comparison in map(to_comparison, report["comparisons"])
            if comparison.case.startswith(case)
            and (comparison.quantity, comparison.alternative) == (quantity, alternative)
        ]
        if found:
            medians = sorted(ratio.middle for ratio in found)
            shown = f"{medians[0]:.2f}" + (f" to {medians[-1]:.2f}" if len(found) > 1 else "")
            rows.append([text, f"{limit:.2f}", shown, verdict(found, limit)])
    columns = ("aim", "largest ratio", "medians measured", "")
    note = (
        "Reached: the upper quartile of every comparison is within the aim. Missed: the lower "
        "quartile of at least one is above it. Undecided: neither. Fits are compared by CPU time, "
        "even if their inertia differs; their tables also show the inertia and the elapsed time."
    )
    return Table("Aims", columns, rows, note).markdown()


def verdict(ratios: list[Spread], limit: float) -> str:
    """The verdict on the ratios of one aim."""
    if all(ratio.high <= limit for ratio in ratios):
        return "reached"
    missed = sum(ratio.low > limit for ratio in ratios)
    return f"missed in {missed} of {len(ratios)}" if missed else "undecided"


def slower(reports: list[dict]) -> str:
    """The section on better alternatives, without steps that do not distil: they always win."""
    rows = [
        (comparison, report)
        for report in reports
        for comparison in map(to_comparison, report["comparisons"])
        if comparison.ratio.low > 1
        and comparison.alternative not in ("floor", "student", "student alone", "in memory")
    ]
    if not rows:
        return (
            "## Where an alternative is better\n\nNowhere in these tables: no ratio to an "
            "alternative has a lower quartile above 1."
        )
    cells = [
        (c.case + (" (GPU)" if report["machine"]["gpu"] else ""),
         c.quantity, c.ours, c.alternative, str(c.ratio))
        for c, report in sorted(rows, key=lambda row: -row[0].ratio.middle)
    ]  # fmt: skip
    columns = ("case", "quantity", "ours", "better", "ours / theirs")
    note = (
        "All comparisons whose lower quartile is above 1, the worst first. Fits are included "
        "even if their inertia differs."
    )
    return Table("Where an alternative is better", columns, cells, note).markdown()


def to_comparison(saved: dict) -> Comparison:
    """Restore a comparison from its saved form."""
    return Comparison(**saved | {"ratio": Spread(**saved["ratio"])})


if __name__ == "__main__":
    main()
