"""Chunks of rows that fit the cache, for everything that makes a matrix [rows, templates]."""

from collections.abc import Iterator

import torch
from torch import Tensor

DEVICES = ("cpu", "cuda")
"""Devices of the fused operators; others run the plain operations."""

_ENTRIES = {"cpu": 2**20}
"""Entries of a chunk [rows, K]: 4 MiB in float32, about a core's level-2 cache."""
_ENTRIES_ELSEWHERE = 2**24
"""On accelerators a chunk must keep the whole device busy: 64 MiB."""

LEAST_SCORES, LEAST_RATIO = 2**19, 4
"""The fused operators are faster from this many scores and templates per channel on, measured on a
CPU. With fewer, the plain operations need little memory anyway."""


def chunks(rows: int, width: int, device: torch.device) -> Iterator[slice]:
    """Slices of ``rows`` rows whose chunks of ``width`` columns stay in the cache."""
    step = max(1, _ENTRIES.get(device.type, _ENTRIES_ELSEWHERE) // width)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """``total += left @ right``; the factors may have a narrower type than the sum."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right
