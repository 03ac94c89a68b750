"""Cosines whose gradient stays moderate where a vector is zero."""

import torch
from torch import Tensor

from kdlayers.functional import _checks as check


def cosine(student: Tensor, teacher: Tensor, dim: int, eps: float = 1e-12) -> Tensor:
    """Cosine along ``dim``, norms at least ``eps``; 0 without a gradient for zero vectors."""
    ours, theirs = (torch.linalg.vector_norm(value, dim=dim) for value in (student, teacher))
    # The bounds take a tenth of a small loss's time, so they are left out where they do nothing.
    if check.known_above(eps, ours) and check.known_above(eps, theirs):
        norms = ours * theirs
    else:
        norms = ours.clamp_min(eps) * theirs.clamp_min(eps)
        # Over infinity a zero vector gets no gradient; over the bound it would get a huge one.
        norms = norms.masked_fill((ours == 0) | (theirs == 0), torch.inf)
    found: Tensor = (student * teacher).sum(dim=dim) / norms
    return found
