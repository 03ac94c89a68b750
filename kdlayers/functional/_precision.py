"""Keeps the closed forms in float32 or better, also under autocast."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec

import torch
from torch import Tensor
from torch.nn import functional as F

P = ParamSpec("P")
_NARROW = (torch.float16, torch.bfloat16)


def full_precision(function: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """Run ``function`` outside autocast, with float16 and bfloat16 tensors widened to float32."""

    @wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        device, narrow = None, False  # a plain loop, because small losses take little longer
        for value in (*args, *kwargs.values()):
            if isinstance(value, Tensor):
                device = device or value.device.type
                narrow = narrow or value.dtype in _NARROW
        if device is None or not (narrow or torch.is_autocast_enabled(device)):
            return function(*args, **kwargs)
        wide = [widen(arg) for arg in args]
        named = {key: widen(arg) for key, arg in kwargs.items()}
        with torch.autocast(device, enabled=False):
            return function(*wide, **named)  # type: ignore[arg-type]  # the same types, wider

    return wrapper


def widen(value: object) -> object:
    """A float16 or bfloat16 tensor as float32; anything else unchanged."""
    if isinstance(value, Tensor) and value.dtype in _NARROW:
        return value.float()
    return value


@full_precision
def linear(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``inputs @ weight.T + bias`` in float32 or better."""
    return F.linear(inputs, weight, bias)
