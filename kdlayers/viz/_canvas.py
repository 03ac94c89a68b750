"""Empty figures, and what all figures share; matplotlib is imported here and nowhere else."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from kdlayers.errors import MissingPackageError

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

NAMED = 30
"""Up to so many classes are named along an axis."""


def new_figure(caller: str, width: float, height: float) -> Figure:
    """An empty figure of this size in inches, which no global state of pyplot knows.

    Raises:
        MissingPackageError: if matplotlib is not installed; names the ``caller``.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingPackageError(
            f"{caller}() draws with matplotlib, which cannot be imported ({error}); type pip "
            'install "kdlayers[viz]", or use the functions of kdlayers.viz that give tensors and '
            "need no matplotlib"
        ) from error
    return Figure(figsize=(width, height), layout="constrained")


def drawable(tensor: Tensor) -> Any:
    """``tensor`` as an array that matplotlib can draw."""
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy()


def bare(axes: Axes) -> None:
    """No ticks."""
    axes.set_xticks([])
    axes.set_yticks([])


def name_classes(axes: Axes, names: Sequence[str], size: int, columns: bool) -> None:
    """Names in the middle of each class's rows, ``size`` rows a class; none where they are many."""
    shown = list(names) if len(names) <= NAMED else []
    middles = [size * index + (size - 1) / 2 for index in range(len(shown))]
    axes.set_yticks(middles, shown)
    turned = 90 if max(map(len, shown), default=0) > 2 else 0
    axes.set_xticks(middles if columns else [], shown if columns else [], rotation=turned)
    axes.tick_params(length=0, labelsize=8)
