"""Splits logits into the target class and the others, once for all terms that need this."""

from typing import NamedTuple

import torch
from torch import Tensor


class Decoupled(NamedTuple):
    """Logits over the temperature, of the labelled class and of the others."""

    target: Tensor
    """``[B, 1]``."""
    rest: Tensor
    """``[B, K - 1]``, in the order of the classes."""

    def binary(self) -> Tensor:
        """Log-probabilities of the target and of all others together, ``[B, 2]``.

        Sums are taken in log space, so saturated logits stay finite.
        """
        rest = self.rest.logsumexp(dim=1, keepdim=True)
        return torch.cat([self.target, rest], dim=1).log_softmax(dim=1)

    def others(self) -> Tensor:
        """Log-probabilities of the other classes among themselves, ``[B, K - 1]``."""
        return self.rest.log_softmax(dim=1)


def decouple(
    student: Tensor, teacher: Tensor, targets: Tensor, temperature: float
) -> tuple[Decoupled, Decoupled]:
    """Split the logits ``[B, K]`` of both by the labels ``[B]``."""
    label = targets.unsqueeze(1)
    others = torch.arange(student.shape[1] - 1, device=targets.device)
    # The label first, then the other classes in order. Gathering needs no large number as a mask.
    index = torch.cat([label, others + (others >= label)], dim=1)
    gathered = [(logits / temperature).gather(1, index) for logits in (student, teacher)]
    ours, theirs = (Decoupled(logits[:, :1], logits[:, 1:]) for logits in gathered)
    return ours, theirs
