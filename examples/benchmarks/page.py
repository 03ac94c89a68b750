"""Writes the pages on performance from the files that the benchmarks have saved.

    python examples/benchmarks/page.py docs/data/performance docs/performance.md

The first page has a summary. Next to it, each benchmark gets its own page: the tables of losses.py
are in docs/performance-losses.md.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

from _performance_summary import costs, reached, slower
from _tables import Table, measured_on

NOTICE = "<!-- Made by examples/benchmarks/page.py from docs/data/performance; do not edit. -->"
INTRODUCTION = """# Performance

What does distillation cost, and would another implementation cost less? The
[measurements](#measurements) compare the library with plain implementations, with plain PyTorch and
with torchdistill, faiss and scikit-learn."""
EXPLANATION = """## How to read the tables

Times are medians with quartiles in brackets. A benchmark measures all rows of a table alternately
in one process, so that other load on the machine affects all rows alike. Ratios are computed within
each round; the tables show their median and quartiles over the rounds. A ratio is the library's
time divided by the other's: **below 1 the library is faster**. Memory is the peak of a step above
that of the same step without distillation: on a CPU the resident memory of a fresh process, on a
GPU the sum of tensors.

*Plain* is a straightforward implementation of the same layer and loss, and *textbook* one of a loss
on logits or features. *Floor* is the same step without KD layers and loss. *Low memory* is the
library with `memory="low"`.

We had no GPU. All scripts except `fit.py` accept `--device cuda`, but none has run on a GPU yet.

The command below each table repeats its measurement. This page is written by
`python examples/benchmarks/page.py docs/data/performance docs/performance.md`."""

# The benchmarks in the order of their pages, and what each page has.
ABOUT = {
    "step": "time and memory of letKD's layers and loss, against a plain implementation",
    "recorded_step": "the same step with a live teacher, with a recorded one and without a teacher",
    "losses": "every other loss, against a plain implementation and torchdistill",
    "fit": "`kd.fit`: clustering, against faiss and scikit-learn; discriminant analysis",
    "scale": "time and memory for more templates, positions and channels",
    "inference": "KD layers in eval mode: as trained, folded, pruned and compiled",
}
ALTERNATIVES = "where an alternative is faster or needs less memory"


def main() -> None:
    """Read the files and write the pages."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="folder with the *.json files")
    parser.add_argument("page", type=Path, help="Markdown file to write; the others go beside it")
    args = parser.parse_args()
    files = sorted(args.data.glob("*.json"), key=order)
    if not files:
        raise SystemExit(f"no *.json in {args.data}; run the benchmarks with --out {args.data}")
    reports = [json.loads(file.read_text("utf-8")) for file in files]
    for name, text in pages(reports, args.page.name).items():
        (args.page.parent / name).write_text(text, "utf-8")
        print(f"{args.page.parent / name} written")


def order(file: Path) -> tuple[int, str]:
    """The sort key of a file: its benchmark's place in ``ABOUT``, then its name."""
    names, name = list(ABOUT), file.stem.split("-")[0]
    return names.index(name) if name in names else len(names), file.stem


def pages(reports: list[dict], first: str) -> dict[str, str]:
    """The text of each page by file name: the first one, alternatives, and the benchmarks."""
    own = {name: beside(first, name) for name in dict.fromkeys(r["benchmark"] for r in reports)}
    others = beside(first, "alternatives")
    links = [
        f"- [{title(name, reports)}]({page}): {ABOUT.get(name, 'its tables')}"
        for name, page in own.items()
    ]
    links.append(f"- [Better alternatives]({others}): {ALTERNATIVES}")
    measurements = "## Measurements\n\n" + "\n".join(links)
    parts = [NOTICE, INTRODUCTION, costs(reports), measurements, reached(reports), EXPLANATION]
    back = f"[Performance]({first}) explains the words and how the numbers were measured."
    found = {
        first: joined([*parts, toctree([*own.values(), others])]),
        others: joined([NOTICE, "# Better alternatives", back, slower(reports)]),
    }
    for name, page in own.items():
        heading = f"# {title(name, reports)}"
        sections = [section(r) for r in reports if r["benchmark"] == name]
        found[page] = joined([NOTICE, heading, back, *sections])
    return found


def beside(first: str, name: str) -> str:
    """The file name of a page, next to the first one."""
    return f"{Path(first).stem}-{name.replace('_', '-')}.md"


def title(benchmark: str, reports: Iterable[dict]) -> str:
    """The title of a benchmark's page."""
    return next(r["title"] for r in reports if r["benchmark"] == benchmark)


def section(report: dict) -> str:
    """The tables of a file, with the command that repeats them."""
    where = " (GPU)" if report["machine"]["gpu"] else ""
    tables = [Table(**table | {"title": table["title"] + where}) for table in report["tables"]]
    last = f"`{command(report)}`  \n{measured_on(report['machine'])}"
    return "\n\n".join([*(table.markdown() for table in tables), last])


def command(report: dict) -> str:
    """The command that repeats the measurement."""
    options = report["settings"]["options"]
    return f"python examples/benchmarks/{report['benchmark']}.py {options}".strip()


def toctree(files: Iterable[str]) -> str:
    """The hidden table of contents, which puts the pages into the menu."""
    names = "\n".join(Path(file).stem for file in files)
    return f"```{{toctree}}\n:maxdepth: 1\n:hidden:\n\n{names}\n```"


def joined(parts: Iterable[str]) -> str:
    """A page of these parts."""
    return "\n\n".join(part for part in parts if part) + "\n"


if __name__ == "__main__":
    main()
