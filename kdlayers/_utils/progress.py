"""A progress bar by tqdm, on a terminal and where tqdm is installed."""

import sys
from collections.abc import Iterable
from importlib.util import find_spec
from typing import Any


def shown(batches: Iterable[Any], title: str, wanted: bool) -> Iterable[Any]:
    """``batches``, under a bar called ``title`` if that is ``wanted`` and possible."""
    if not wanted or not sys.stderr.isatty() or find_spec("tqdm") is None:
        return batches
    from tqdm import tqdm

    bar: Iterable[Any] = tqdm(batches, desc=title, leave=False)
    return bar
