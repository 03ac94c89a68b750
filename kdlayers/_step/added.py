"""What an attachment adds: its KD layers, and all parameters that an optimiser has to get."""

from collections.abc import Iterable

from torch import nn

from kdlayers._layer.layer import KDLayer
from kdlayers._step.sites import inserts
from kdlayers._step.tape import Tape


def layers_of(student: nn.Module, tape: Tape) -> dict[str, KDLayer]:
    """The KD layers that write on ``tape``, by the names of their points."""
    own = [(hook, module) for module, _, hook in inserts(student) if hook.tape is tape]
    return {hook.name: hook.slot(module).as_layer() for hook, module in own}


def parameters_of(
    layers: Iterable[nn.Module], train_only: Iterable[nn.Parameter], decay: bool | None
) -> list[nn.Parameter]:
    """Parameters of the layers, then the train-only ones; with ``decay`` given, a part of them."""
    found = [p for layer in layers for p in layer.parameters() if p.requires_grad]
    whole = dict.fromkeys([*found, *train_only])
    return [p for p in whole if decay is None or decay == (p.dim() > 1)]
