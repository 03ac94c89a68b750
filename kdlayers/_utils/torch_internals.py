"""Parts of torch that have no public name, where this library cannot do without them."""

# pyright: reportPrivateUsage=false

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase


def is_batch_norm(module: nn.Module) -> bool:
    """Whether this is a batch or instance norm, of any number of axes, also a synchronised one."""
    return isinstance(module, _NormBase)


def child_table(module: nn.Module) -> dict[str, nn.Module | None]:
    """The children by name, with those set to None; changing it changes the module."""
    return module._modules


def forward_hooks(module: nn.Module) -> dict[int, Callable[..., Any]]:
    """The forward hooks by key; changing it changes the module."""
    return module._forward_hooks


def has_hooks(module: nn.Module) -> bool:
    """Whether anything else happens when the module is called."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def drop_hooks(module: nn.Module, unwanted: Callable[[object], bool]) -> None:
    """Take away the forward hooks and pre-hooks for which ``unwanted`` is true."""
    tables: tuple[dict[int, Callable[..., Any]], ...] = (
        module._forward_hooks,
        module._forward_pre_hooks,
    )
    for hooks in tables:
        for key in [key for key, hook in hooks.items() if unwanted(hook)]:
            del hooks[key]
            module._forward_hooks_always_called.pop(key, None)


def in_backward() -> bool:
    """Whether this runs inside a backward pass, as far as this torch can tell."""
    current = getattr(torch._C, "_current_graph_task_id", None)
    return current is not None and current() != -1


def is_functional(tensor: Tensor) -> bool:
    """Whether ``torch.func`` has wrapped this tensor; under ``vmap`` its numbers cannot be read."""
    return torch._C._functorch.is_functorch_wrapped_tensor(tensor)


def buffer_table(module: nn.Module) -> dict[str, Tensor | None]:
    """The buffers by name, with those set to None; changing it changes the module."""
    return module._buffers
