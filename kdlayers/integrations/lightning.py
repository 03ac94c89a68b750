"""A callback of Lightning that fits a handle and keeps its state in checkpoints."""

import sys
from collections.abc import Iterable
from importlib import import_module
from typing import Any

from kdlayers._step.handle import KDHandle

_NAMES = ("lightning.pytorch", "pytorch_lightning")
"""The two packages have classes of their own: of the one that the script has imported."""
_pl: Any = import_module(next((name for name in _NAMES if name in sys.modules), _NAMES[0]))
_Callback: Any = _pl.Callback


class KDCallback(_Callback):  # pyright: ignore[reportUntypedBaseClass]
    """Moves the teachers to the device, calls ``kd.fit`` once, and saves ``kd.state_dict()``.

    The handle's state is part of Lightning's checkpoints. A resumed run has it before `fit`, which
    then finds nothing left to fit.

    Args:
        kd: the handle.
        loader: for :meth:`KDHandle.fit`; ``None``: nothing needs to be fitted.
    """

    def __init__(self, kd: KDHandle, loader: Iterable[Any] | None = None) -> None:
        self.kd = kd
        self.loader = loader

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """The model is on its device by now, the processes are connected, checkpoints loaded."""
        for teacher in self.kd._teachers:  # pyright: ignore[reportPrivateUsage]
            teacher.model.to(pl_module.device)
        if self.loader is not None:
            self.kd.fit(self.loader, progress=trainer.is_global_zero)

    def state_dict(self) -> dict[str, Any]:
        """Targets, train-only parameters and the step."""
        return self.kd.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """What :meth:`state_dict` gave."""
        self.kd.load_state_dict(state_dict)
