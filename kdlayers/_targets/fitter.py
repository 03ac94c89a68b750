"""What everything that learns from the teacher before training has in common.

A fitter is fed whole passes over the data. Several fitters share one pass, so the teacher runs once
per batch however many points are fitted; `KDHandle.fit` and ``targets.fit`` both
drive them through :func:`run_passes`.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

import torch
from torch import Tensor

from kdlayers.errors import FitError


class Fitter(Protocol):
    """Learns from the teacher's features in one or more passes over the same data."""

    stage: str
    """What the current pass is for, in two or three words, for the progress display."""

    # A fitter that trains, rather than counts, may also say ``varied = True``: see `pass_seed`.

    def update(self, teacher: Tensor, targets: Tensor | None) -> None:
        """Take one batch: the teacher's tensor, as the loss would get it, and the labels."""
        ...

    def end_pass(self) -> bool:
        """Finish a pass; True when another pass over the data is wanted."""
        ...


def run_passes(
    fitters: Sequence[Fitter],
    batches: Callable[[Sequence[Fitter], int], Iterator[tuple[Sequence[Tensor], Tensor | None]]],
) -> int:
    """Feed ``fitters`` until none wants another pass; returns the number of passes.

    ``batches(active, index)`` starts pass ``index`` and gives, batch by batch, one teacher tensor
    for each of the ``active`` fitters, and the labels. Under ``torch.inference_mode`` this runs as
    under ``torch.no_grad``: what is learnt is used in training later.
    """
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False), torch.no_grad():
            return run_passes(fitters, batches)
    active, passes = list(fitters), 0
    while active:
        seen = 0
        for tensors, targets in batches(active, passes):
            seen += 1
            for fitter, tensor in zip(active, tensors, strict=True):
                fitter.update(tensor, targets)
        if not seen:
            raise FitError(
                "fit() was given an empty loader: it gave no batch"
                if passes == 0
                else f"fit() needs pass {passes + 1} over the data, but the loader gave no batch "
                "the second time, as a generator does; pass a DataLoader or a list of batches"
            )
        passes += 1
        active = [fitter for fitter in active if fitter.end_pass()]
    return passes


def pass_seed(seed: int, active: Sequence[Fitter], index: int) -> int:
    """Seed of the loader's shuffling and augmentation in pass ``index``.

    Statistics that are put together over passes need the same data in each; training wants other
    data each time. Passes are shared: they vary once all the fitters that are left are ``varied``.
    """
    return seed + index if all(getattr(f, "varied", False) for f in active) else seed


def fit_rows(fitter: Fitter, batches: Iterable[tuple[Tensor, Tensor | None]]) -> int:
    """Feed one fitter from ``batches`` of (features, labels); returns the number of passes."""
    return run_passes([fitter], lambda _active, _index: (([f], y) for f, y in batches))
