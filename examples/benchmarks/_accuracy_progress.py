"""Runs that may be stopped at any time: kept after every epoch, and one process each."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

try:
    import fcntl
except ImportError:  # not on Windows: there one process at a time
    fcntl = None  # type: ignore[assignment]


class Progress:
    """What an interrupted run has done, in a file that is written after every epoch.

    Args:
        path: the file; ``None``: nothing is kept.

    Attributes:
        seconds: of all epochs so far.
        curve: mean of every term of the loss, by epoch.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.seconds = 0.0
        self.curve: list[dict[str, float]] = []

    @property
    def started(self) -> bool:
        """Whether there is an epoch to go on from."""
        return self.path is not None and self.path.exists()

    def resume(self, parts: dict[str, Any]) -> int:
        """Put everything back where it was; returns the number of epochs done."""
        if not self.started:
            return 0
        saved = torch.load(self.path, weights_only=True)  # type: ignore[arg-type]
        for name, part in parts.items():
            if part is not None:
                part.load_state_dict(saved["parts"][name])
        torch.set_rng_state(saved["random"])
        self.seconds, self.curve = saved["seconds"], saved["curve"]
        print(f"going on after epoch {saved['epochs']}: {self.path}", flush=True)
        return saved["epochs"]

    def keep(
        self, parts: dict[str, Any], epochs: int, seconds: float, means: dict[str, float]
    ) -> None:
        """Save everything after an epoch: a kill loses no more than the one that runs."""
        self.seconds += seconds
        self.curve.append(means)
        if self.path is None:
            return
        states = {name: part.state_dict() for name, part in parts.items() if part is not None}
        content = {
            "parts": states,
            "epochs": epochs,
            "seconds": self.seconds,
            "curve": self.curve,
            "random": torch.get_rng_state(),
        }
        self.path.parent.mkdir(parents=True, exist_ok=True)
        fresh = self.path.with_suffix(".part")
        torch.save(content, fresh)
        fresh.replace(self.path)  # a kill in between leaves the former epoch

    def done(self) -> None:
        """Remove the file: the run's line has been written."""
        if self.started:
            self.path.unlink()  # type: ignore[union-attr]


@contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Whether this process may do what ``path`` stands for: no other one does it at the moment.

    The lock ends with the process, however that ends.
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
