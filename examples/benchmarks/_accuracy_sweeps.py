"""The sweeps of the accuracy benchmark, with their tables and figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any, Literal

from _accuracy_words import Line, bold, difference, plus_minus, table
from _png import save_png

Value = int | float | tuple[float, float]
Runs = dict[str, list[Line]]


@dataclass(frozen=True)
class Sweep:
    """Values of one option of a method, and where the recipe in a line has them.

    Attributes:
        method: the method whose option is changed.
        option: name of the option; for alpha, names of two options.
        values: the values to try, without the value of the unchanged recipe.
        layer: the layer whose recipe has the value: 0 is the first, -1 the last, ``None`` both, and
            ``"all"`` stands for the recipe of the method.
        entry: name of the value in that recipe.
        words: what the value is, in words.
    """

    method: str
    option: tuple[str, ...]
    values: tuple[Value, ...]
    layer: int | Literal["all"] | None
    entry: str
    words: str

    def options_of(self, value: Value) -> list[tuple[str, str]]:
        """The command-line options for ``value``."""
        each = value if isinstance(value, tuple) else (value,)
        return [(f"--{name}", str(part)) for name, part in zip(self.option, each, strict=True)]

    def value_of(self, line: Line) -> Value:
        """The value in a line's recipe."""
        layers = line["recipe"]["layers"]
        if self.layer is None:
            return layers[0][self.entry], layers[-1][self.entry]
        where = line["recipe"] if self.layer == "all" else layers[self.layer]
        found: Value = where[self.entry]
        return found


SWEEPS = {
    "templates": Sweep(
        "letKD-1", ("templates",), (16, 32, 128, 256), -1, "templates", "templates K of the layer"
    ),
    "temperature": Sweep(
        "letKD-1", ("temperature",), (0.1, 1.0), -1, "temperature", "sharpness of the codebook"
    ),
    "subclasses": Sweep(
        "letKD-2", ("subclasses",), (1, 4, 16), 0, "subclasses", "sub-classes of each class"
    ),
    "alpha": Sweep(
        "letKD-2",
        ("alpha-first", "alpha-last"),
        ((0.0, 0.0), (0.0, 1.0), (1.0, 0.0)),
        None,
        "alpha",
        "alpha of the first and the last layer",
    ),
    "layer weight": Sweep(
        "letKD-2 + KD",
        ("layer-weight-beside",),
        (1.0, 30.0),
        "all",
        "layer_weight",
        "weight of the layers' losses",
    ),
}


def groups(
    sweep: Sweep, lines: Sequence[Line], unchanged: Sequence[Line]
) -> dict[Value, list[Line]]:
    """The lines of a sweep by value, and the unchanged recipe's lines with the same seeds.

    A line belongs to a sweep if its recipe differs from the unchanged one in this value only.
    """
    base = unchanged[0]["recipe"]
    found: dict[Value, list[Line]] = {}
    for line in lines:
        own = line["method"] == sweep.method
        if own and blanked(line["recipe"], sweep) == blanked(base, sweep):
            found.setdefault(sweep.value_of(line), []).append(line)
    seeds = {line["seed"] for own in found.values() for line in own}
    if found:
        found[sweep.value_of(unchanged[0])] = [x for x in unchanged if x["seed"] in seeds]
    return dict(sorted(found.items()))


def blanked(recipe: dict[str, Any], sweep: Sweep) -> dict[str, Any]:
    """A recipe without the value of a sweep."""
    if sweep.layer == "all":
        return {key: value for key, value in recipe.items() if key != sweep.entry}
    layers = [dict(layer) for layer in recipe["layers"]]
    for layer in layers if sweep.layer is None else [layers[sweep.layer]]:
        layer.pop(sweep.entry)
    return recipe | {"layers": layers}


def swept(lines: Sequence[Line], runs: Runs) -> list[tuple[Sweep, dict[Value, list[Line]]]]:
    """The sweeps that were run, with their lines by value."""
    known = [sweep for sweep in SWEEPS.values() if sweep.method in runs]
    found = [(sweep, groups(sweep, lines, runs[sweep.method])) for sweep in known]
    return [(sweep, by_value) for sweep, by_value in found if by_value]


def sweep_tables(lines: Sequence[Line], runs: Runs) -> str:
    """A table for every sweep that was run."""
    parts = []
    for sweep, by_value in swept(lines, runs):
        unchanged = runs[sweep.method]
        usual = sweep.value_of(unchanged[0])
        rows = []
        for value, own in by_value.items():
            against = "" if value == usual else bold(*difference(own, unchanged))
            accuracy = plus_minus([line["test_accuracy"] for line in own])
            size = f"{own[0]['parameters']:,}"
            rows.append([shown(value), str(len(own)), accuracy, against, size])
        head = (sweep.words, "seeds", "test accuracy %", f"minus {shown(usual)}", "parameters")
        parts.append(f"**{sweep.method}**\n\n{table(head, rows)}")
    return "\n\n".join(parts)


def shown(value: Value) -> str:
    """A value as text for a table."""
    return " and ".join(f"{part:g}" for part in value) if isinstance(value, tuple) else f"{value:g}"


def draw_sweeps(lines: Sequence[Line], runs: Runs, path: Path) -> bool:
    """Draw one panel for each sweep: thin lines for seeds, a thick one for their mean.

    Returns whether there was anything to draw.
    """
    known = swept(lines, runs)
    if not known:
        return False
    from matplotlib.figure import Figure  # imported here: nothing else needs it

    rows, columns = -(-len(known) // 2), min(2, len(known))
    figure = Figure((3.4 * columns, 2.8 * rows), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for unused in panels[len(known) :]:
        unused.set_visible(False)
    for panel, (sweep, by_value) in zip(panels, known, strict=False):
        places = range(len(by_value))
        for seed in sorted({line["seed"] for own in by_value.values() for line in own}):
            has = [{x["seed"]: x["test_accuracy"] for x in own} for own in by_value.values()]
            panel.plot(places, [one.get(seed, float("nan")) for one in has], lw=0.8, alpha=0.6)
        means = [mean(x["test_accuracy"] for x in own) for own in by_value.values()]
        panel.plot(places, means, "k.-", lw=2)
        panel.set_xticks(places, [shown(value) for value in by_value], fontsize=8)
        panel.set_xlabel(sweep.words, fontsize=9)
        panel.set_title(sweep.method, fontsize=10)
    panels[0].set_ylabel("test accuracy %", fontsize=9)
    save_png(figure, path, dpi=120)
    return True
