"""Makes docs/results.md from the lines that accuracy.py has written.

    python examples/benchmarks/report.py

reads docs/data/results: ``*.jsonl`` with the reported runs of one regime each, ``*.sweeps.jsonl``
with those that sweeps.py has written, ``*.tuning.jsonl`` with the runs on which its recipe was
chosen, and ``*.txt`` with what was found out about it, which is the only part written by hand.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean
from textwrap import fill

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from _accuracy_glance import glance
from _accuracy_methods import Options, Recipe, recipes
from _accuracy_sweeps import draw_sweeps, sweep_tables
from _accuracy_words import (
    Line,
    bold,
    difference,
    plus_minus,
    probe_table,
    pruned_table,
    table,
    tuning_table,
)

ROOT = Path(__file__).resolve().parents[2]
DATA, PAGE = ROOT / "docs" / "data" / "results", ROOT / "docs" / "results.md"
REFERENCES = ("labels only", "KD")

# What each control answers: a method, what it is compared with, and the question.
CONTROLS = (
    ("letKD-1", "layers only (1)", "one layer: does its supervision help?"),
    ("letKD-2", "layers only (2)", "two layers: does their supervision help?"),
    ("layers only (1)", "labels only", "one layer: does its size alone help?"),
    ("layers only (2)", "labels only", "two layers: does their size alone help?"),
    ("letKD-1", "QuEST", "does it help that the layer adds its value (alpha 1, not 0)?"),
    ("letKD-2", "letKD-1", "does the second layer help?"),
    ("letKD-2", "wider, same parameters", "against a wider student of as many parameters"),
    ("letKD-2", "wider, same MACs", "against a wider student of as many multiply-adds"),
    ("letKD-1 + KD", "KD", "does one layer help KD?"),
    ("letKD-2 + KD", "KD", "do two layers help KD?"),
    ("letKD-2 + KD, falling", "KD", "do two layers help KD if their loss's weight falls to 0?"),
    ("letKD-2 + KD, falling", "letKD-2 + KD", "so: does it help that the weight falls?"),
    ("letKD-2 + KD, falling", "layers only (2) + KD", "so: does their supervision help?"),
    ("letKD-2 + KD, falling", "wider, same parameters + KD", "so: against as many parameters"),
    ("letKD-2 + KD, falling", "wider, same MACs + KD", "so: against as many multiply-adds"),
    ("letKD-2 + KD", "layers only (2) + KD", "with KD: does the layers' supervision help?"),
    ("layers only (2) + KD", "KD", "with KD: does the layers' size alone help?"),
    ("letKD-1 + KD", "QuEST + KD", "with KD: does it help that the layer adds its value?"),
    ("letKD-2 + KD", "wider, same parameters + KD", "with KD: against as many parameters"),
    ("letKD-2 + KD", "wider, same MACs + KD", "with KD: against as many multiply-adds"),
    ("letKD-2 + DKD", "DKD", "do two layers help DKD?"),
    ("SKD + KD", "KD", "does the simplifier help KD?"),
    ("SKD + DKD", "DKD", "does the simplifier help DKD?"),
    ("AEKT chi2", "DKD", "does AEKT's adaptive term, with its linear layer, help DKD?"),
)

INTRODUCTION = """\
<!-- Made by examples/benchmarks/report.py from docs/data/results; do not edit. -->

# Results

Does it help, how much, and is it the supervision or the size? Every number here is computed by

```bash
python examples/benchmarks/report.py
```

from the committed lines in `docs/data/results`, one for each training, with its whole recipe;
`examples/benchmarks/accuracy.py` writes them, and says how to run it. Accuracies are those of the
**last epoch** on the test images, which no choice was made on.

For every seed all methods have the same student images in the same batches, and the same initial
weights of the student (a wider student cannot). Differences are therefore taken seed by seed. ± and
brackets are 95 % intervals by Student's t. **Better** and **worse** are said only where the
interval excludes zero; else it says "not separated", which does not mean equal. With fewer than
three seeds there is no interval and no verdict. With many comparisons about one in twenty would
exclude zero by chance alone.
"""

GLANCE = """\
## At a glance

