"""A callback of Lightning that fits a handle and keeps its state in checkpoints."""

import sys
from collections.abc import Iterable
from importlib import import_module
from typing import Any

from kdlayers._step.handle import KDHandle

_NAMES = ("lightning.pytorch", "pytorch_lightning")
"""Lightning's two packages have separate classes; the script has imported one of them."""
_pl: Any = import_module(next((name for name in _NAMES if name in sys.modules), _NAMES[0]))
_Callback: Any = _pl.Callback


class KDCallback(_Callback):  # pyright: ignore[reportUntypedBaseClass]
    """Moves the teachers to the device, calls ``kd.fit`` once, and saves ``kd.state_dict()``.

    The handle's state is part of Lightning's checkpoints. A resumed run loads it before ``kd.fit``,
    which then has nothing to fit.

    Args:
        kd: the handle.
        loader: for :meth:`KDHandle.fit`; ``None``: nothing needs to be fitted.
    """

    def __init__(self, kd: KDHandle, loader: Iterable[Any] | None = None) -> None:
        self.kd = kd
        self.loader = loader

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Fit now: the model is on its device, processes are connected, checkpoints are loaded."""
        for teacher in self.kd._teachers:  # pyright: ignore[reportPrivateUsage]
            teacher.model.to(pl_module.device)
        if self.loader is not None:
            self.kd.fit(self.loader, progress=trainer.is_global_zero)

    def state_dict(self) -> dict[str, Any]:
        """Return the targets, the train-only parameters and the step."""
        return self.kd.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what :meth:`state_dict` has returned."""
        self.kd.load_state_dict(state_dict)
