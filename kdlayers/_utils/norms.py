"""Lengths to divide vectors by, where zeros stay zeros: the rule of every cosine here."""

import torch
from torch import Tensor

from kdlayers._utils.chunks import work_dtype


def inverse(norms: Tensor, eps: float = 1e-12) -> Tensor:
    """``1 / max(norm, eps)``, and 0 for the norm 0.

    The bound alone would keep zeros as they are too, but divide the gradient that reaches them by
    eps. Where there is no gradient `safe_norm` takes three operations fewer.
    """
    return torch.where(norms > 0, norms.clamp_min(eps).reciprocal(), 0.0)


def inverse_norm(vectors: Tensor) -> Tensor:
    """`inverse` of the norms over the last axis, kept as an axis, in float32 or better."""
    if vectors.dtype != torch.float64:
        vectors = vectors.float()
    return inverse(torch.linalg.vector_norm(vectors, dim=-1, keepdim=True))


def safe_norm(vectors: Tensor) -> Tensor:
    """What to divide vectors by that take no gradient: norms over the last axis, 1e-12 at least."""
    work = work_dtype(vectors)
    norm: Tensor = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True, dtype=work)
    return norm.clamp_min_(1e-12)
