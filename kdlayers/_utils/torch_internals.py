"""The private parts of torch that this library needs."""

# pyright: reportPrivateUsage=false

from collections.abc import Callable, Collection, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.conv import _ConvNd
from torch.nn.parallel import DistributedDataParallel
from torch.utils.hooks import RemovableHandle

BIASED = (_ConvNd, nn.Linear)
"""Modules that can be fused with a batch norm after them, and then have a bias."""


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
    """Whether calling the module does more than run its forward."""
    return bool(module._forward_hooks or module._forward_pre_hooks)


def runs_forward_of(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether calling the module runs the forward of ``kind``, neither a wrapper's nor a patch."""
    return type(module).forward is kind.forward and "forward" not in vars(module)


def hook_keys(module: nn.Module) -> set[int]:
    """The keys of the forward hooks and pre-hooks. No two hooks of a process have the same."""
    return {*module._forward_hooks, *module._forward_pre_hooks}


def drop_hooks(
    module: nn.Module, unwanted: Callable[[object], bool], kept: Collection[int] = ()
) -> None:
    """Remove the forward hooks and pre-hooks for which ``unwanted`` is true.

    Those with one of the keys ``kept`` stay. The others keep their order.
    """
    tables: tuple[dict[int, Callable[..., Any]], ...] = (
        module._forward_hooks,
        module._forward_pre_hooks,
    )
    for hooks in tables:
        for key in [key for key, hook in hooks.items() if key not in kept and unwanted(hook)]:
            del hooks[key]
            module._forward_hooks_with_kwargs.pop(key, None)
            module._forward_hooks_always_called.pop(key, None)
            module._forward_pre_hooks_with_kwargs.pop(key, None)


def move_later_hooks(key: int, module: nn.Module, other: nn.Module) -> None:
    """Move the forward hooks that ``module`` runs after the one at ``key`` to ``other``."""
    keys = list(module._forward_hooks)
    for later in keys[keys.index(key) + 1 :]:
        other._forward_hooks[later] = module._forward_hooks.pop(later)
        for name in ("_forward_hooks_with_kwargs", "_forward_hooks_always_called"):
            if later in getattr(module, name):
                getattr(other, name)[later] = getattr(module, name).pop(later)


def reserve_hook_key(key: int) -> None:
    """Let no later hook of this process get ``key``, under which an unpickled module has one.

    Keys count the hooks of a process. An equal key would replace the hook of that module.
    """
    RemovableHandle.next_id = max(RemovableHandle.next_id, key + 1)


# The number of the current backward pass; -1 outside, or if torch does not report it.
current_backward: Callable[[], int] = getattr(torch._C, "_current_graph_task_id", lambda: -1)


def runs_on_all_ranks(model: nn.Module) -> bool:
    """Whether a forward of ``model`` now is one that DDP or FSDP runs on all ranks together."""
    return _active_ddp() is not None or hasattr(model, "unshard")


def joined() -> bool:
    """Whether this runs in a DistributedDataParallel inside its ``join()``."""
    config = getattr(_active_ddp(), "_join_config", None)
    return bool(getattr(config, "enable", False))


def missing_in_ddp(parameters: Iterable[nn.Parameter]) -> bool:
    """Whether this runs in a DistributedDataParallel that does not hold all these parameters."""
    held = getattr(_active_ddp(), "_module_parameters", None)
    known = None if held is None else {id(parameter) for parameter in held}
    return known is not None and any(p.requires_grad and id(p) not in known for p in parameters)


def _active_ddp() -> nn.Module | None:
    found: nn.Module | None = getattr(DistributedDataParallel, "_active_ddp_module", None)
    return found


# Whether an autocast is active for any device.
is_any_autocast: Callable[[], bool] = torch._C._is_any_autocast_enabled

# Whether torch.func has wrapped a tensor, whose numbers then cannot be read, as under vmap.
_functorch: Any = getattr(torch._C, "_functorch")  # noqa: B009  # no stub names it
is_functional: Callable[[Tensor], bool] = _functorch.is_functorch_wrapped_tensor


def dispatches(tensor: Tensor) -> bool:
    """Whether the class of ``tensor`` dispatches on its own, as fake and distributed tensors do."""
    own, usual = (getattr(kind, "__torch_dispatch__", None) for kind in (type(tensor), Tensor))
    return type(tensor) is not Tensor and own is not usual


def plain(tensor: Tensor) -> Tensor:
    """``tensor`` without a class of its own that adds, for instance, an image's metadata.

    Such a class need not support all that tensors do. Tensors that dispatch on their own are
    returned as they are. Every step compares the type before it calls this, which costs less.
    """
    if type(tensor) is Tensor or dispatches(tensor):
        return tensor
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.as_subclass(Tensor)


def in_transform() -> bool:
    """Whether a call runs inside a transform of torch.func, such as vmap, or in forward-mode AD.

    Any tensor may be one of the transform then: the input, or any parameter or buffer. Graphs of
    torch.compile do not ask.
    """
    if torch.compiler.is_compiling():
        return False
    return _functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0


def parameter_table(module: nn.Module) -> dict[str, nn.Parameter | None]:
    """The parameters by name, with those set to None."""
    return module._parameters


def buffer_table(module: nn.Module) -> dict[str, Tensor | None]:
    """The buffers by name, with those set to None; changing it changes the module."""
    return module._buffers
