"""Sums and rows combined over the ranks of ``torch.distributed``; no-ops in a single process."""

import torch
from torch import Tensor
from torch import distributed as dist


def world_size() -> int:
    """Number of ranks; 1 outside ``torch.distributed``."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


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
