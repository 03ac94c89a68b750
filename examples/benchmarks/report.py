"""Writes docs/results.md and a page for each regime from the lines that accuracy.py has written.

    python examples/benchmarks/report.py

The script reads the following files of each regime in docs/data/results:

- ``*.jsonl``: the reported runs;
- ``*.sweeps.jsonl``: the runs of sweeps.py;
- ``*.views.jsonl``: runs with other numbers of recorded views;
- ``*.tuning.jsonl``: the runs that were used to choose the recipe;
- ``*.earlier.jsonl``: runs on the test images with recipes that were replaced;
- ``*.teacher.json``: the measurements of supervision.py;
- ``*.txt``: the findings. Only this file is written by hand.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from _accuracy_earlier import earlier_table
from _accuracy_forest import DARK, draw_forest, rows_of
from _accuracy_lines import by_method, read
from _accuracy_methods import Options, recipes
from _accuracy_overview import DRAWN, Entry, overview
from _accuracy_published import published_table
from _accuracy_regimes import REGIMES
from _accuracy_setting import REFERENCES, first_line, setting, title
from _accuracy_sweeps import draw_sweeps, sweep_tables
from _accuracy_views import views_table
from _accuracy_words import (
    Line,
    bold,
    difference,
    plus_minus,
    probe_table,
    pruned_table,
    supervision_table,
    table,
    tuning_table,
)

ROOT = Path(__file__).resolve().parents[2]
DATA, PAGE = ROOT / "docs" / "data" / "results", ROOT / "docs" / "results.md"

# For each control: a method, the method it is compared with, and the question it answers.
CONTROLS = (
    ("letKD-1", "layers only (1)", "one layer: does its supervision help?"),
    ("letKD-2", "layers only (2)", "two layers: does their supervision help?"),
    ("layers only (1)", "labels only", "one layer: does its size alone help?"),
    ("layers only (2)", "labels only", "two layers: does their size alone help?"),
    ("letKD-1", "QuEST", "does adding the value help (alpha 1, not 0)?"),
    ("letKD-2", "letKD-1", "does the second layer help?"),
    ("letKD-2, falling", "letKD-2", "does it help if the weight of the layers' loss decays to 0?"),
    ("letKD-2", "wider, same parameters", "against a wider student with as many parameters"),
    ("letKD-2", "wider, same MACs", "against a wider student with as many multiply-adds"),
    ("letKD-1 + KD", "KD", "does one layer help KD?"),
    ("letKD-2 + KD", "KD", "do two layers help KD?"),
    ("letKD-2 + KD, falling", "KD", "do two layers help KD if their loss weight decays to 0?"),
    ("letKD-2 + KD, falling", "letKD-2 + KD", "with decay: does the decay help?"),
    ("letKD-2 + KD, falling", "layers only (2) + KD", "with decay: does the supervision help?"),
    (
        "letKD-2 + KD, falling",
        "wider, same parameters + KD",
        "with decay: against equal parameters",
    ),
    ("letKD-2 + KD, falling", "wider, same MACs + KD", "with decay: against equal multiply-adds"),
    ("letKD-2 + KD", "layers only (2) + KD", "with KD: does the layers' supervision help?"),
    ("layers only (2) + KD", "KD", "with KD: does the layers' size alone help?"),
    ("letKD-1 + KD", "QuEST + KD", "with KD: does adding the value help?"),
    ("letKD-2 + KD", "wider, same parameters + KD", "with KD: against as many parameters"),
    ("letKD-2 + KD", "wider, same MACs + KD", "with KD: against as many multiply-adds"),
    ("letKD-2 + DKD", "DKD", "do two layers help DKD?"),
    ("letKD-2 + FitNet", "FitNet", "do two layers help FitNet?"),
    ("letKD-2", "FitNet", "two layers against FitNet"),
    ("FitNet + KD", "FitNet", "does KD help FitNet?"),
    ("letKD-2 + KD", "FitNet + KD", "with KD: two layers against FitNet"),
    ("SKD + KD", "KD", "does the simplifier help KD?"),
    ("SKD + DKD", "DKD", "does the simplifier help DKD?"),
    ("AEKT chi2", "DKD", "does AEKT's adaptive term, with its linear layer, help DKD?"),
)

# The regimes on the first page, in this order, with their short titles.
MAIN = {
    "cifar100-10000": "CIFAR-100, 10,000 images",
    "cifar100-all": "CIFAR-100, all images",
    "cifar10-500": "CIFAR-10, 500 images, teacher of CIFAR-100",
    "cifar10-5000": "CIFAR-10, 5,000 images, teacher of CIFAR-100",
    "fashion-mnist-6000": "Fashion-MNIST, 6,000 images",
}

INTRODUCTION = """\
<!-- Made by examples/benchmarks/report.py from docs/data/results; do not edit. -->

