"""Parts of a step that torch.compile leaves alone."""

from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

import torch

P = ParamSpec("P")
R = TypeVar("R")

_WAITING: list[Callable[[], None]] = []


def eager(function: Callable[P, R]) -> Callable[P, R]:
    """``torch.compiler.disable``, which imports the compiler at `prepare`, not before."""
    disabled: list[Any] = []
    _WAITING.append(lambda: disabled.append(torch.compiler.disable(function)))

    @wraps(function)
    def wrapper(*args: P.args, **kwargs: P.kwargs) -> R:
        result: R = disabled[0](*args, **kwargs)
        return result

    return wrapper


def prepare() -> None:
    """Let `eager` functions be called; no graph may contain this, as torch 2.9 cannot trace it."""
    while _WAITING:
        _WAITING.pop()()
