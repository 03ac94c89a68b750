"""A callback of Lightning that fits a handle and keeps its state in checkpoints."""

import sys
from collections.abc import Iterable
from importlib import import_module
from typing import Any

from kdlayers._step.handle import KDHandle
from kdlayers.errors import CheckpointError

_NAMES = ("lightning.pytorch", "pytorch_lightning")
"""Lightning's two packages have separate classes; the script has imported one of them."""
_pl: Any = import_module(next((name for name in _NAMES if name in sys.modules), _NAMES[0]))
_Callback: Any = _pl.Callback

KEY = "kdlayers"
"""Where the handles' states are in a checkpoint; Lightning's own place takes one of a class."""


class KDCallback(_Callback):  # pyright: ignore[reportUntypedBaseClass]
    """Moves the teachers to the device, calls ``kd.fit`` once, and saves ``kd.state_dict()``.

    The handle's state is part of Lightning's checkpoints. A resumed run loads it before ``kd.fit``,
    which then has nothing to fit. Several handles need a callback each, in the same order in the
    resumed run.

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

    def on_save_checkpoint(
        self,
        trainer: Any,  # noqa: ARG002
        pl_module: Any,  # noqa: ARG002
        checkpoint: dict[str, Any],
    ) -> None:
        """Save the targets, the train-only parameters and the step, in the order of callbacks."""
        checkpoint.setdefault(KEY, []).append(self.kd.state_dict())

    def on_load_checkpoint(
        self,
        trainer: Any,
        pl_module: Any,  # noqa: ARG002
        checkpoint: dict[str, Any],
    ) -> None:
        """Load what :meth:`on_save_checkpoint` has saved; other checkpoints have nothing to load.

        Raises:
            CheckpointError: if it was saved with another number of these callbacks.
        """
        states = checkpoint.get(KEY)
        if states is None:
            return
        callbacks = [each for each in trainer.callbacks if isinstance(each, KDCallback)]
        if len(states) != len(callbacks):
            raise CheckpointError(
                f"the checkpoint has the states of {len(states)} KDCallbacks, but the trainer has "
                f"{len(callbacks)}; pass Trainer(callbacks=...) the same ones in the same order"
            )
        self.kd.load_state_dict(states[callbacks.index(self)])