Points of test accuracy; the sections below have the seeds, the settings and all other methods.
Empty: not run.
"""


def main(arguments: list[str] | None = None) -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=DATA, help="default: docs/data/results")
    parser.add_argument("--out", type=Path, default=PAGE, help="default: docs/results.md")
    args = parser.parse_args(arguments)
    args.out.write_text(page(args.data), "utf-8")
    for path in regimes(args.data):
        figure = args.out.parent / figure_of(path)
        figure.parent.mkdir(exist_ok=True)
        draw_sweeps(beside(path, "sweeps"), by_method(read(path)), figure)


def page(data: Path) -> str:
    """The whole page."""
    every = [(path, by_method(read(path))) for path in regimes(data)]
    short = glance([(title(runs["labels only"][0]), runs) for _, runs in every])
    parts = [INTRODUCTION, f"{GLANCE}\n{short}\n" if short else ""]
    return "\n".join(part for part in [*parts, *(regime(*each) for each in every)] if part)


def regimes(data: Path) -> list[Path]:
    """The files of reported runs: those whose names have one suffix."""
    found = (path for path in data.glob("*.jsonl") if len(path.suffixes) == 1)
    return sorted(found, key=lambda path: path.stem)


def figure_of(path: Path) -> str:
    """Where the page has the figure of a regime's sweeps."""
    return f"figures/{path.stem}-sweeps.png"


def beside(path: Path, kind: str) -> list[Line]:
    """The lines of a regime's other file, if there is one."""
    other = path.with_name(f"{path.stem}.{kind}.jsonl")
    return read(other) if other.exists() else []


