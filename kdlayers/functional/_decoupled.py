"""Logits taken apart into the target class and the others, once for all terms that ask for it."""

from typing import NamedTuple

import torch
from torch import Tensor

from kdlayers.functional import _checks as check
from kdlayers.functional._checks import Reduction


class Decoupled(NamedTuple):
    """Logits over the temperature, of the labelled class and of the others."""

    target: Tensor
    """``[B, 1]``."""
    rest: Tensor
    """``[B, K - 1]``, in the order of the classes."""

    def binary(self) -> Tensor:
        """Log-probabilities of the target and of all others together, ``[B, 2]``.

        Taken from sums in log space, so saturated logits stay finite.
        """
        rest = self.rest.logsumexp(dim=1, keepdim=True)
        return torch.cat([self.target, rest], dim=1).log_softmax(dim=1)

    def others(self) -> Tensor:
        """Log-probabilities of the other classes among themselves, ``[B, K - 1]``."""
        return self.rest.log_softmax(dim=1)


def decouple(
    student: Tensor, teacher: Tensor, targets: Tensor, temperature: float
) -> tuple[Decoupled, Decoupled]:
    """Take the logits ``[B, K]`` of both apart, by the labels ``[B]``."""
    index = _target_first(targets, student.shape[1])
    gathered = [(logits / temperature).gather(1, index) for logits in (student, teacher)]
    ours, theirs = (Decoupled(logits[:, :1], logits[:, 1:]) for logits in gathered)
    return ours, theirs


def divergence(student: Tensor, teacher: Tensor, reduction: Reduction, factor: float) -> Tensor:
    """``factor`` times KL(teacher || student) of log-probabilities ``[B, n, ...]``, reduced."""
    elements = teacher.exp() * (teacher - student)
    if reduction == "mean":  # one sum over everything, then one product
        return elements.sum() * (factor * student.shape[1] / student.numel())
    return check.reduce(elements.sum(dim=1) * factor, reduction)


def _target_first(targets: Tensor, classes: int) -> Tensor:
    """Class indices ``[B, K]``: the label of each sample, then the other classes in order.

    Gathering beats masking with a large number: nothing depends on how large the logits are.
    """
    label = targets.unsqueeze(1)
    others = torch.arange(classes - 1, device=targets.device)
    return torch.cat([label, others + (others >= label)], dim=1)
