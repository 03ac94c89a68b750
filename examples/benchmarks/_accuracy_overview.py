"""The first page of the results: one figure, one table, and the findings in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from _accuracy_forest import reference_of
from _accuracy_published import published_of
from _accuracy_words import Line, bold, difference, paired, plus_minus, table

Runs = Mapping[str, Sequence[Line]]

# The methods that most readers choose from, in the order of the figure and the table.
SHOWN = (
    "labels only",
    "KD",
    "DKD",
    "letKD-1",
    "letKD-2",
    "letKD-2, falling",
    "letKD-2 + KD",
    "letKD-2 + KD, falling",
    "layers only (2)",
    "layers only (2) + KD",
    "wider, same MACs",
    "wider, same MACs + KD",
    "wider, same parameters",
    "wider, same parameters + KD",
    "QuEST",
    "FitNet",
    "FitNet + KD",
    "letKD-2 + FitNet",
    "FeatureLoss",
    "AT",
    "IE-KD",
    "SKD + KD",
    "AEKT chi2",
)

# The figure shows only the methods that matter for the choice.
DRAWN = (
    "labels only",
    "DKD",
    "letKD-1",
    "letKD-2",
    "letKD-2 + KD",
    "layers only (2)",
    "wider, same MACs + KD",
    "wider, same parameters + KD",
    "FitNet",
    "letKD-2 + FitNet",
    "FeatureLoss",
    "AT",
    "IE-KD",
)

INTRODUCTION = """\
<!-- Made by examples/benchmarks/report.py from docs/data/results; do not edit. -->

# Results

Which method should you use, and how much does it help? Each point is the mean difference in test
accuracy between a method and KD, paired by seed, with its 95 % interval. Where the teacher has
other classes than the student, the difference is to labels only. Green means better: the interval
is above 0. Red means worse. Grey means not separated: the interval includes 0, which does not mean
that the methods are equal. Hollow points have fewer than three seeds, so there is no interval and
no verdict.

```{image} figures/results.svg
:alt: differences to KD with their intervals, a panel for each regime
:class: only-light
```

```{image} figures/results-dark.svg
:alt: differences to KD with their intervals, a panel for each regime
:class: only-dark
```
"""

PUBLISHED = """\
*published*: the paper's numbers on all of CIFAR-100, with another teacher (A. Gorgun et al., BMVC
2023). They were not run here.
"""

READING = """\
*left out*: not part of the regime, such as losses on logits where the teacher has other classes.
*layers only*: letKD's layers without the teacher's supervision. *wider*: a student without layers
with as many parameters, or multiply-adds (MACs), as letKD-2's student. **The rows of KD and labels
only are accuracies in %**, with ± half of the 95 % interval. **The other rows are differences to
KD**, or to labels only where the teacher has other classes. All runs of a seed have the same
initial weights and the same images in the same order. Accuracies are those of the last epoch. With
so many comparisons, about one interval in twenty excludes 0 by chance.

