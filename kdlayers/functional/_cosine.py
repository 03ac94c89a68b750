"""Cosines whose gradient stays moderate where a vector is zero."""

import torch
from torch import Tensor

from kdlayers.functional import _checks as check

_EPS = 1e-12


def cosine(student: Tensor, teacher: Tensor, dim: int) -> Tensor:
    """Cosine along ``dim``, norms at least 1e-12; 0 without a gradient for zero vectors."""
    ours, theirs = (torch.linalg.vector_norm(value, dim=dim) for value in (student, teacher))
    # The bounds take a tenth of a small loss's time, so they are left out where they do nothing.
    if check.known_above(_EPS, ours) and check.known_above(_EPS, theirs):
        norms = ours * theirs
    else:
        norms = ours.clamp_min(_EPS) * theirs.clamp_min(_EPS)
        # Over infinity a zero vector gets no gradient; over the bound it would get a huge one.
        norms = norms.masked_fill((ours == 0) | (theirs == 0), torch.inf)
    found: Tensor = (student * teacher).sum(dim=dim) / norms
    return found
