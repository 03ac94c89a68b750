"""Committed runs, statistics of them, and pages as one line of text."""

import json
import re
from pathlib import Path
from statistics import mean, stdev

from scipy import stats

DOCS = Path(__file__).parents[2] / "docs"
DATA = DOCS / "data"
RESULTS = DATA / "results"


def lines(name):
    """The runs in a file of docs/data."""
    return [json.loads(line) for line in (DATA / name).read_text("utf-8").splitlines()]


def text_of(page):
    """A page of docs, or README.md, on one line."""
    path = DOCS.parent / page if page == "README.md" else DOCS / page
    return " ".join(path.read_text("utf-8").split())


def shown(values):
    """Mean and standard deviation as the pages write them."""
    return f"{mean(values):.1f} ± {stdev(values):.1f}" if len(values) > 1 else f"{values[0]:.1f}"


def cells(page, start):
    """Rows of the table whose header begins so, by their first cell."""
    text = (DOCS / page).read_text("utf-8")
    found = re.search(rf"^\| {re.escape(start)}.*\n\|[-|]+\n((?:\|.*\n?)+)", text, re.M)
    assert found, start
    rows = [[cell.strip() for cell in row.strip("|").split("|")] for row in found[1].splitlines()]
    return {row[0]: row[1:] for row in rows}


def accuracies(stem, images="test"):
    """Accuracies by method and seed, on the test or the validation images."""
    found = {}
    for run in lines(f"results/{stem}.jsonl"):
        found.setdefault(run["method"], {})[run["seed"]] = run[f"{images}_accuracy"]
    return found


def difference(ours, theirs, without=()):
    """The paired difference with its 95 % interval: mean, low and high."""
    seeds = sorted(ours.keys() & theirs.keys() - set(without))
    test = stats.ttest_rel([ours[s] for s in seeds], [theirs[s] for s in seeds])
    low, high = test.confidence_interval()
    return mean(ours[s] - theirs[s] for s in seeds), low, high


def verdict(ours, theirs):
    """The sign of the paired difference if its 95 % interval excludes 0; 0 if it does not."""
    _, low, high = difference(ours, theirs)
    return 1 if low > 0 else -1 if high < 0 else 0


def check_pairs(runs, pairs, page, said):
    """Each pair has its expected verdict; the page and others give its difference and interval.

    ``pairs`` maps two methods to the verdict and the other pages; ``said`` is a pattern for the
    mean, low and high.
    """
    for (ours, theirs), (expected, *others) in pairs.items():
        assert verdict(runs[ours], runs[theirs]) == expected, (ours, theirs)
        pattern = said.format(*(f"{x:.1f}" for x in difference(runs[ours], runs[theirs])))
        for name in (page, *others):
            assert re.search(pattern, text_of(name)), (name, ours, theirs)


def interval(numbers):
    """As the pages write it, such as 4.6 points (2.5 to 6.7)."""
    middle, low, high = (f"{number:.1f}" for number in numbers)
    return f"{middle} points ({low} to {high})"
