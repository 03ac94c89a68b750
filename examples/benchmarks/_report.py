"""Paired differences with their 95 % interval."""

from __future__ import annotations

from math import sqrt
from statistics import mean, stdev

# Quantiles of Student's t for two-sided 95 % intervals, for 1, 2, ... degrees of freedom.
T95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)


def interval(ours: list[float], theirs: list[float]) -> tuple[float, float, float]:
    """Mean of the paired differences, and the ends of its 95 % interval (Student's t)."""
    differences = [a - b for a, b in zip(ours, theirs, strict=True)]
    freedom = len(differences) - 1
    t = T95[freedom - 1] if freedom <= len(T95) else 1.96 + 2.7 / freedom
    half = t * stdev(differences) / sqrt(len(differences))
    return mean(differences), mean(differences) - half, mean(differences) + half
