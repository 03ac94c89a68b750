"""Restores a model after a dry run: flags, buffers, attributes, hooks and random state."""

import operator
import sys
from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kdlayers._utils.torch_internals import buffer_table, drop_hooks, hook_keys


@contextmanager
def undisturbed(model: nn.Module, *, evaluate: bool = True) -> Generator[list[str], None, None]:
    """Eval mode for a while; afterwards the model and all random states are as before.

    Each module gets back its own training flag, its buffers and its attributes. An observer for
    quantisation, for instance, keeps the range that it had. Only buffers that changed are written.
    Hooks that the model registers meanwhile are removed; those of this library stay.
    With ``evaluate=False`` the modules keep their modes meanwhile.

    Yields:
        A list that holds, once the context has ended, the names of the buffers that had changed.
    """
    flags = [(module, module.training) for module in model.modules()]
    attributes = [_Attributes(module) for module in model.modules()]
    buffers = _buffers(model)
    changed: list[str] = []
    with torch.random.fork_rng(devices=cuda_devices(model)), _uncompiled():
        try:
            # Not eval(): models may override it, for instance to merge weights into others.
            for module in model.modules() if evaluate else ():
                if module.training:
                    module.training = False
            yield changed
        finally:
            for module, flag in flags:
                module.training = flag
            changed += [buffer.name for buffer in buffers if buffer.restore()]
            for saved in attributes:
                saved.restore()


@dataclass
class _Buffer:
    """One buffer as it was: the tensor object, and a copy of its values."""

    name: str
    module: nn.Module
    key: str
    tensor: Tensor
    values: Tensor

    def restore(self) -> bool:
        """Put the buffer back; returns whether its values had changed."""
        table = buffer_table(self.module)
        # Not get(): the tables of TorchScript modules lack it.
        now = table[self.key] if self.key in table else None  # noqa: SIM401
        table[self.key] = self.tensor
        changed = now is not self.tensor and not _equal(now, self.values)
        # Unchanged buffers are left alone: a graph that saved them would refuse its backward pass.
        # Values are compared: fused observers write without counting it as an in-place change.
        if not _equal(self.tensor, self.values):
            changed = True
            with torch.no_grad():
                if self.tensor.shape != self.values.shape:
                    self.tensor.resize_(self.values.shape)
                self.tensor.copy_(self.values)
        return changed


def _buffers(model: nn.Module) -> list[_Buffer]:
    saved: list[_Buffer] = []
    for prefix, module in model.named_modules():
        for key, tensor in buffer_table(module).items():
            if tensor is not None:
                name = f"{prefix}.{key}" if prefix else key
                saved.append(_Buffer(name, module, key, tensor, tensor.detach().clone()))
    return saved


def _equal(a: Tensor | None, b: Tensor) -> bool:
    if a is None or a.shape != b.shape or a.dtype != b.dtype:
        return False
    if a.is_meta or b.is_meta:  # offloaded weights are real only while a module runs
        return True
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


# Attributes of nn.Module itself, and the one that inserting a layer sets on its module.
_INTERNAL = frozenset((*vars(nn.Module()), "__module__"))


class _Attributes:
    """The plain attributes of a module, such as a counter or a cache by image size, and its hooks.

    A model may register hooks in its first forward and set an attribute that says so. Both must go
    back together: without the attribute, the next forward would register the hooks once more.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.kind = type(module)
        self.values = self._own()
        self.held = [(value, value.copy()) for value in self.values.values() if _is_held(value)]
        self.hooks = hook_keys(module)

    def _own(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self.module).items() if key not in _INTERNAL}

    def restore(self) -> None:
        """Restore assigned attributes, and delete added ones and added hooks."""
        if type(self.module) is not self.kind:
            return  # a lazy module has been initialised, which changes its class
        own = vars(self.module)
        for key, value in self._own().items():
            if key not in self.values:
                del own[key]
            elif value is not self.values[key]:
                own[key] = self.values[key]
        for key, value in self.values.items():
            own.setdefault(key, value)
        for value, before in self.held:
            _refill(value, before)
        drop_hooks(self.module, _is_foreign, kept=self.hooks)


def _is_held(value: Any) -> bool:
    """Whether this is a plain dict or list, whose items a forward may change."""
    return type(value) in (dict, list)


def _refill(held: Any, before: Any) -> None:
    """Give a dict or list back the items that it had, if they are no longer the same objects."""
    now, then = ([*v, *v.values()] if isinstance(v, dict) else v for v in (held, before))
    if len(now) != len(then) or not all(map(operator.is_, now, then)):
        held.clear()
        (held.update if isinstance(held, dict) else held.extend)(before)


def _is_foreign(hook: object) -> bool:
    """Whether a hook is not one of this library's, which remove their own, or are to stay."""
    return str(getattr(hook, "__module__", "")).split(".")[0] != __name__.split(".")[0]


def _uncompiled() -> Any:
    """Context in which compiled models run without compilation, which would take long."""
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


def cuda_devices(model: nn.Module) -> list[int]:
    """Indices of the CUDA devices that hold parts of ``model``."""
    return sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
