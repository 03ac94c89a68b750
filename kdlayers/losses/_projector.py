"""Train-only modules that bring the student's features to the teacher's width."""

from typing import TypeAlias

from torch import Tensor, nn

from kdlayers.errors import ArgumentError

Layer: TypeAlias = nn.Conv2d | nn.Linear


def check_kind(kind: object) -> None:
    """Raise unless ``kind`` is a kind of `make_projector`."""
    if kind not in ("linear", "mlp"):
        raise ArgumentError(
            f'projector must be "linear", "mlp", None or a module, got {kind!r}; None is the '
            "object, not a word"
        )


def make_projector(
    kind: str, student: int, teacher: int, *, maps: bool, bias: bool = True
) -> nn.Module:
    """A ``"linear"`` layer, or an ``"mlp"`` with one hidden GELU layer of the teacher's width.

    Args:
        kind: one of the two.
        student: number of input channels.
        teacher: number of output channels.
        maps: whether the features are maps ``[B, C, H, W]``, and not vectors or tokens.
        bias: whether the layers have one.
    """

    def make(inputs: int, outputs: int) -> Layer:
        if maps:
            return nn.Conv2d(inputs, outputs, 1, bias=bias)
        return nn.Linear(inputs, outputs, bias=bias)

    if kind == "linear":
        return make(student, teacher)
    return nn.Sequential(make(student, teacher), nn.GELU(), make(teacher, teacher))


def projector_like(state: dict[str, Tensor], name: str) -> nn.Module | None:
    """The projector whose weights a state dict holds under ``name``; None if it holds none."""
    kind = "linear" if f"{name}.weight" in state else "mlp"
    keys = [f"{name}.weight"] * 2 if kind == "linear" else [f"{name}.0.weight", f"{name}.2.weight"]
    if any(key not in state for key in keys):
        return None
    first, last = (state[key] for key in keys)
    maps, bias = first.dim() == 4, keys[0].replace(".weight", ".bias") in state
    made = make_projector(kind, first.shape[1], last.shape[0], maps=maps, bias=bias)
    return made.to(first.device, first.dtype)


def widths(projector: nn.Module) -> tuple[int, int] | None:
    """Input and output channels of a projector made here; None for a module of the user."""
    layers = [projector[0], projector[-1]] if isinstance(projector, nn.Sequential) else [projector]
    if not all(isinstance(layer, (nn.Conv2d, nn.Linear)) for layer in layers):
        return None
    first, last = layers[0].weight, layers[-1].weight
    if not isinstance(first, Tensor) or not isinstance(last, Tensor):
        return None
    return first.shape[1], last.shape[0]
