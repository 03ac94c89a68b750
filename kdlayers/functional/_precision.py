"""Keeps the closed forms in float32 or better, also inside autocast."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec

import torch
from torch import Tensor
from torch.nn import functional as F

P = ParamSpec("P")


def full_precision(function: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """Run ``function`` outside autocast, with float16 and bfloat16 tensors widened to float32."""

    @wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        given = (*args, *kwargs.values())
        device = next((arg.device for arg in given if isinstance(arg, Tensor)), None)
        wide = [widen(arg) for arg in args]
        named = {key: widen(arg) for key, arg in kwargs.items()}
        if device is None or not torch.is_autocast_enabled(device.type):
            return function(*wide, **named)  # type: ignore[arg-type]  # the same types, wider
        with torch.autocast(device.type, enabled=False):
            return function(*wide, **named)  # type: ignore[arg-type]

    return wrapper


def widen(value: object) -> object:
    """A float16 or bfloat16 tensor in float32; anything else as it is."""
    if isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16):
        return value.float()
    return value


@full_precision
def linear(inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``inputs @ weight.T + bias`` in float32 or better."""
    return F.linear(inputs, weight, bias)
