"""Accuracy against the number of recorded views: runs that differ in nothing else, in a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from _accuracy_words import Line, bold, difference, plus_minus, table

Views = dict[int, list[Line]]
LIVE = 0
"""Stands for a teacher that runs on the student's own, ever new views."""

NOTE = """\
`--views` of `examples/benchmarks/accuracy.py`: so many augmented views of each image were recorded,
and all epochs show these; *live*: every epoch draws new ones, and the teacher runs on them. Nothing
else differs. Differences to *live* are taken seed by seed."""


def views_of(line: Line) -> int:
    """The number of views of a run; `LIVE` if the teacher ran in training."""
    return int(line["recipe"].get("views", LIVE))


def by_views(lines: Sequence[Line], unchanged: Sequence[Line]) -> Views:
    """Runs of one method by views, live last, with the seeds of the other numbers of views only.

    Args:
        lines: runs with other numbers of views; those whose recipe differs in more are left out.
        unchanged: the runs of the regime.
    """
    base, found = without_views(unchanged[0]), Views()
    for line in lines:
        if line["method"] == unchanged[0]["method"] and without_views(line) == base:
            found.setdefault(views_of(line), []).append(line)
    seeds = {line["seed"] for own in found.values() for line in own}
    usual = views_of(unchanged[0])
    if found and usual not in found:
        found[usual] = [line for line in unchanged if line["seed"] in seeds]
    return dict(sorted(found.items(), key=lambda item: (item[0] == LIVE, item[0])))


def without_views(line: Line) -> dict[str, object]:
    """A recipe without its number of views."""
    return {key: value for key, value in line["recipe"].items() if key != "views"}


def views_table(lines: Sequence[Line], runs: Mapping[str, Sequence[Line]]) -> str:
    """A row for each method and number of views; empty if there are no such runs."""
    rows = []
    for name, unchanged in runs.items():
        found = by_views(lines, unchanged)
        for views, own in found.items():
            cells = [name, str(views or "live"), str(len(own))]
            cells.append(plus_minus([line["test_accuracy"] for line in own]))
            known = views != LIVE and LIVE in found
            rows.append([*cells, bold(*difference(own, found[LIVE])) if known else ""])
    head = ("", "views", "seeds", "test accuracy %", "minus live")
    return f"{NOTE}\n\n{table(head, rows)}" if rows else ""