`python examples/benchmarks/report.py` computes every number on these pages from the committed lines
in `docs/data/results`, one line per training run. `examples/benchmarks/accuracy.py` makes these
runs and describes them.
"""


@dataclass(frozen=True)
class Entry:
    """A regime on the first page.

    Attributes:
        stem: name of its file and of its page.
        title: title of the page.
        short: short title for the figure and the table.
        runs: lines by method.
        methods: the methods of the regime, including those that were not run.
    """

    stem: str
    title: str
    short: str
    runs: Runs
    methods: Sequence[str]


def overview(
    shown: Sequence[Entry],
    others: Sequence[Entry],
    missing: Sequence[str] = (),
    waiting: Sequence[str] = (),
) -> str:
    """The text of the page.

    Args:
        shown: regimes in the figure and the table.
        others: regimes that are only linked.
        missing: list items about regimes without runs.
        waiting: file names of those regimes without runs that have a page.
    """
    bullets = [*(finding(entry) for entry in shown), *missing]
    parts = [
        INTRODUCTION,
        "\n".join(bullets),
        overview_table(shown),
        PUBLISHED if any(published(entry) for entry in shown) else "",
        READING,
        "## All regimes\n\n" + "\n".join(link(entry) for entry in [*shown, *others]) + "\n",
        toctree([*(entry.stem for entry in [*shown, *others]), *waiting]),
    ]
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def finding(entry: Entry) -> str:
    """One list item: the methods whose intervals show them better or worse than the reference."""
    reference = reference_of(entry.runs)
    groups: dict[str, list[str]] = {}
    for name in SHOWN:
        if name in entry.runs and name != reference and reference in entry.runs:
            _, verdict = difference(entry.runs[name], entry.runs[reference])
            groups.setdefault(verdict.split(" (")[0], []).append(name)
    said = [
        f"{words} {reference}: {', '.join(f'*{name}*' for name in groups[verdict])}"
        for verdict, words in (
            ("better", "better than"),
            ("worse", "worse than"),
            ("not separated", "not separated from"),
        )
        if verdict in groups
    ]
    few = groups.get("too few seeds", [])
    if few:
        said.append(f"too few seeds for a verdict: {counted(len(few), 'method')}")
    return f"- **{entry.short}**: {'; '.join(said) or 'not run yet'}."


def overview_table(entries: Sequence[Entry]) -> str:
    """One row for each method, one column for each regime, and the published differences to KD."""
    known = next((p for e in entries for p in [published(e)] if p), {})
    names = [name for name in SHOWN if any(name in entry.runs for entry in entries)]
    rows = []
    for name in names:
        row = [name, *(cell(name, entry) for entry in entries)]
        if known:
            value = known.get(name)
            level = name in ("labels only", "KD")
            row.append("" if value is None else f"{value:.2f}" if level else against(value, known))
        rows.append(row)
    head = ["", *(f"[{entry.short}](results-{entry.stem}.md)" for entry in entries)]
    return table([*head, "published, 240 epochs"] if known else head, rows)


def published(entry: Entry) -> dict[str, float]:
    """The published accuracies of a regime's pair of networks."""
    return published_of(next(iter(entry.runs.values()))[0])


def against(value: float, known: Mapping[str, float]) -> str:
    """The difference of a published accuracy to the published accuracy of KD."""
    return f"{value - known['KD']:+.2f}"


def cell(name: str, entry: Entry) -> str:
    """The accuracy of KD and of labels only; for other methods the difference."""
    runs = entry.runs
    if name not in runs:
        return "not run yet" if name in entry.methods else "left out"
    reference = reference_of(runs)
    if name in ("labels only", reference) or reference not in runs:
        return plus_minus([line["test_accuracy"] for line in runs[name]])
    text, verdict = difference(runs[name], runs[reference])
    if verdict.startswith("too few"):
        seeds = len(paired(runs[name], runs[reference])[0])
        return f"{text} ({counted(seeds, 'seed')})"
    return bold(text, verdict) if verdict in ("better", "worse") else text


def link(entry: Entry) -> str:
    """A link to the regime's page, and how many methods and seeds were run."""
    seeds = sorted({len(lines) for lines in entry.runs.values()})
    span = counted(seeds[-1], "seed")
    span = span if len(seeds) == 1 else f"{seeds[0]} to {span}"
    count = f"{len(entry.runs)} of {len(entry.methods)} methods, {span}"
    return f"- [{entry.title}](results-{entry.stem}.md): {count}"


def counted(count: int, word: str) -> str:
    """Such as "1 seed" or "3 seeds"."""
    return f"{count} {word}" if count == 1 else f"{count} {word}s"


def toctree(stems: Sequence[str]) -> str:
    """The table of contents for the site."""
    names = "\n".join(f"results-{stem}" for stem in stems)
    return f"```{{toctree}}\n:maxdepth: 1\n:hidden:\n\n{names}\n```\n"
