"""Safe norms and cosines: a zero vector maps to zero and gets no gradient."""

import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor
from torch.jit import is_scripting, is_tracing  # type: ignore[attr-defined]

from kdlayers._utils.torch_internals import in_transform

# A single node in graphs of torch.fx: it asks for the dtype and whether gradients are on.
torch.fx.wrap("inverse_norm")

EPS = 1e-12  # TorchScript, which compiles the functions below, needs the number itself


def inverse(norms: Tensor) -> Tensor:
    """``1 / max(norm, 1e-12)``, and 0 for the norm 0.

    Dividing by the bound alone also maps zeros to zeros, but multiplies their gradient by 1e12.
    """
    return torch.where(norms > 0, norms.clamp_min(1e-12).reciprocal(), 0.0)


def inverse_norm(vectors: Tensor) -> Tensor:
    """`inverse` of the norms over the last axis, kept as an axis, in float32 or better."""
    if vectors.dtype != torch.float64:
        vectors = vectors.float()
    norms: Tensor = torch.linalg.vector_norm(vectors, dim=-1, keepdim=True)
    derived = torch.is_grad_enabled() or is_tracing()  # one graph for both modes
    if not is_scripting():
        derived = derived or in_transform()  # forward-mode AD does not need gradients to be on
    if derived:
        return inverse(norms)
    return norms.clamp_min_(1e-12).reciprocal_()  # no gradient to keep at 0: half the operations


def cosines(vectors: Tensor, weight: Tensor, scale: Tensor) -> Tensor:
    """Cosines of ``vectors`` ``[..., C]`` with the rows of ``weight``, times ``scale``."""
    unit = (weight * inverse_norm(weight)).to(weight.dtype)
    product = F.linear(vectors, unit)
    return (product * (inverse_norm(vectors) * scale)).to(product.dtype)
