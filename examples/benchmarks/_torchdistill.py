"""The losses of torchdistill, called as ours are; none of them if it is not installed."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
_LOGITS = ("out", "output", "out", "output")


def torchdistill_losses() -> dict[str, Loss]:
    """By the name of our loss in the tables."""
    try:
        from torchdistill.losses import mid_level
    except ImportError:
        return {}
    made = {  # alpha=0: no cross-entropy
        "KD": mid_level.KDLoss(*_LOGITS, 4.0, alpha=0.0),
        "mutual": mid_level.KDLoss(*_LOGITS, 1.0, alpha=0.0),
        "KD, standardised": mid_level.LogitStdKDLoss(*_LOGITS, 4.0, alpha=0.0),
        "DIST": mid_level.DISTLoss(*_LOGITS),
        "RKD": mid_level.RKDLoss("out", "out", 25.0, 50.0, "mean"),
        "similarity-preserving": mid_level.SPKDLoss("out", "out", "batchmean"),
    }
    return {name: _in_our_order(loss) for name, loss in made.items()}


def _in_our_order(loss: Callable[..., Tensor]) -> Loss:
    def call(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        return loss({"out": {"output": student}}, {"out": {"output": teacher}}, labels)

    return call
