"""The losses of torchdistill, with the arguments of ours; empty if it is not installed."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
_LOGITS = ("out", "output", "out", "output")
_PLACE = {"module_path": "out", "io": "output"}
_BOTH = {
    "input": {"is_from_teacher": False, **_PLACE},
    "target": {"is_from_teacher": True, **_PLACE},
}


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
        "KD on class maps": mid_level.KDLoss(*_LOGITS, 4.0, alpha=0.0),
        "FeatureLoss, mse": mid_level.SimpleLossWrapper(nn.MSELoss(), **_BOTH),
    }
    return {name: _in_our_order(loss) for name, loss in made.items()}


def _in_our_order(loss: Callable[..., Tensor]) -> Loss:
    def call(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        return loss({"out": {"output": student}}, {"out": {"output": teacher}}, labels)

    return call
