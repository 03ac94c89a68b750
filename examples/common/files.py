"""Files that interruptions leave complete, and locks between processes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

try:
    import fcntl
except ImportError:  # Windows has no fcntl: start one process only
    fcntl = None  # type: ignore[assignment]


def save(content: Any, path: Path) -> None:
    """Write ``content`` with ``torch.save``; creates the folder."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # Renamed when complete: an interruption leaves the previous file, and no process reads a part.
    # The number keeps two processes from writing to one file.
    fresh = path.with_suffix(f".{os.getpid()}.new")
    torch.save(content, fresh)
    fresh.replace(path)


@contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Lock ``path``; the value is False if another process holds the lock.

    The system releases the lock when the process ends, even if it is killed.
    """
    if fcntl is None:
        yield True
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
        path.unlink(missing_ok=True)
