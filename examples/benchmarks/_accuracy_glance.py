"""The few comparisons that most readers come for, of all regimes in one table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from _accuracy_words import Line, bold, difference, table

# A method, what it is compared with, and what the difference tells.
QUESTIONS = (
    ("letKD-2", "labels only", "letKD over no distillation"),
    ("letKD-2", "layers only (2)", "of that, the supervision of its layers"),
    ("layers only (2)", "labels only", "of that, their size"),
    ("KD", "labels only", "plain KD over no distillation"),
    ("letKD-2", "KD", "letKD over plain KD"),
    ("letKD-2 + KD, falling", "KD", "what letKD adds to KD, its weight falling"),
    ("IE-KD", "KD", "IE-KD over plain KD"),
    ("SKD + KD", "KD", "what the simplifier adds to KD"),
    ("AEKT chi2", "DKD", "what AEKT changes in DKD"),
    ("DKD", "KD", "DKD over plain KD"),
)


def glance(regimes: Sequence[tuple[str, Mapping[str, Sequence[Line]]]]) -> str:
    """A table of differences in points of test accuracy.

    Args:
        regimes: their titles, which may repeat, and the lines of each method.

    Returns:
        A row for every question and a column for every regime; nothing without an answer.
    """
    rows = []
    for ours, theirs, question in QUESTIONS:
        cells = [
            bold(*difference(runs[ours], runs[theirs])) if ours in runs and theirs in runs else ""
            for _, runs in regimes
        ]
        if any(cells):
            rows.append([f"{question}: {ours} minus {theirs}", *cells])
    return table(("", *(name for name, _ in regimes)), rows) if rows else ""
