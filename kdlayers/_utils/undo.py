"""Rolls back changes of modules if an operation fails."""

from collections import OrderedDict
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from kdlayers._utils.plain_tensors import why_hollow


@contextmanager
def all_or_nothing(*roots: nn.Module) -> Generator[None, None, None]:
    """If the block fails, restore the modules below ``roots``, including values.

    Attributes, submodules, hooks, parameters and buffers come back as the same objects with the
    same values; for the length of the block there is a second copy of the values.
    """
    modules = list(dict.fromkeys(module for root in roots for module in root.modules()))
    attributes = [(module, _copies(module)) for module in modules]
    values = {id(t): (t, t.detach().clone()) for module in modules for t in _tensors(module)}
    try:
        yield
    except BaseException:
        for module, held in attributes:
            _put_back(module, held)
        with torch.no_grad():
            for tensor, value in values.values():
                tensor.detach().copy_(value)
        raise


def _copies(module: nn.Module) -> dict[str, tuple[Any, Any]]:
    """All attributes; tables such as those of hooks with a shallow copy."""
    return {
        name: (value, value.copy() if type(value) in (dict, OrderedDict, set) else None)
        for name, value in vars(module).items()
    }


def _put_back(module: nn.Module, held: dict[str, tuple[Any, Any]]) -> None:
    attributes = vars(module)
    attributes.clear()
    for name, (value, content) in held.items():
        if content is not None:
            value.clear()
            value.update(content)
        attributes[name] = value


def _tensors(module: nn.Module) -> list[Tensor]:
    found = (*module.parameters(recurse=False), *module.buffers(recurse=False))
    # An expanded tensor cannot be written to: several of its elements share one number.
    return [t for t in found if not t.is_meta and (t.is_quantized or why_hollow(t) is None)]
