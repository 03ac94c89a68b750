"""The long runs: ``python -m tests.reliability --files 5000 --ways 500``.

Without arguments every class makes 1000 tries. The script prints one line of counts for each
class, as docs/reliability.md shows them, and fails if anything was silently wrong.
"""

import argparse
import importlib
import importlib.util
import sys
import time
from collections.abc import Callable

CLASSES = ("files", "layouts", "sequences", "ways")
WRONG = ("silently wrong", "raw errors")


def attack_of(name: str) -> Callable[[int, int], dict[str, int]] | None:
    """The function ``run(tries, seed)`` of a class, or None where the module does not exist."""
    module = f"tests.reliability.{name}"
    if importlib.util.find_spec(module) is None:
        return None
    return importlib.import_module(module).run


def main() -> int:
    """Run the classes that were asked for; the number of tries that were silently wrong."""
    parser = argparse.ArgumentParser(prog="python -m tests.reliability", description=__doc__)
    found = {name: attack for name in CLASSES if (attack := attack_of(name)) is not None}
    for name in found:
        parser.add_argument(f"--{name}", type=int, metavar="TRIES", help=f"tries of class {name}")
    parser.add_argument("--seed", type=int, default=0)
    args = vars(parser.parse_args())
    asked = {name: args[name] for name in found if args[name] is not None}
    wrong = 0
    for name, tries in (asked or dict.fromkeys(found, 1000)).items():
        start = time.perf_counter()
        counts = found[name](tries, args["seed"])
        wrong += sum(counts.get(what, 0) for what in WRONG)
        shown = ", ".join(f"{what} {count}" for what, count in counts.items())
        print(f"{name}: {shown} (seed {args['seed']}, {time.perf_counter() - start:.0f} s)")
    return wrong


if __name__ == "__main__":
    sys.exit(min(main(), 1))
