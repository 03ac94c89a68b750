"""k-means in memory: Lloyd iterations over growing parts of the rows, seeded and deterministic."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from kdlayers._targets.distances import (
    SUMMED,
    Search,
    nearest,
    nearest_index,
    sums_by_index,
)
from kdlayers._targets.seeding import seeds

EXACT_LIMIT = 64
"""Up to this many centres Lloyd iterates over all rows until nothing changes."""
ITERATIONS, EARLY_ITERATIONS = 300, 50
TOLERANCE, WARM_TOLERANCE = 1e-3, 5e-3
"""Iterations end when one lowers the inertia by less than this share of it. The second share is for
stages on a part of the rows or channels, which are followed by another stage."""
SEED_ROWS, FIRST_ROWS, GROWTH = 16, 32, 4
"""Rows for each centre to draw seeds from, rows for each centre in the first stage, and the factor
by which the rows grow from stage to stage."""
NARROW_WIDTH, NARROW_SHARE = 96, 0.9
"""Wider rows are first clustered on the principal axes that hold this share of the variance."""


class Clustering(NamedTuple):
    """Result of k-means."""

    centers: Tensor
    """[K, D]."""
    counts: Tensor
    """Number of rows assigned to each centre, int64 [K]."""
    inertia: Tensor
    """Mean squared distance of the rows to their centres, a float64 scalar."""


def kmeans(rows: Tensor, k: int, seed: int) -> Clustering:
    """Cluster rows [n, D], n >= ``k``; equal rows, order and seed give equal centres.

    Many centres are seeded on a random part of the rows. Then Lloyd iterations run on growing
    parts, because the first iterations do not need all rows (nested mini-batches: Newling and
    Fleuret, NIPS 2016).
    """
    generator = torch.Generator().manual_seed(seed)
    if k <= EXACT_LIMIT:
        return lloyd(rows, rows[seeds(rows, k, generator)])
    # A sorted sample holds equal rows, such as those of dark margins, side by side.
    order = torch.randperm(len(rows), generator=generator, device="cpu").to(rows.device)
    first = rows[order[: SEED_ROWS * k]]
    centers = first[seeds(first, k, generator)]
    warm = _warm_narrow if rows.shape[1] > NARROW_WIDTH else _warm
    return lloyd(rows, warm(rows, order, centers), tolerance=TOLERANCE)


def lloyd(rows: Tensor, centers: Tensor, *, tolerance: float = 0.0) -> Clustering:
    """Lloyd iterations from ``centers``, then the counts and the inertia."""
    centers = _iterate(rows, centers, tolerance)
    distances, index = nearest(rows, centers)
    counts = torch.bincount(index, minlength=len(centers))
    return Clustering(centers, counts, distances.double().mean())


def mean_centers(sums: Tensor, counts: Tensor, fallback: Tensor) -> Tensor:
    """Means from sums [K, D] and counts [K]; the row of ``fallback`` where a count is 0."""
    means = (sums / counts.clamp(min=1).unsqueeze(1)).to(fallback.dtype)
    return torch.where(counts.unsqueeze(1) > 0, means, fallback)


def principal_axes(rows: Tensor, share: float = 1.0) -> tuple[Tensor, Tensor]:
    """Principal axes [D, d] that hold ``share`` of the variance, and the mean of the rows.

    The axes are ordered by decreasing variance. Their number is the smallest possible, rounded up
    to a multiple of 16 (at most D).
    """
    mean = rows.mean(dim=0)
    gram = rows.new_zeros(rows.shape[1], rows.shape[1])
    for part in rows.split(SUMMED):
        gram.addmm_((part - mean).T, part - mean)
    values, vectors = torch.linalg.eigh(gram)
    held = values.flip(0).clamp(min=0).cumsum(0)
    enough = int((held < share * held[-1]).sum()) + 1
    return vectors.flip(1)[:, : -(-enough // 16) * 16].contiguous(), mean


def _warm(rows: Tensor, order: Tensor, centers: Tensor) -> Tensor:
    """Iterate over growing parts of the rows, taken in ``order``."""
    size = FIRST_ROWS * len(centers)
    while size < len(rows):
        centers = _iterate(rows[order[:size]], centers, WARM_TOLERANCE)
        size *= GROWTH
    return centers


def _warm_narrow(rows: Tensor, order: Tensor, centers: Tensor) -> Tensor:
    """Cluster the principal components of the rows; returns the means of these clusters."""
    axes, mean = principal_axes(rows[order[: FIRST_ROWS * len(centers)]], NARROW_SHARE)
    if 2 * axes.shape[1] > rows.shape[1]:
        return _warm(rows, order, centers)
    narrow = torch.cat([(part - mean) @ axes for part in rows.split(SUMMED)])
    start = _warm(narrow, order, (centers - mean) @ axes)
    start = _iterate(narrow, start, WARM_TOLERANCE)
    index = nearest_index(narrow, start)
    counts = torch.bincount(index, minlength=len(centers))
    return mean_centers(sums_by_index(rows, index, len(centers)), counts, centers)


def _iterate(rows: Tensor, centers: Tensor, tolerance: float) -> Tensor:
    """Lloyd iterations until no row changes its centre, or the inertia hardly falls.

    Centres without rows move to the rows that are farthest from their centres.
    """
    origin = rows.mean(dim=0)
    norms = sum(float((part - origin).double().square().sum()) for part in rows.split(SUMMED))
    before, inertia = None, math.inf
    for _ in range(EARLY_ITERATIONS if tolerance else ITERATIONS):
        index, sums, closest = _assign(rows, centers, origin)
        counts = torch.bincount(index, minlength=len(centers))
        previous, inertia = inertia, norms - 2 * closest
        dead = bool((counts == 0).any())
        if not dead and before is not None and torch.equal(index, before):
            break
        before, moved = index, mean_centers(sums + counts.unsqueeze(1) * origin, counts, centers)
        if dead:
            distances = nearest(rows, centers)[0]
            if not bool((distances > 0).any()):
                break
            moved = _revive(rows, moved, counts, distances)
        centers = moved
        if tolerance and not dead and inertia > (1 - tolerance) * previous:
            break
    return centers


def _assign(rows: Tensor, centers: Tensor, origin: Tensor) -> tuple[Tensor, Tensor, float]:
    """Nearest centre of each row, sums of each centre's rows minus the origin, summed closeness."""
    search = Search(centers, origin)
    sums = torch.zeros_like(centers, dtype=torch.float64)
    indices, total = [], torch.zeros((), dtype=torch.float64, device=rows.device)
    for part in rows.split(SUMMED):
        moved = part - origin
        value, index = search.best(moved)
        sums += sums_by_index(moved, index, len(centers))
        total += value.sum(dtype=torch.float64)
        indices.append(index)
    return torch.cat(indices), sums, float(total)


def _revive(rows: Tensor, centers: Tensor, counts: Tensor, distances: Tensor) -> Tensor:
    dead = (counts == 0).nonzero().squeeze(1)
    centers = centers.clone()
    centers[dead] = rows[distances.topk(len(dead)).indices]
    return centers
