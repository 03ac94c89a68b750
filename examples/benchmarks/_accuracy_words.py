"""Numbers of the benchmark as text and tables: intervals, verdicts, probes and pruning."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

from _report import interval

Line = dict[str, Any]
FEWEST = 3  # seeds for an interval: with two that happen to agree it would be far too narrow


def paired(ours: Sequence[Line], theirs: Sequence[Line]) -> tuple[list[float], list[float]]:
    """The test accuracies of both methods for their common seeds."""
    mine = {line["seed"]: line["test_accuracy"] for line in ours}
    other = {line["seed"]: line["test_accuracy"] for line in theirs}
    seeds = sorted(mine.keys() & other.keys())
    return [mine[seed] for seed in seeds], [other[seed] for seed in seeds]


def plus_minus(values: Sequence[float]) -> str:
    """Mean and half the width of its 95 % interval."""
    if len(values) < FEWEST:
        return f"{mean(values):.2f}"
    centre, low, _ = interval(list(values), [0.0] * len(values))
    return f"{centre:.2f} ± {centre - low:.2f}"


def difference(ours: Sequence[Line], theirs: Sequence[Line]) -> tuple[str, str]:
    """The mean difference in test accuracy with its interval, and the verdict."""
    return gap(*paired(ours, theirs))


def gap(ours: Sequence[float], theirs: Sequence[float]) -> tuple[str, str]:
    """The mean of paired differences with its interval, and the verdict."""
    if not ours:
        return "no common seed", "not run"
    if len(ours) < FEWEST:
        return f"{mean(ours) - mean(theirs):+.2f}", f"too few seeds ({len(ours)})"
    centre, low, high = interval(list(ours), list(theirs))
    verdict = "better" if low > 0 else "worse" if high < 0 else "not separated"
    return f"{centre:+.2f} [{low:+.2f}, {high:+.2f}]", verdict


def bold(text: str, verdict: str) -> str:
    """A difference with its verdict; better and worse are bold."""
    return f"{text} {f'**{verdict}**' if verdict in ('better', 'worse') else verdict}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def tuning_table(lines: Sequence[Line]) -> str:
    """Validation accuracies of all tried recipes; each row shows what the recipe changes."""
    base: dict[str, Line] = {}  # a line of each method's first recipe, to compare the others with
    rows = []
    for name, own in by_recipe(lines):
        first = base.setdefault(name, own[0])
        values = [line["validation_accuracy"] for line in sorted(own, key=lambda x: x["seed"])]
        seeds = ", ".join(str(line["seed"]) for line in sorted(own, key=lambda x: x["seed"]))
        each = ", ".join(f"{value:.2f}" for value in values)
        rows.append(
            [name, changed(own[0], first) or "first recipe", seeds, each, f"{mean(values):.2f}"]
        )
    rows.sort(key=lambda row: list(base).index(row[0]))
    note = (
        "Measured on the validation images. The test "
        "images were not used. The other rows of a method show the change from its first row."
    )
    return f"{note}\n\n{table(('', 'changed', 'seeds', 'accuracy %', 'mean'), rows)}"


def by_recipe(lines: Sequence[Line]) -> list[tuple[str, list[Line]]]:
    """The lines of each recipe, with the name of its method."""
    groups: dict[tuple[str, str], list[Line]] = {}
    for line in lines:
        groups.setdefault((line["method"], line["recipe_hash"]), []).append(line)
    return [(name, own) for (name, _), own in groups.items()]


def changed(line: Line, base: Line) -> str:
    """The values of a line's recipe that the recipe of ``base`` does not have."""
    other = flat(base["recipe"])
    return ", ".join(f"{k} {v}" for k, v in flat(line["recipe"]).items() if other.get(k) != v)


def flat(recipe: Any, prefix: str = "") -> dict[str, Any]:
    """A nested recipe as ``{"layers.0.alpha": 1.0}``."""
    if not isinstance(recipe, (dict, list)):
        return {prefix: recipe}
    items = recipe.items() if isinstance(recipe, dict) else enumerate(recipe)
    parts = [flat(value, f"{prefix}.{key}" if prefix else str(key)) for key, value in items]
    return {key: value for part in parts for key, value in part.items()}


def probe_table(runs: dict[str, list[Line]]) -> str:
    """Linear discriminants on pooled features: before and after each layer, or the last ones."""
    rows = []
    for name, lines in runs.items():
        known = [line for line in lines if line.get("probes")]
        if not known:
            continue
        layers = [key.removesuffix(".before") for key in known[0]["probes"] if "before" in key]
        for layer in layers or ["last"]:
            keys = (f"{layer}.before", f"{layer}.after") if layers else ("last", "last")
            before, after = ([line["probes"][key] for line in known] for key in keys)
            cells = (plus_minus(before), plus_minus(after), bold(*gap(after, before)))
            rows.append([name, layer, str(len(known)), *(cells if layers else (cells[0], "", ""))])
    note = (
        "Test accuracy in % of a linear discriminant on features averaged over positions. It is "
        "fitted to the student's training images. Students without layers have one row, for their "
        "last features."
    )
    head = ("", "layer after", "seeds", "before the layer", "after the layer", "difference")
    return f"{note}\n\n{table(head, rows)}" if rows else ""


def pruned_table(runs: dict[str, list[Line]]) -> str:
    """Size and accuracy after `prune_templates`."""
    rows = []
    for name, lines in runs.items():
        budgets = {cut["budget"] for line in lines for cut in line.get("pruned", ())}
        for budget in sorted(budgets):  # earlier runs have fewer budgets
            pairs = [
                (line, cut)
                for line in lines
                for cut in line.get("pruned", ())
                if cut["budget"] == budget
            ]
            cuts = [cut for _, cut in pairs]
            left = {
                layer: round(mean(cut["templates"][layer] for cut in cuts))
                for layer in cuts[0]["templates"]
            }
            whole = [line["test_accuracy"] for line, _ in pairs]
            change = gap([cut["accuracy"] for cut in cuts], whole)
            size = f"{mean(cut['parameters'] for cut in cuts):,.0f}"
            work = f"{mean(cut['macs'] for cut in cuts) / 1e6:.2f}&nbsp;M"
            text = ", ".join(f"{count} at {layer}" for layer, count in left.items())
            rows.append([name, str(len(cuts)), f"{budget:.0%}", text, size, work, bold(*change)])
    head = ("", "seeds", "budget", "templates left", "parameters", "MACs", "change in accuracy")
    note = (
        "`prune_templates` removes templates that fire at no more than this share of the positions "
        "of the student's images. The numbers are means over seeds."
    )
    return f"{note}\n\n{table(head, rows)}" if rows else ""


def supervision_table(path: Path) -> str:
    """The table of supervision.py, one column for each kind of images; empty without its file."""
    if not path.exists():
        return ""
    found = json.loads(path.read_text("utf-8"))
    rows = []
    for part in [name for name in ("logits", "codebook", "decisions") if name in found]:
        columns = list(found[part].values())
        rows += [[f"{part}: {name}", *(f"{x[name]:.4g}" for x in columns)] for name in columns[0]]
    options = ", ".join(f"{k} {v}" for k, v in found["options"].items())
    note = (
        f"Means over images or positions ({options}), by `examples/benchmarks/supervision.py`. "
        "Targets are fitted to the first column's images. A perplexity is the number of classes or "
        "templates that would share the probability equally: 1 is one-hot."
    )
    head = ("", *found["codebook"])
    return f"{note}\n\n{table(head, rows)}"
