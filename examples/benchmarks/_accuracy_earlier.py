"""Table of the runs on the test images with recipes that were replaced later."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from _accuracy_words import Line, bold, by_recipe, changed, difference, plus_minus, table

NOTE = """\
These runs were made before the recipe was changed: chosen anew on the validation images, or
corrected, as the text above says. They stay here, because nothing else shows what the change did on
the test images. Differences are paired by seed."""


def earlier_table(lines: Sequence[Line], runs: Mapping[str, Sequence[Line]]) -> str:
    """One row for each replaced recipe; empty if there are no such runs.

    Args:
        lines: the runs with replaced recipes.
        runs: the reported runs by method.
    """
    rows = []
    for name, own in by_recipe([line for line in lines if line["method"] in runs]):
        accuracy = plus_minus([line["test_accuracy"] for line in own])
        against = bold(*difference(runs[name], own))
        rows.append([name, changed(own[0], runs[name][0]), str(len(own)), accuracy, against])
    head = ("", "earlier value", "seeds", "test accuracy %", "present recipe minus this")
    return f"{NOTE}\n\n{table(head, rows)}" if rows else ""
