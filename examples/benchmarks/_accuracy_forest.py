"""The forest plot: differences to a reference with their intervals, one panel for each regime."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from _accuracy_words import FEWEST, Line, paired
from _report import interval

Runs = Mapping[str, Sequence[Line]]
Row = tuple[str, float, float | None, float | None]


@dataclass(frozen=True)
class Colours:
    """The colours of a figure on a light or a dark page."""

    page: str
    ink: str
    better: str
    worse: str
    unclear: str


LIGHT = Colours("white", "black", "#1a7f37", "#b42318", "#57606a")
DARK = Colours("#0d1117", "#e6edf3", "#3fb950", "#f85149", "#9198a1")


def reference_of(runs: Runs) -> str:
    """The reference of the differences: KD, or labels only if the teacher has other classes."""
    return "KD" if "KD" in runs else "labels only"


def rows_of(runs: Runs, names: Sequence[str]) -> list[Row]:
    """For each method that was run: mean difference to the reference, ends of its interval.

    The ends are ``None`` if there are too few seeds for an interval.
    """
    reference, rows = reference_of(runs), []
    for name in names:
        ours, theirs = paired(runs.get(name, ()), runs.get(reference, ()))
        if name == reference or not ours:
            continue
        if len(ours) < FEWEST:
            rows.append((name, mean(ours) - mean(theirs), None, None))
        else:
            rows.append((name, *interval(ours, theirs)))
    return rows


def draw_forest(
    panels: Sequence[tuple[str, Runs]],
    names: Sequence[str],
    path: Path,
    colours: Colours = LIGHT,
) -> bool:
    """Draw one panel below the other; returns whether there was anything to draw.

    The picture is no wider than a phone's screen, so that phones do not shrink it. Drawing the same
    lines again gives the same file.
    """
    known = [(title, reference_of(runs), rows_of(runs, names)) for title, runs in panels]
    known = [panel for panel in known if panel[2]]
    if not known:
        return False
    import matplotlib as mpl  # imported here: nothing else needs it
    from matplotlib.figure import Figure

    heights = [len(rows) + 2.4 for _, _, rows in known]
    ink = dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor"), colours.ink)
    ink |= dict.fromkeys(("xtick.color", "ytick.color"), colours.ink)
    page = dict.fromkeys(("figure.facecolor", "axes.facecolor"), colours.page)
    style = {"svg.hashsalt": "kdlayers", "svg.fonttype": "path", "font.size": 10}
    with mpl.rc_context(style | ink | page):
        figure = Figure((4.6, 0.27 * sum(heights)), layout="constrained")
        grid = figure.subplots(len(known), 1, squeeze=False, height_ratios=heights)[:, 0]
        for panel, (title, reference, rows) in zip(grid, known, strict=True):
            draw_panel(panel, title, reference, rows, colours)
        path.parent.mkdir(exist_ok=True)
        figure.savefig(path, metadata={"Date": None})
    return True


def draw_panel(
    panel: Any, title: str, reference: str, rows: Sequence[Row], colours: Colours
) -> None:
    """Draw one regime: one row for each method, the first at the top."""
    for place, (_, centre, low, high) in enumerate(rows):
        if low is None or high is None:
            panel.plot(centre, place, "o", mfc=colours.page, mec=colours.unclear, ms=5)
            continue
        colour = colours.better if low > 0 else colours.worse if high < 0 else colours.unclear
        panel.plot([low, high], [place, place], color=colour, lw=2, solid_capstyle="butt")
        panel.plot(centre, place, "o", color=colour, ms=5)
    panel.axvline(0, color=colours.ink, lw=0.8)
    panel.set_yticks(range(len(rows)), [row[0] for row in rows])
    panel.set_ylim(len(rows) - 0.5, -0.5)
    panel.set_title(title, fontsize=10, fontweight="bold", loc="left", x=-0.55)
    # The label is wider than the panel, so it may only extend to the left.
    panel.set_xlabel(f"points of test accuracy minus {reference}", fontsize=9, loc="right")
    panel.tick_params(axis="y", length=0)
    panel.spines[["top", "right", "left"]].set_visible(False)
    panel.grid(axis="x", lw=0.4, alpha=0.6)
