"""Warns once where images have several labels, and a loss compares a softmax over the classes."""

from collections.abc import Sequence

from torch import Tensor

from kdlayers._step.terms import Term
from kdlayers._utils.warn import warn
from kdlayers.losses import BinaryKDLoss
from kdlayers.losses._base import LogitLoss

ONE = 1.5
"""Rows of mixed labels sum to 1 up to rounding; two labels sum to 2."""


class SeveralLabels:
    """Reads the labels of the first step, which waits for their device."""

    def __init__(self, terms: Sequence[Term]) -> None:
        self.names = [term.name for term in terms if _is_softmax(term)]

    def look(self, labels: Tensor) -> None:
        """Take the labels of the first step, class indices or ``[B, classes]``."""
        names, self.names = self.names, []
        if labels.dim() != 2:
            return
        labels = labels.detach().float()
        most = float(labels.sum(dim=1).max())
        if most > ONE and labels.max() <= 1:  # not class indices
            warn(
                f"in {', '.join(names)}, the probabilities of all classes sum to 1, but the labels "
                f"of an image sum to {most:.3g}: it has several labels, as for binary "
                "cross-entropy. Compare independent classes with BinaryKDLoss(), or use KD layers "
                "(at=...) or losses on features"
            )


def _is_softmax(term: Term) -> bool:
    loss = term.loss
    return isinstance(loss, LogitLoss) and not isinstance(loss, BinaryKDLoss)
