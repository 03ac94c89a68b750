"""A progress bar by tqdm, if tqdm is installed and the output is a terminal."""

import sys
from collections.abc import Iterable
from importlib.util import find_spec
from typing import Any


def shown(batches: Iterable[Any], title: str, wanted: bool) -> Iterable[Any]:
    """``batches``, with a progress bar called ``title`` if it is ``wanted`` and possible."""
    if not wanted or not sys.stderr.isatty() or find_spec("tqdm") is None:
        return batches
    from tqdm import tqdm

    bar: Iterable[Any] = tqdm(batches, desc=title, leave=False)
    return bar
