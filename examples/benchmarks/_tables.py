"""The results of a benchmark: tables to read, and a file with all numbers."""

from __future__ import annotations

import argparse
import json
import platform
import shlex
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from _timing import Spread

import kdlayers

PACKAGES = ("torch", "torchvision", "timm", "torchdistill")


@dataclass(frozen=True)
class Table:
    """Rows of text under a title."""

    title: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""

    def markdown(self, level: int = 2) -> str:
        """The table with its title as a heading of ``level``."""
        head = ["| " + " | ".join(self.columns) + " |", "|" + "---|" * len(self.columns)]
        body = ["| " + " | ".join(row) + " |" for row in self.rows]
        note = ["", self.note] if self.note else []
        return "\n".join([f"{'#' * level} {self.title}", "", *head, *body, *note])


@dataclass(frozen=True)
class Comparison:
    """The library's time or memory divided by that of an alternative."""

    case: str
    quantity: str
    ours: str
    alternative: str
    ratio: Spread


@dataclass
class Report:
    """All results of one run of a benchmark."""

    benchmark: str
    title: str
    settings: dict[str, object]
    tables: list[Table] = field(default_factory=list)
    comparisons: list[Comparison] = field(default_factory=list)
    times_ms: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    memory_mib: dict[str, dict[str, float | None]] = field(default_factory=dict)

    def add(self, table: Table) -> None:
        """Print a table and store it."""
        print(f"\n{table.markdown()}", flush=True)
        self.tables.append(table)

    def compare(
        self, case: str, quantity: str, ours: str, alternative: str, ratio: Spread | float
    ) -> str:
        """Store a ratio, which may be a single number; returns it as text."""
        spread = ratio if isinstance(ratio, Spread) else Spread(ratio, ratio, ratio)
        self.comparisons.append(Comparison(case, quantity, ours, alternative, spread))
        return str(spread) if isinstance(ratio, Spread) else f"{ratio:.2f}"

    def save(self, out: Path) -> None:
        """Write ``<benchmark>.json`` and ``<benchmark>.md`` to the folder ``out``."""
        out.mkdir(parents=True, exist_ok=True)
        part = self.settings.get("part", "both")
        name = self.benchmark if part == "both" else f"{self.benchmark}-{part}"
        name = name if self.settings["device"] == "cpu" else f"{name}-gpu"
        content = asdict(self) | {"machine": machine(str(self.settings["device"]))}
        (out / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n", "utf-8")
        text = "\n\n".join([f"# {self.title}", *(table.markdown() for table in self.tables)])
        (out / f"{name}.md").write_text(f"{text}\n\n{measured_on(content['machine'])}\n", "utf-8")
        print(f"\nsaved in {out / name}.json and .md")


def machine(device: str) -> dict[str, object]:
    """Date, processor, threads and versions."""
    return {
        "date": datetime.now(tz=timezone.utc).date().isoformat(),
        "processor": processor(),
        "gpu": None if device == "cpu" else torch.cuda.get_device_name(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "packages": {"kdlayers": kdlayers.__version__}
        | {name: installed(name) for name in PACKAGES},
    }


def installed(name: str) -> str | None:
    """Version of a package, or None."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def processor() -> str:
    """Name of the CPU."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def measured_on(found: dict) -> str:
    """A sentence with date, machine and versions."""
    versions = [f"{name} {found['packages'][name]}" for name in ("kdlayers", "torch")]
    threads = "1 thread" if found["threads"] == 1 else f"{found['threads']} threads"
    place = found["gpu"] or f"{found['processor']}, {threads}"
    return f"Measured on {found['date']}: {place}, {', '.join(versions)}."


def command_line(description: str, *, rounds: int) -> argparse.ArgumentParser:
    """A parser with the options that all benchmarks share."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--rounds", type=int, default=rounds, help=f"measurements per variant; default: {rounds}")
    add("--threads", type=int, default=0, help="CPU threads; default: torch's default")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default: cpu")
    add("--no-memory", action="store_true", help="measure times only")
    add("--quick", action="store_true", help="tiny sizes, to check in seconds that all "
        "works; the numbers mean nothing")  # fmt: skip
    add("--out", type=Path, default=Path("runs/benchmarks"), metavar="DIR",
        help="folder for tables and numbers; default: runs/benchmarks")  # fmt: skip
    return parser


def read(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Parse the command line and set the number of threads."""
    args = parser.parse_args()
    args.rounds = min(args.rounds, 3) if args.quick else args.rounds
    if args.threads:
        torch.set_num_threads(args.threads)
    return args


def settings(args: argparse.Namespace) -> dict[str, object]:
    """The options as they are saved, without ``--out``."""
    kept = {name: value for name, value in vars(args).items() if name != "out"}
    options = sys.argv[1:]
    if "--out" in options:
        place = options.index("--out")
        del options[place : place + 2]
    return kept | {"options": shlex.join(options)}
