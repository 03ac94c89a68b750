"""Resumable runs: a checkpoint after every epoch, and a lock so that one process does each run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

try:
    import fcntl
except ImportError:  # Windows has no fcntl: start one process only
    fcntl = None  # type: ignore[assignment]


class Progress:
    """The checkpoint of a run, written after every epoch.

    Args:
        path: file of the checkpoint; ``None``: no checkpoint is written.

    Attributes:
        seconds: training time of all epochs so far.
        curve: mean of every term of the loss, for each epoch.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.seconds = 0.0
        self.curve: list[dict[str, float]] = []

    @property
    def started(self) -> bool:
        """Whether there is a checkpoint to resume from."""
        return self.path is not None and self.path.exists()

    def resume(self, parts: dict[str, Any]) -> int:
        """Restore all states; returns the number of finished epochs."""
        if not self.started:
            return 0
        saved = torch.load(self.path, weights_only=True)  # type: ignore[arg-type]
        for name, part in parts.items():
            if part is not None:
                part.load_state_dict(saved["parts"][name])
        torch.set_rng_state(saved["random"])
        self.seconds, self.curve = saved["seconds"], saved["curve"]
        print(f"resuming after epoch {saved['epochs']}: {self.path}", flush=True)
        return saved["epochs"]

    def keep(
        self, parts: dict[str, Any], epochs: int, seconds: float, means: dict[str, float]
    ) -> None:
        """Save all states after an epoch, so that an interruption loses one epoch at most."""
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
        fresh.replace(self.path)  # an interruption leaves the previous checkpoint

    def done(self) -> None:
        """Remove the checkpoint, because the run's line has been written."""
        if self.started:
            self.path.unlink()  # type: ignore[union-attr]


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
