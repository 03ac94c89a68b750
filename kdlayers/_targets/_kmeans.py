"""k-means in memory: k-means++ seeding and Lloyd iterations, seeded and free of global state."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from kdlayers._targets._distances import closeness, nearest, sums_by_index

GREEDY_LIMIT = 512
"""Up to this many centres are seeded one by one, the best of a few candidates each time, and Lloyd
runs until nothing changes; more centres are seeded in rounds, and Lloyd stops early."""
ITERATIONS, EARLY_ITERATIONS = 300, 50
EARLY_TOLERANCE = 1e-4
"""Stopping early: when an iteration lowers the inertia by less than this part of it."""


class Clustering(NamedTuple):
    """Result of k-means."""

    centers: Tensor
    """[K, D]."""
    counts: Tensor
    """Rows whose nearest centre it is, int64 [K]."""
    inertia: Tensor
    """Mean squared distance of the rows to their centres, a float64 scalar."""


def kmeans(rows: Tensor, k: int, seed: int) -> Clustering:
    """Cluster rows [n, D], n >= ``k``; equal rows, order and seed give equal centres."""
    generator = torch.Generator().manual_seed(seed)
    choose = _greedy_seeds if k <= GREEDY_LIMIT else _rejection_seeds
    return lloyd(rows, rows[choose(rows, k, generator)])


def lloyd(rows: Tensor, centers: Tensor) -> Clustering:
    """Lloyd iterations from ``centers``; one without rows moves to a row far from its own."""
    early = len(centers) > GREEDY_LIMIT
    limit, tolerance = (EARLY_ITERATIONS, EARLY_TOLERANCE) if early else (ITERATIONS, 0.0)
    previous = math.inf
    for step in range(limit + 1):
        distances, index = nearest(rows, centers)
        inertia = distances.double().mean()
        counts = torch.bincount(index, minlength=len(centers))
        value = float(inertia)
        movable = bool((counts == 0).any()) and bool((distances > 0).any())
        converged = step > 0 and not movable and previous - value <= tolerance * previous
        if converged or step == limit:
            break
        previous = value
        centers = mean_centers(sums_by_index(rows, index, len(centers)), counts, centers)
        centers = _revive(rows, centers, counts, distances)
    return Clustering(centers, counts, inertia)


def mean_centers(sums: Tensor, counts: Tensor, fallback: Tensor) -> Tensor:
    """Means out of sums [K, D] and counts [K]; where a count is 0, the row of ``fallback``."""
    means = (sums / counts.clamp(min=1).unsqueeze(1)).to(fallback.dtype)
    return torch.where(counts.unsqueeze(1) > 0, means, fallback)


def _revive(rows: Tensor, centers: Tensor, counts: Tensor, distances: Tensor) -> Tensor:
    dead = (counts == 0).nonzero().squeeze(1)
    if len(dead):
        centers = centers.clone()
        centers[dead] = rows[distances.topk(len(dead)).indices]
    return centers


def _greedy_seeds(rows: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """Indices of ``k`` rows by greedy k-means++ (Arthur and Vassilvitskii, SODA 2007, section 5).

    Each step draws 2 + ln k candidates in proportion to their squared distance to the chosen ones
    and takes the one that leaves the smallest sum of squared distances.
    """
    chosen = [_draw(rows.new_ones(len(rows)), 1, generator)]
    distances = nearest(rows, rows[chosen[0]])[0]
    for _ in range(k - 1):
        candidates = _draw(distances, 2 + int(math.log(k)), generator)
        reached = torch.minimum(distances.unsqueeze(1), _all_distances(rows, rows[candidates]))
        best = reached.sum(dim=0, dtype=torch.float64).argmin()
        chosen.append(candidates[best].reshape(1))
        distances = torch.minimum(distances, nearest(rows, rows[chosen[-1]])[0])
    return torch.cat(chosen)


def _rejection_seeds(rows: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """Indices of ``k`` rows by k-means++, in rounds of one matrix product each.

    As in k-means|| (Bahmani et al., VLDB 2012) a round draws many rows by the squared distances at
    its start. Each is then accepted with the probability by which the rows accepted before it in
    the round have shrunk its squared distance, which gives exactly the distribution of drawing them
    one after the other.
    """
    chosen = _draw(rows.new_ones(len(rows)), 1, generator)
    distances = nearest(rows, rows[chosen])[0]
    while len(chosen) < k:
        candidates = _draw(distances, min(1024, max(8, len(chosen) // 4)), generator)
        accepted = _accept(rows[candidates], distances[candidates], generator)
        new = candidates[accepted][: k - len(chosen)]
        chosen = torch.cat([chosen, new])
        distances = torch.minimum(distances, nearest(rows, rows[new])[0])
    return chosen


def _accept(candidates: Tensor, distances: Tensor, generator: torch.Generator) -> Tensor:
    """Which candidates [m, D] pass, given their distances [m] at the start of the round."""
    between = _all_distances(candidates, candidates).cpu()
    start, current = distances.cpu(), distances.cpu()
    thresholds = torch.rand(len(start), generator=generator, dtype=torch.float64) * start
    accepted: list[int] = []
    for i, threshold in enumerate(thresholds.tolist()):
        # The first is accepted always, also when all distances are 0 (fewer distinct rows than k).
        if not accepted or threshold < float(current[i]):
            accepted.append(i)
            current = torch.minimum(current, between[i])
    return torch.tensor(accepted, device=candidates.device)


def _all_distances(rows: Tensor, centers: Tensor) -> Tensor:
    """Squared distances [n, m], for few centres."""
    squares = (rows - centers.mean(dim=0)).square().sum(dim=1, keepdim=True)
    return (squares - 2 * closeness(rows, centers)).clamp(min=0)


def _draw(weights: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Indices [count] drawn in proportion to ``weights`` [n]; on the CPU, the same everywhere."""
    totals = weights.double().cpu().cumsum(dim=0)
    if not totals[-1] > 0:
        totals = torch.arange(1, len(weights) + 1, dtype=torch.float64)
    points = torch.rand(count, generator=generator, dtype=torch.float64) * totals[-1]
    index = torch.searchsorted(totals, points, right=True).clamp(max=len(weights) - 1)
    return index.to(weights.device)
