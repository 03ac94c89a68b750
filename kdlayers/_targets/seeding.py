"""k-means++ seeding: one by one for few centres, in rounds for many centres."""

import math

import torch
from torch import Tensor

from kdlayers._targets.distances import closeness, nearest

GREEDY_LIMIT = 512
"""Up to this many centres are seeded one by one, each as the best of a few candidates. More centres
are seeded in rounds."""


def seeds(rows: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """Indices of ``k`` rows to use as initial centres."""
    choose = _greedy_seeds if k <= GREEDY_LIMIT else _rejection_seeds
    return choose(rows, k, generator)


def _greedy_seeds(rows: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """Indices of ``k`` rows by greedy k-means++ (Arthur and Vassilvitskii, SODA 2007, section 5).

    Each step draws 2 + ln k candidates with probability proportional to the squared distance to the
    chosen rows, and takes the one with the smallest resulting sum of squared distances.
    """
    moved = rows - rows.mean(dim=0)
    norms = moved.square().sum(dim=1, keepdim=True)
    index = _draw(rows.new_ones(len(rows)), 1, generator)
    chosen, distances = [index], _to_few(moved, norms, index)
    for _ in range(k - 1):
        candidates = _draw(distances.squeeze(1), 2 + int(math.log(k)), generator)
        reached = torch.minimum(distances, _to_few(moved, norms, candidates))
        best = reached.sum(dim=0).argmin().reshape(1)
        chosen.append(candidates[best])
        distances = reached[:, best]
    return torch.cat(chosen)


def _to_few(rows: Tensor, norms: Tensor, index: Tensor) -> Tensor:
    """Squared distances [n, m] of rows with squared norms [n, 1] to a few of them."""
    return torch.addmm(norms + norms[index].T, rows, rows[index].T, alpha=-2).clamp_(min=0)


def _rejection_seeds(rows: Tensor, k: int, generator: torch.Generator) -> Tensor:
    """Indices of ``k`` rows by k-means++, in rounds of one matrix product each.

    As in k-means|| (Bahmani et al., VLDB 2012), a round draws many rows with probability
    proportional to their squared distances at its start. A row is accepted with probability d / d0.
    Here d0 is its squared distance at the start of the round, and d the one to all rows chosen or
    accepted so far. This is exactly the distribution of drawing rows one by one.
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
    squares = (candidates - candidates.mean(dim=0)).square().sum(dim=1, keepdim=True)
    between = (squares - 2 * closeness(candidates, candidates)).clamp(min=0).cpu()
    start, current = distances.cpu(), distances.cpu()
    thresholds = _uniform(len(start), generator) * start
    accepted: list[int] = []
    for i, threshold in enumerate(thresholds.tolist()):
        # Always accept the first, even if all distances are 0 (fewer distinct rows than k).
        if not accepted or threshold < float(current[i]):
            accepted.append(i)
            current = torch.minimum(current, between[i])
    return torch.tensor(accepted, device=candidates.device)


def _draw(weights: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Draw indices [count] in proportion to ``weights`` [n], on the CPU for equal results."""
    totals = weights.double().cpu().cumsum(dim=0)
    if not totals[-1] > 0:
        totals = torch.arange(1, len(weights) + 1, dtype=torch.float64, device="cpu")
    points = _uniform(count, generator) * totals[-1]
    index = torch.searchsorted(totals, points, right=True).clamp(max=len(weights) - 1)
    return index.to(weights.device)


def _uniform(count: int, generator: torch.Generator) -> Tensor:
    """Numbers in 0..1 on the CPU, whatever the default device."""
    return torch.rand(count, generator=generator, dtype=torch.float64, device="cpu")
