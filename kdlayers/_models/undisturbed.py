"""Restores a model after a dry run: flags, buffers, attributes and random state."""

import sys
from collections.abc import Generator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kdlayers._utils.torch_internals import buffer_table


@contextmanager
def undisturbed(model: nn.Module, *, evaluate: bool = True) -> Generator[list[str], None, None]:
    """Eval mode for a while; afterwards the model and all random states are as before.

    Each module gets back its own training flag, its buffers and its attributes. An observer for
    quantisation, for instance, keeps the range that it had. Only buffers that changed are written.
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
            if evaluate:
                model.eval()
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
    if a.device.type == "meta":
        return True
    return bool(((a == b) | (a.isnan() & b.isnan())).all())


# Attributes of nn.Module itself, and the one that inserting a layer sets on its module.
_INTERNAL = frozenset((*vars(nn.Module()), "__module__"))


class _Attributes:
    """The plain attributes of a module, such as a counter or a cache by image size."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.kind = type(module)
        self.values = self._own()

    def _own(self) -> dict[str, Any]:
        return {key: value for key, value in vars(self.module).items() if key not in _INTERNAL}

    def restore(self) -> None:
        """Restore assigned attributes and delete added ones."""
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


def _uncompiled() -> Any:
    """Context in which compiled models run without compilation, which would take long."""
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


def cuda_devices(model: nn.Module) -> list[int]:
    """Indices of the CUDA devices that hold parts of ``model``."""
    return sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
