r"""How the accuracy of letKD depends on K, sub-classes, alpha, sharpness and weight, one by one.

Each value is a recipe of accuracy.py with one option changed, run for some of its seeds. The runs
are written to a file of their own, which report.py compares with the unchanged recipe, paired by
seed. Interrupted runs resume as in accuracy.py, and all options of accuracy.py can be added.

    python examples/benchmarks/sweeps.py --root data --cache docs/data/results \
        --out docs/data/results/fashion-mnist-6000.sweeps.jsonl
    python examples/benchmarks/report.py
"""

from __future__ import annotations

import argparse

import accuracy
from _accuracy_sweeps import SWEEPS


def main(arguments: list[str] | None = None) -> None:
    """Run the sweeps that the command line names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--sweeps", nargs="+", choices=list(SWEEPS), default=list(SWEEPS), help="default: all")
    add("--seeds", nargs="+", default=["0", "1", "2"], help="default: 0 1 2")
    args, others = parser.parse_known_args(arguments)
    for seed in args.seeds:
        for name in args.sweeps:
            sweep = SWEEPS[name]
            for value in sweep.values:
                changes = [text for option in sweep.options_of(value) for text in option]
                accuracy.main([*others, *changes, "--methods", sweep.method, "--seeds", seed])


if __name__ == "__main__":
    main()
