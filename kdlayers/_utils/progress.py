"""Progress of `fit`: tqdm where it is installed, plain lines else; silent off a terminal."""

import sys
from collections.abc import Iterable, Iterator, Sized
from importlib.util import find_spec
from time import monotonic
from typing import TypeVar

T = TypeVar("T")


def progress(batches: Iterable[T], title: str, *, shown: bool) -> Iterator[T]:
    """``batches``, with a bar or lines called ``title`` on standard error."""
    if not shown or not sys.stderr.isatty():
        yield from batches
    elif find_spec("tqdm") is not None:
        from tqdm import tqdm

        yield from tqdm(batches, desc=title, leave=False)
    else:
        yield from _lines(batches, title)


def _lines(batches: Iterable[T], title: str, every: float = 5.0) -> Iterator[T]:
    total = f" of {len(batches)}" if isinstance(batches, Sized) else ""
    last, count = monotonic(), 0
    for count, batch in enumerate(batches, start=1):
        yield batch
        if monotonic() - last > every:
            last = monotonic()
            sys.stderr.write(f"{title}: batch {count}{total}\n")
    sys.stderr.write(f"{title}: {count} batches\n")
