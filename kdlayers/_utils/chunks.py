"""Rows by the chunk: what the fused operators share."""

from collections.abc import Iterator

import torch
from torch import Tensor

DEVICES = ("cpu", "cuda")
"""Where the fused operators run; elsewhere the plain operations do."""

_ENTRIES = {"cpu": 2**20}
"""Entries of a chunk [rows, K]: 4 MiB in float32, about a core's level-2 cache."""
_ENTRIES_ELSEWHERE = 2**24
"""On accelerators, where a chunk must keep the whole device busy: 64 MiB."""

LEAST_SCORES, LEAST_RATIO = 2**19, 4
"""Where the fused operators are faster, as measured on a CPU: from so many scores, and from so many
templates a channel. Below, the plain operations need little memory anyway."""


def worthwhile(rows: int, channels: int, templates: int) -> bool:
    """Whether the fused operators are faster than the plain ones."""
    return rows * templates >= LEAST_SCORES and templates >= LEAST_RATIO * channels


def chunks(rows: int, width: int, device: torch.device) -> Iterator[slice]:
    """Slices of ``rows`` rows such that chunks of ``width`` columns stay in the cache."""
    step = max(1, _ENTRIES.get(device.type, _ENTRIES_ELSEWHERE) // width)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def work_dtype(tensor: Tensor) -> torch.dtype:
    """Dtype of sums and of everything but the factors of matrix products: float32 or better."""
    return torch.promote_types(tensor.dtype, torch.float32)


def add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """``total += left @ right`` where the factors may have fewer digits than the sum."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right