# {title}

This page is one regime of the [results](results.md). Accuracies are those of the **last epoch** on
the test images. No setting was chosen on these images; seeds were added where the first three left
a comparison open. For each seed all methods use the same student images, the same batches and the
same initial weights of the student (except a wider student). Differences are therefore paired by
seed. ± and brackets are 95 % Student's t intervals. A method is called **better** or **worse** only
if the interval excludes zero. Otherwise the difference is not significant, and the methods are
called "not separated", which does not mean equal. With fewer than three seeds there is no interval
and no verdict.
"""


def main(arguments: list[str] | None = None) -> None:
    """Write the pages and their figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=DATA, help="default: docs/data/results")
    parser.add_argument("--out", type=Path, default=PAGE, help="default: docs/results.md")
    args = parser.parse_args(arguments)
    for name, text in pages(args.data, args.out.name).items():
        (args.out.parent / name).write_text(text, "utf-8")
    shown, _ = entries(args.data)
    panels, figures = panels_of(shown), args.out.parent / "figures"
    draw_forest(panels, DRAWN, figures / "results.svg")
    draw_forest(panels, DRAWN, figures / "results-dark.svg", DARK)
    for path in regimes(args.data):
        figure = args.out.parent / figure_of(path)
        figure.parent.mkdir(exist_ok=True)
        draw_sweeps(beside(path, "sweeps"), by_method(read(path)), figure)


def panels_of(shown: list[Entry]) -> list[tuple[str, Mapping[str, Sequence[Line]]]]:
    """The panels of the figure: the regimes with an interval, or all if none has one."""
    every = [(entry.short, entry.runs) for entry in shown]
    ready = [
        panel
        for panel in every
        if any(low is not None for _, _, low, _ in rows_of(panel[1], DRAWN))
    ]
    return ready or every


def pages(data: Path, first: str = PAGE.name) -> dict[str, str]:
    """All pages by file name; ``first`` is the file name of the overview."""
    shown, others = entries(data)
    missing = {stem: words for stem, words in MAIN.items() if stem not in {e.stem for e in shown}}
    ready = {stem: waiting(data / f"{stem}.jsonl", words) for stem, words in missing.items()}
    found = {f"results-{stem}.md": text for stem, text in ready.items() if text}
    bullets = [
        f"- **{words}**: not run yet{f'; [its teacher](results-{stem}.md)' if ready[stem] else ''}."
        for stem, words in missing.items()
    ]
    found[first] = overview(shown, others, bullets, [stem for stem in ready if ready[stem]])
    for path in regimes(data):
        found[f"results-{path.stem}.md"] = regime(path, by_method(read(path)))
    return found


def waiting(path: Path, title: str) -> str:
    """The page of a regime without runs; empty if supervision.py has not measured its teacher."""
    measured, found = path.with_suffix(".teacher.json"), path.with_suffix(".txt")
    if not measured.exists():
        return ""
    parts = [
        INTRODUCTION.format(title=title),
        "**No run has finished yet.**",
        *headed("## What the teacher says", supervision_table(measured)),
        found.read_text("utf-8").strip() if found.exists() else "",
    ]
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def entries(data: Path) -> tuple[list[Entry], list[Entry]]:
    """The regimes on the first page, and those that it only links to."""
    every = {path.stem: entry_of(path) for path in regimes(data)}
    shown = [stem for stem in MAIN if stem in every] or list(every)
    return [every[stem] for stem in shown], [e for stem, e in every.items() if stem not in shown]


def entry_of(path: Path) -> Entry:
    """A regime for the first page."""
    runs = by_method(read(path))
    name = title(first_line(runs))
    return Entry(path.stem, name, MAIN.get(path.stem, name), runs, methods_of(runs))


def methods_of(runs: dict[str, list[Line]]) -> list[str]:
    """The methods of a regime. If the teacher has other classes, losses on logits are left out."""
    line = first_line(runs)
    data, taught = line["recipe"]["data"], line["teacher"]["recipe"].get("data")
    foreign: list[str] = REGIMES["cifar10-500"]["methods"]
    return list(recipes(Options())) if taught in (data, None) else foreign


def regimes(data: Path) -> list[Path]:
    """The files of reported runs, whose names have only one suffix."""
    found = (path for path in data.glob("*.jsonl") if len(path.suffixes) == 1)
    return sorted(found, key=lambda path: path.stem)


