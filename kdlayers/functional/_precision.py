"""Keeps the closed forms in float32 or better, also inside autocast."""

from collections.abc import Callable
from functools import wraps
from typing import ParamSpec

import torch
from torch import Tensor

P = ParamSpec("P")


def full_precision(function: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """Run ``function`` outside autocast, with float16 and bfloat16 tensors widened to float32."""

    @wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        first = next(arg for arg in (*args, *kwargs.values()) if isinstance(arg, Tensor))
        with torch.autocast(first.device.type, enabled=False):
            return function(
                *(_widen(arg) for arg in args),
                **{key: _widen(arg) for key, arg in kwargs.items()},
            )

    return wrapper  # type: ignore[return-value]


def _widen(value: object) -> object:
    if isinstance(value, Tensor) and value.dtype in (torch.float16, torch.bfloat16):
        return value.float()
    return value
