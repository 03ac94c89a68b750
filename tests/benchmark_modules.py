"""Imports the benchmarks' modules, which lie beside their scripts."""

import importlib
import sys
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "examples" / "benchmarks"


def load(name):
    """A module of the benchmarks."""
    sys.path.insert(0, str(FOLDER))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.remove(str(FOLDER))
