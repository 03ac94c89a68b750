"""Fitters learn from the teacher before training, in passes over the data.

Several fitters share a pass, so that the teacher runs once for each batch. `KDHandle.fit` and
``targets.fit`` both run fitters with `run_passes`.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor

from kdlayers._utils.distributed import together
from kdlayers.errors import ArgumentTypeError, FitError
from kdlayers.functional._checks import is_iterable


class Fitter(Protocol):
    """Learns from the teacher's features in one or more passes over the same data."""

    stage: str
    """Name of the current pass in two or three words, for the progress bar."""

    # A fitter that trains by gradient descent may also have ``varied = True``: see `pass_seed`.
    # One that holds rows back may have ``flush()``, which is called after the last batch: unlike in
    # ``end_pass``, an error of one rank is raised on all.

    def update(self, teacher: Tensor, targets: Tensor | None) -> None:
        """Take one batch: the teacher's tensor as the loss would receive it, and the labels."""
        ...

    def end_pass(self) -> bool:
        """Finish a pass; True if another pass over the data is needed."""
        ...


_Batches: TypeAlias = Callable[
    [Sequence[Fitter], int], Iterator[tuple[Sequence[Tensor], Tensor | None]]
]


def run_passes(fitters: Sequence[Fitter], batches: _Batches) -> int:
    """Run passes until no fitter needs another one; returns the number of passes.

    ``batches(active, index)`` starts pass ``index`` and yields, for each batch, one teacher tensor
    for each of the ``active`` fitters, and the labels. Inside ``torch.inference_mode`` this uses
    ``torch.no_grad`` instead, because autograd cannot use inference tensors in training.

    Raises:
        FitError: if there is no batch, or if another rank failed.
    """
    if torch.is_inference_mode_enabled():
        with torch.inference_mode(False), torch.no_grad():
            return run_passes(fitters, batches)
    active, passes = list(fitters), 0
    while active:
        # A rank that fails must not leave the others waiting at the end of the pass.
        together(partial(_read, active, passes, batches), FitError)
        passes += 1
        active = [fitter for fitter in active if fitter.end_pass()]
    return passes


def _read(active: Sequence[Fitter], index: int, batches: _Batches) -> None:
    """Let the fitters read all batches of one pass."""
    seen = 0
    for tensors, targets in batches(active, index):
        seen += 1
        for fitter, tensor in zip(active, tensors, strict=True):
            fitter.update(tensor, targets)
    if not seen:
        raise FitError(
            "fit() got an empty loader: it yielded no batch"
            if index == 0
            else f"fit() needs pass {index + 1} over the data, but the loader yielded no "
            "batch, as an exhausted generator does; pass a DataLoader or a list of batches"
        )
    for fitter in active:
        flush = getattr(fitter, "flush", None)
        if flush is not None:
            flush()


def pass_seed(seed: int, active: Sequence[Fitter], index: int) -> int:
    """Seed of the loader's shuffling and augmentation in pass ``index``.

    Statistics that take several passes need the same data in each pass, but training needs
    different data. Fitters share passes, so the seed varies once all active ones are ``varied``.
    """
    return seed + index if all(getattr(f, "varied", False) for f in active) else seed


def fit_rows(fitter: Fitter, batches: Iterable[tuple[Tensor, Tensor | None]]) -> int:
    """Run one fitter on ``batches`` of (features, labels); returns the number of passes.

    Raises:
        ArgumentTypeError: if they are something else, such as features alone.
    """
    return run_passes([fitter], lambda _active, _index: (([f], y) for f, y in _pairs(batches)))


def _pairs(batches: Any) -> Iterator[tuple[Tensor, Tensor | None]]:
    for batch in batches if is_iterable(batches) else [batches]:
        # A tensor of two entries could be unpacked as a pair.
        if not isinstance(batch, (tuple, list)) or len(batch) != 2:
            found = type(batch).__name__
            found += f" of length {len(batch)}" if isinstance(batch, (tuple, list)) else ""
            raise ArgumentTypeError(
                "fit(batches) takes a list or another iterable of pairs (features, labels), whose "
                f"labels may be None, but found a {found}; write fit([(features, labels)])"
            )
        yield batch[0], batch[1]
