"""Sums and rows combined over the ranks of ``torch.distributed``; no-ops in a single process."""

from collections.abc import Callable, Generator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch import distributed as dist

from kdlayers.errors import KDLayersError, RecordError

T = TypeVar("T")
_ALONE: list[bool] = []


def connected() -> bool:
    """Whether this process is a rank of ``torch.distributed``, even if it is the only one."""
    return dist.is_available() and dist.is_initialized()


def world_size() -> int:
    """Number of ranks; 1 outside ``torch.distributed``, and inside `alone`."""
    return dist.get_world_size() if connected() and not _ALONE else 1


@contextmanager
def alone() -> Generator[None, None, None]:
    """Exchange nothing inside the block, which other ranks may not run."""
    _ALONE.append(True)
    try:
        yield
    finally:
        _ALONE.pop()


def rank() -> int:
    """Index of this process; 0 outside ``torch.distributed``."""
    return dist.get_rank() if world_size() > 1 else 0


def all_sum(tensor: Tensor) -> Tensor:
    """Sum of ``tensor`` over all ranks, the same on each; the tensor itself in one process."""
    if world_size() > 1:
        tensor = tensor.clone()
        dist.all_reduce(tensor)
    return tensor


def all_rows(rows: Tensor) -> Tensor:
    """Rows of all ranks, one rank after the other; ranks may hold different numbers of rows."""
    if world_size() == 1:
        return rows
    counts = rows.new_zeros(world_size(), dtype=torch.long)
    counts[rank()] = len(rows)
    dist.all_reduce(counts)
    padded = rows.new_zeros((int(counts.max()), *rows.shape[1:]))
    padded[: len(rows)] = rows
    parts = [torch.empty_like(padded) for _ in range(world_size())]
    dist.all_gather(parts, padded)
    return torch.cat([part[:count] for part, count in zip(parts, counts.tolist(), strict=True)])


def everywhere(value: T) -> list[T]:
    """The values of all ranks, by rank; a list of one in a single process."""
    if world_size() == 1:
        return [value]
    found: list[Any] = [None] * world_size()
    dist.all_gather_object(found, value)
    return found


def together(work: Callable[[], T], error: type[KDLayersError] = RecordError) -> T:
    """Call ``work`` on every rank and wait for all; an error on one rank raises on all ranks.

    Raises:
        KDLayersError: of type ``error``, on the ranks that did not fail, if another did.
    """
    failure: Exception | None = None
    results: list[T] = []
    try:
        results.append(work())
    except Exception as raised:  # the other ranks must not wait for this one
        failure = raised
    said = everywhere(None if failure is None else str(failure))
    if failure is not None:
        raise failure
    for index, text in enumerate(said):
        if text is not None:
            raise error(f"rank {index} failed: {text}")
    return results[0]
