"""Whether a model returns something else each time, although it is in eval mode."""

from typing import Any

import torch
from torch import Tensor, nn

from kdlayers._models.examples import fresh, placement, to_model
from kdlayers._models.outputs import main_output
from kdlayers._models.undisturbed import undisturbed

_TOLERANCE = 0.01


def is_random(model: nn.Module, example: tuple[Any, ...], before: Tensor) -> bool:
    """Whether a second forward on ``example`` differs from ``before``, the output of the first.

    Masked auto-encoders, for instance, draw which patches they read, and in which order, in eval
    mode too. Differences that rounding may cause do not count.
    """
    with undisturbed(model), torch.no_grad():
        torch.rand(1, device=placement(model)[0])  # the same random state would draw the same
        again = main_output(model(*fresh(to_model(example, model))))
    if again is None or again.shape != before.shape:
        return True
    if not before.numel():
        return False
    first, second = before.float(), again.to(before.device).float()
    return bool((first - second).abs().max() > _TOLERANCE * first.abs().max())
