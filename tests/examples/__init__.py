"""Tests of the examples, recipes and benchmarks: `python -m pytest -m benchmark` runs them."""

import sys
from pathlib import Path

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path[:0] = [str(EXAMPLES), str(EXAMPLES / "recipes")]  # as Python does for the scripts
