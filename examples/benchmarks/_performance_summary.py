"""The first page on performance: what distillation costs, the aims, and better alternatives."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from _tables import Comparison, Table
from _timing import Spread, ratio

# The pairs of step.py and recorded_step.py. The part after "to" begins the cases of inference.py.
PAIRS = ("CIFAR ResNet-56 to ResNet-20", "ResNet-34 to ResNet-18", "ViT-small to ViT-tiny")

# What is done, benchmark, start of the case's name, variant, and the variant it is divided by.
COSTS = (
    ("train with KD", "recorded_step", "{pair}, KD", "live teacher", "student alone"),
    ("train with KD, recorded teacher", "recorded_step", "{pair}, KD", "recorded", "student alone"),
    ("train with letKD-1 and KD",
     "recorded_step", "{pair}, letKD-1 + KD", "live teacher", "student alone"),
    ("train with letKD-1 and KD, recorded teacher",
     "recorded_step", "{pair}, letKD-1 + KD", "recorded", "student alone"),
    ("inference with the two layers of letKD-2",
     "inference", "{student}, ", "with KD layers", "student"),
    ("the same, folded", "inference", "{student}, ", "folded", "student"),
)  # fmt: skip

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


def costs(reports: Sequence[dict]) -> str:
    """The section on what distillation costs, with a column for each pair of networks."""
    times = {
        report["benchmark"]: report["times_ms"]
        for report in reports
        if not report["machine"]["gpu"]
    }
    rows = []
    for text, benchmark, case, variant, alone in COSTS:
        cells = [cost(times.get(benchmark, {}), case, pair, variant, alone) for pair in PAIRS]
        if any(cells):
            rows.append([text, *(cell or "not measured" for cell in cells)])
    if not rows:
        return ""
    note = (
        "Time divided by that of the student alone, without a teacher and without layers. The "
        "inference rows have batches of 64 images. A KD layer has the default of 4,096 templates, "
        "or 1,024 with the ViTs. Its multiply-adds are proportional to that number."
    )
    return Table("What it costs", ("", *PAIRS), rows, note).markdown()


def cost(
    times: Mapping[str, Mapping[str, list[float]]], case: str, pair: str, variant: str, alone: str
) -> str:
    """The ratio of two variants; empty if it was not measured. Of several batches, the last."""
    start = case.format(pair=pair, student=pair.rpartition(" to ")[2])
    found = [by_variant for name, by_variant in times.items() if name.startswith(start)]
    return str(ratio(found[-1][variant], found[-1][alone])) if found else ""


def reached(reports: Sequence[dict]) -> str:
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
            medians = sorted(spread.middle for spread in found)
            shown = f"{medians[0]:.2f}" + (f" to {medians[-1]:.2f}" if len(found) > 1 else "")
            rows.append([text, f"{limit:.2f}", shown, verdict(found, limit)])
    columns = ("aim", "largest ratio", "medians measured", "")
    note = (
        "Reached: the upper quartile of every comparison is within the aim. Missed: the lower "
        "quartile of at least one is above it. Undecided: neither. Fits are compared by CPU time, "
        "even if their inertia differs; their tables also show the inertia and the elapsed time."
    )
    return Table("Aims", columns, rows, note).markdown()


def verdict(ratios: Sequence[Spread], limit: float) -> str:
    """The verdict on the ratios of one aim."""
    if all(spread.high <= limit for spread in ratios):
        return "reached"
    missed = sum(spread.low > limit for spread in ratios)
    return f"missed in {missed} of {len(ratios)}" if missed else "undecided"


def slower(reports: Sequence[dict]) -> str:
    """The table of better alternatives, without steps that do not distil: they always win."""
    rows = [
        (comparison, report)
        for report in reports
        for comparison in map(to_comparison, report["comparisons"])
        if comparison.ratio.low > 1
        and comparison.alternative not in ("floor", "student", "student alone", "in memory")
    ]
    if not rows:
        return "There are none: no ratio to an alternative has a lower quartile above 1."
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
    return Table("Comparisons", columns, cells, note).markdown()


def to_comparison(saved: dict) -> Comparison:
    """Restore a comparison from its saved form."""
    return Comparison(**saved | {"ratio": Spread(**saved["ratio"])})
