"""Empty figures. Only this folder imports matplotlib, and only when a figure is drawn."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor

from kdlayers.errors import MissingPackageError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def new_figure(caller: str, width: float, height: float) -> Figure:
    """An empty figure of this size in inches, outside pyplot's global state.

    Raises:
        MissingPackageError: if matplotlib is not installed; names the ``caller``.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise MissingPackageError(
            f"{caller}() needs matplotlib, which cannot be imported ({error}); run pip install "
            "matplotlib, or use the functions of kdlayers.viz that return tensors"
        ) from error
    return Figure(figsize=(width, height), layout="constrained")


def drawable(tensor: Tensor) -> Any:
    """``tensor`` as an array that matplotlib can draw."""
    tensor = tensor.detach().cpu()
    return (tensor.float() if tensor.is_floating_point() else tensor).numpy()