def regime(path: Path, runs: dict[str, list[Line]]) -> str:
    """One section: the runs of a file, its tuning and what was found."""
    tuning, sweeps = beside(path, "tuning"), sweep_tables(beside(path, "sweeps"), runs)
    picture = f"![accuracy over each value: seeds and their mean]({figure_of(path)})"
    found = path.with_suffix(".txt")
    every = [line for lines in runs.values() for line in lines]
    parts = [
        f"## {title(every[0])}",
        setting(every),
        "### Accuracy and cost",
        main_table(runs),
        *headed("### The supervision or the size?", controls(runs)),
        *headed("### Before and after the layers", probe_table(runs)),
        *headed("### Pruned", pruned_table(runs)),
        *headed("### One value at a time", sweeps, picture),
        found.read_text("utf-8").strip() if found.exists() else "",
        *(("### How the recipe was chosen", tuning_table(tuning)) if tuning else ()),
        "### Recipes",
        recipe_list(runs),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def headed(heading: str, body: str, *more: str) -> tuple[str, ...]:
    """A part of a section with its heading; nothing where its body is empty."""
    return (heading, body, *more) if body else ()


# ------------------------------------------------------------------ reading


def read(path: Path) -> list[Line]:
    """The lines of a file."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines() if line]


def by_method(lines: Iterable[Line]) -> dict[str, list[Line]]:
    """Lines by method, in the order of seeds.

    Raises:
        SystemExit: if a method has two recipes or a seed twice: they must not be mixed.
    """
    runs: dict[str, list[Line]] = {}
    for line in lines:
        runs.setdefault(line["method"], []).append(line)
    if len({line.get("device") for own in runs.values() for line in own}) > 1:
        raise SystemExit("runs of several devices: put them into separate files")
    for name, own in runs.items():
        if len({line["recipe_hash"] for line in own}) > 1:
            raise SystemExit(f"{name!r} has runs of several recipes: put them into separate files")
        if len({line["seed"] for line in own}) < len(own):
            raise SystemExit(f"{name!r} has two runs of one seed")
    order = {name: index for index, name in enumerate(recipes(Options()))}
    names = sorted(runs, key=lambda name: order.get(name, len(order)))
    return {name: sorted(runs[name], key=lambda line: line["seed"]) for name in names}


# ------------------------------------------------------------------ parts of a regime


def title(line: Line) -> str:
    """What the regime is."""
    recipe = line["recipe"]
    images = f"{recipe['images']:,} images" if recipe["images"] else "all training images"
    names = f"{line['teacher']['recipe']['network']} to {recipe['student']}"
    return f"Fashion-MNIST, {names}, {images}, {recipe['epochs']} epochs"


def setting(lines: Sequence[Line]) -> str:
    """The recipe that all share, the teacher, dates and versions, as text."""
    line = next(line for line in lines if line["method"] == "labels only")
    recipe, teacher = line["recipe"], line["teacher"]
    taught = teacher["recipe"]
    dates = sorted({line["date"] for line in lines})
    versions = sorted({f"{k} {v}" for line in lines for k, v in line["versions"].items()})
    items = [
        f"**Teacher**: {taught['network']}, {teacher['parameters']:,} parameters, "
        f"{teacher['macs']:,} multiply-adds, {taught['epochs']} epochs on all but the validation "
        f"images: **{teacher['test_accuracy']:.2f} %** of the test images "
        f"({teacher['validation_accuracy']:.2f} % of the validation images, "
        f"{teacher['training_accuracy']:.2f} % of its own).",
        f"**Student**: {recipe['student']} with stages of {stages(recipe['width'])} channels, "
        f"{line['parameters']:,} parameters, {line['macs']:,} multiply-adds. It sees "
        f"{seen(recipe['images'])}.",
        f"**Training**: {recipe['epochs']} epochs, batches of {recipe['batch_size']}, SGD with "
        f"Nesterov's momentum 0.9, weight decay {recipe['weight_decay']:g} on all parameters, rate "
        f"{recipe['lr']:g} after a rise over a tenth of the steps, then falling to 0 by a cosine; "
        f"{augmentation(recipe)}; {recipe['precision']} in training, float32 in testing. The "
        "teacher runs on the student's batches, its batch norms folded; it has learnt with crops "
        "and flips.",
        f"**Validation**: {recipe['validation']:,} training images that nobody trains on.",
        f"**Seconds** of an epoch, on {line['device']}, have augmentation and the teacher's "
        "forward in them, and not `kd.fit`, once before. On a CPU they are process CPU time of one "
        "thread, which other work on the machine lengthens less than the clock.",
        f"**Run** {' to '.join(dict.fromkeys((dates[0], dates[-1])))}, {', '.join(versions)}.",
    ]
    return "\n".join(wrapped(item) for item in items)


def wrapped(item: str) -> str:
    """An entry of a list."""
    return fill(item, 100, initial_indent="- ", subsequent_indent="  ", break_on_hyphens=False)


def augmentation(recipe: Recipe) -> str:
    """What is done to the student's images."""
    crops = f"crops with {recipe['padding']} pixels of padding" if recipe["padding"] else ""
    flips = "flips" if recipe["flips"] else ""
    return " and ".join(part for part in (crops, flips) if part) or "no augmentation"


def seen(images: int) -> str:
    """Which images a student sees; 0 stands for all."""
    some = f"{images:,} of the teacher's images, equally many of every class, others for every seed"
    return some if images else "all of the teacher's images"


def stages(width: float) -> str:
    """Channels of the three stages."""
    return ", ".join(str(round(width * factor)) for factor in (1, 2, 4))


def main_table(runs: dict[str, list[Line]]) -> str:
    """Accuracy, paired differences and cost of every method; the ones not run are named."""
    rows = []
    for name, lines in runs.items():
        cells = [name, str(len(lines)), plus_minus([line["test_accuracy"] for line in lines])]
        for other in REFERENCES:
            known = name != other and other in runs
            cells.append(bold(*difference(lines, runs[other])) if known else "")
        cells.append(f"{mean(line['training_accuracy'] for line in lines):.2f}")
        cells += [f"{lines[0]['parameters']:,}", f"{lines[0]['macs'] / 1e6:.2f}&nbsp;M"]
        rows.append([*cells, f"{mean(line['seconds_per_epoch'] for line in lines):.2f}"])
    head = ("", "seeds", "test accuracy %", *(f"minus {name}" for name in REFERENCES))
    head = (*head, "training accuracy %", "parameters", "MACs", "s per epoch")
    missing = [name for name in recipes(Options()) if name not in runs]
    note = f"\n\nNot run here: {', '.join(missing)}." if missing else ""
    cost = (
        "Parameters and multiply-adds (MACs) are those of the student at inference, its KD layers"
    )
    own = "The training accuracy is that on the student's own images, without augmentation."
    return f"{table(head, rows)}\n\n{cost} included. {own}{note}"


def controls(runs: dict[str, list[Line]]) -> str:
    """The comparisons that tell supervision from size, of the methods that were run."""
    rows = [
        [question, f"{ours} minus {theirs}", *difference(runs[ours], runs[theirs])]
        for ours, theirs, question in CONTROLS
        if ours in runs and theirs in runs
    ]
    return table(("question", "difference", "points of test accuracy", ""), rows) if rows else ""


def recipe_list(runs: dict[str, list[Line]]) -> str:
    """What is special about each method's recipe, as it is in the lines."""
    common = runs["labels only"][0]["recipe"]
    rows = []
    for name, lines in runs.items():
        recipe = lines[0]["recipe"]
        own = {key: value for key, value in recipe.items() if common.get(key) != value}
        rows.append([name, f"`{json.dumps(own)}`", f"`{lines[0]['recipe_hash']}`"])
    return table(("", "beyond labels only", "hash"), rows)


if __name__ == "__main__":
    main()
