"""What the values of an output say about it: probabilities, and vectors of length 1."""

import torch
from torch import Tensor

from kdlayers._utils.torch_internals import is_functional, plain


def is_softmax(shares: Tensor, logits: Tensor) -> bool:
    """Whether ``shares`` are the probabilities of ``logits``; the first image shows it."""
    shares, logits = (plain(tensor)[:1].detach() for tensor in (shares, logits))
    if shares.device != logits.device or not _have_values(shares):
        return False
    return torch.allclose(shares, logits.to(shares).softmax(1), rtol=0, atol=1e-5)


def are_probabilities(output: Tensor) -> bool:
    """Whether the values of all classes are 0 or more and sum to 1, as after a softmax."""
    output = plain(output).detach().float()
    if output.dim() < 2 or output.shape[1] < 2 or not _have_values(output):
        return False
    one = torch.ones((), device=output.device)
    return bool((output >= 0).all()) and torch.allclose(output.sum(1), one, rtol=0, atol=1e-2)


def have_unit_length(output: Tensor) -> bool:
    """Whether these are vectors of length 1 up to rounding, as CLIP returns, rather than logits."""
    output = plain(output).detach()
    if output.dim() != 2 or not output.is_floating_point() or not _have_values(output):
        return False
    epsilon = torch.finfo(output.dtype).eps
    output = output if output.dtype == torch.float64 else output.float()
    return bool(output.norm(dim=1).sub(1).abs().max() < 4 * epsilon)


def _have_values(tensor: Tensor) -> bool:
    """Whether the values can be read: not those of meta, fake and functional tensors."""
    real = type(tensor) is Tensor and not tensor.is_meta and not is_functional(tensor)
    return real and bool(tensor.numel())
