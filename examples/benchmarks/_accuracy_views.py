"""Table of accuracy against the number of recorded views, for runs that differ in nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from _accuracy_words import Line, bold, difference, plus_minus, table

Views = dict[int, list[Line]]
LIVE = 0
"""Number of views that stands for a live teacher, which runs on the student's new views."""

NOTE = """\
The number of augmented views of each image that were recorded (`--views` of
`examples/benchmarks/accuracy.py`). All epochs show these views. *live*: every epoch draws new
views, and the teacher runs on them. Nothing else differs. Differences to *live* are paired by
seed."""


def views_of(line: Line) -> int:
    """The number of views of a run; `LIVE` if the teacher ran in training."""
    return int(line["recipe"].get("views", LIVE))


def by_views(lines: Sequence[Line], unchanged: Sequence[Line]) -> Views:
    """The runs of one method by number of views; live is last.

    Args:
        lines: runs with other numbers of views. Runs that also differ in something else are left
            out.
        unchanged: the runs of the regime. Only the seeds that ``lines`` has are used.
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
    """One row for each method and number of views; empty if there are no such runs."""
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
