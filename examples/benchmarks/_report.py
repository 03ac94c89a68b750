"""The quickstart's table: means, spreads, and what the numbers do and do not show."""

from __future__ import annotations

from dataclasses import dataclass
from math import sqrt
from statistics import mean, stdev

# Two-sided 95 % quantiles of Student's t for 1, 2, ... degrees of freedom.
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


@dataclass(frozen=True)
class Result:
    """What one method reached: a test accuracy (in %) and milliseconds per step for each seed."""

    accuracies: list[float]
    step_ms: list[float]
    parameters: int


def table(results: dict[str, Result]) -> str:
    """One row a method."""
    rows = [("", "test accuracy %", "parameters", "ms per step")]
    for name, result in results.items():
        accuracy = f"{mean(result.accuracies):.2f}"
        if len(result.accuracies) > 1:
            accuracy += f" ± {stdev(result.accuracies):.2f}"
        rows.append((name, accuracy, f"{result.parameters:,}", f"{mean(result.step_ms):.1f}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) for row in rows
    ]
    return "\n".join([lines[0], "-" * len(lines[0]), *lines[1:]])


def interval(ours: list[float], theirs: list[float]) -> tuple[float, float, float]:
    """Mean of the differences seed by seed, and the ends of its 95 % interval (Student's t)."""
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    freedom = len(differences) - 1
    t = T95[freedom - 1] if freedom <= len(T95) else 1.96 + 2.7 / freedom
    half = t * stdev(differences) / sqrt(len(differences))
    return mean(differences), mean(differences) - half, mean(differences) + half


def compare(results: dict[str, Result], name: str, other: str) -> str:
    """One sentence: is ``name`` better than ``other``, as far as these seeds can tell?"""
    ours, theirs = results[name].accuracies, results[other].accuracies
    if len(ours) < 2:
        return f"{name} against {other}: {ours[0] - theirs[0]:+.2f} points; one seed shows nothing."
    centre, low, high = interval(ours, theirs)
    if low > 0:
        verdict = f"{name} is better"
    elif high < 0:
        verdict = f"{name} is worse"
    else:
        verdict = "not separated"
    spread = f"95 % interval {low:+.2f} to {high:+.2f} over {len(ours)} seeds"
    return f"{name} against {other}: {centre:+.2f} points, {spread}: {verdict}."


def closing(results: dict[str, Result]) -> str:
    """Every letKD method against labels only and against KD, by the numbers."""
    pairs = [
        (name, other)
        for name in results
        for other in ("labels only", "layers only", "KD")
        if name.startswith("letKD") and other in results
    ]
    return "\n".join(compare(results, name, other) for name, other in pairs)