def figure_of(path: Path) -> str:
    """The path of the figure of a regime's sweeps, relative to the page."""
    return f"figures/{path.stem}-sweeps.png"


def beside(path: Path, kind: str) -> list[Line]:
    """The lines of a regime's file of this kind; empty if there is none."""
    other = path.with_name(f"{path.stem}.{kind}.jsonl")
    return read(other) if other.exists() else []


def regime(path: Path, runs: dict[str, list[Line]]) -> str:
    """The page of a regime: its runs, its tuning and the findings."""
    tuning, sweeps = beside(path, "tuning"), sweep_tables(beside(path, "sweeps"), runs)
    picture = f"![accuracy for each value: seeds and their mean]({figure_of(path)})"
    found = path.with_suffix(".txt")
    measured = path.with_suffix(".teacher.json")
    every = [line for lines in runs.values() for line in lines]
    parts = [
        INTRODUCTION.format(title=title(first_line(runs))),
        setting(every, tuning),
        "## Accuracy and cost",
        main_table(runs),
        *headed("## Comparison with published numbers", published_table(runs)),
        *headed("## Supervision or size?", controls(runs)),
        *headed("## What the teacher says", supervision_table(measured)),
        *headed("## Before and after the layers", probe_table(runs)),
        *headed("## After pruning", pruned_table(runs)),
        *headed("## One value at a time", sweeps, picture),
        *headed("## How many recorded views?", views_table(beside(path, "views"), runs)),
        found.read_text("utf-8").strip() if found.exists() else "",
        *(("## How the recipe was chosen", tuning_table(tuning)) if tuning else ()),
        *headed("## Earlier recipes", earlier_table(beside(path, "earlier"), runs)),
        "## Recipes",
        recipe_list(runs),
    ]
    return "\n\n".join(part.strip() for part in parts if part) + "\n"


def headed(heading: str, body: str, *more: str) -> tuple[str, ...]:
    """A section with its heading; nothing if its body is empty."""
    return (heading, body, *more) if body else ()


# ------------------------------------------------------------------ parts of a regime


def main_table(runs: dict[str, list[Line]]) -> str:
    """Accuracy, paired differences and cost of each method, and the names of those not run yet."""
    rows = []
    for name, lines in runs.items():
        cells = [name, str(len(lines)), plus_minus([line["test_accuracy"] for line in lines])]
        for other in REFERENCES:
            known = name != other and other in runs
            cells.append(bold(*difference(lines, runs[other])) if known else "")
        cells.append(f"{mean(line['training_accuracy'] for line in lines):.2f}")
        cells += [f"{lines[0]['parameters']:,}", f"{lines[0]['macs'] / 1e6:.2f}&nbsp;M"]
        rows.append(cells)
    head = ("", "seeds", "test accuracy %", *(f"minus {name}" for name in REFERENCES))
    head = (*head, "training accuracy %", "parameters", "MACs")
    missing = [name for name in methods_of(runs) if name not in runs]
    names = ", ".join(f"*{name}*" for name in missing)
    note = f"\n\nNot run yet: {names}." if missing else ""
    cost = (
        "Parameters and multiply-adds (MACs) are those of the student at inference, including its "
        "KD layers."
    )
    own = "Training accuracy is that on the student's own images, without augmentation."
    return f"{table(head, rows)}\n\n{cost} {own}{note}"


def controls(runs: dict[str, list[Line]]) -> str:
    """The comparisons that separate supervision from size, for the methods that were run."""
    weights = {name: lines[0]["recipe"].get("layer_weight") for name, lines in runs.items()}
    rows = [
        [question, f"{ours} minus {theirs}", *difference(runs[ours], runs[theirs])]
        for ours, theirs, question in CONTROLS
        if ours in runs and theirs in runs
        # Two weights of the layers' losses would decide the comparison.
        if None in (weights[ours], weights[theirs]) or weights[ours] == weights[theirs]
    ]
    return table(("question", "difference", "points of test accuracy", ""), rows) if rows else ""


def recipe_list(runs: dict[str, list[Line]]) -> str:
    """For each method, the values of its recipe that labels only does not have."""
    common = first_line(runs)["recipe"]
    rows = []
    for name, lines in runs.items():
        recipe = lines[0]["recipe"]
        own = {key: value for key, value in recipe.items() if common.get(key) != value}
        rows.append([name, f"`{json.dumps(own)}`", f"`{lines[0]['recipe_hash']}`"])
    return table(("", "differs from labels only", "hash"), rows)


if __name__ == "__main__":
    main()
