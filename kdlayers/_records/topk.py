r"""Logits of many classes in few bytes: the largest, and the probability of the others together.

Stored are the :math:`k` largest log probabilities, the log of the remaining probability, and the
normaliser. When they are read back, the other classes share the rest equally:

.. math::
    z_c = \log p_c + \log \sum_j e^{z_j} \text{ for the } k \text{ largest}, \qquad
    z_c = \log \frac{1 - \sum_{\text{kept}} p_j}{K - k} + \log \sum_j e^{z_j} \text{ otherwise.}

So the kept logits are exact, and the probabilities sum to one.
"""

import torch
from torch import Tensor

from kdlayers.losses import BinaryKDLoss, DistillLoss


def compress(logits: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """``[B, K]`` to values ``[B, k + 2]`` and the kept classes ``[B, k]``, in int32."""
    logits = logits.float()
    total = logits.logsumexp(1, keepdim=True)
    order = logits.argsort(dim=1, descending=True, stable=True)
    kept, others = order[:, :k], order[:, k:]
    top = logits.gather(1, kept) - total
    rest = (logits.gather(1, others) - total).logsumexp(1, keepdim=True)
    return torch.cat([top, rest, total], 1), kept.int()


def expand(values: Tensor, kept: Tensor, classes: int) -> Tensor:
    """The logits ``[B, classes]``, in float32, from the output of :func:`compress`."""
    values, k = values.float(), kept.shape[1]
    top, rest, total = values[:, :k], values[:, k : k + 1], values[:, k + 1 :]
    others = torch.tensor(float(classes - k), device=values.device).log()
    logits = (rest - others).expand(-1, classes).clone()
    return logits.scatter_(1, kept.long(), top) + total


def why_unsuited(loss: DistillLoss) -> str | None:
    """Why ``loss`` would be far off if it read logits from :func:`expand`; None if it may."""
    compared = getattr(loss, "base", loss)
    if isinstance(compared, BinaryKDLoss):
        return "compares every class on its own, but all small logits share one value"
    if getattr(compared, "standardize", False):
        return "standardises the logits, but the standard deviation of the small ones is lost"
    return None if loss.on_logits else "does not compare probabilities"
