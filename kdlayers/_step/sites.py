"""Finds the modules that get a KD layer's hook and its parameters."""

from collections import Counter
from collections.abc import Collection

from torch import nn

from kdlayers._models.wrappers import innermost, plainly_named
from kdlayers._step.hooks import InsertLayer, descend, has_bias
from kdlayers._step.slot import SLOT, Slot
from kdlayers._step.tape import Tape
from kdlayers._utils.torch_internals import child_table, forward_hooks, is_batch_norm
from kdlayers._utils.tree import Path
from kdlayers.errors import AttachError

_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def hook_site(model: nn.Module, name: str) -> nn.Module:
    """The module that gets the forward hook for the output of module ``name``.

    Code that iterates over an ``nn.Sequential`` (checkpointing, feature extractors) never calls the
    Sequential itself, so its last child gets the hook. A last child that is a batch norm does not,
    because ``convert_sync_batchnorm`` replaces it together with its hooks.
    """
    module = model.get_submodule(name)
    while _stock_sequential(module) and child_table(module):
        last = next(reversed(child_table(module).values()))
        if last is None or is_batch_norm(last):
            break
        module = last
    return module


def refuse_norm(model: nn.Module, name: str) -> None:
    """Raise AttachError if ``name`` is a batch norm: converting it would drop its KD layer."""
    module = model.get_submodule(name)
    if is_batch_norm(module):
        raise AttachError(
            f"{name!r} is a {type(module).__name__}, which convert_sync_batchnorm would replace "
            "without its KD layer; choose its parent module, or the activation after it"
        )


def refuse_shared(model: nn.Module, name: str, others: Collection[nn.Module]) -> None:
    """Raise AttachError if one of the teachers' modules would get the KD layer too."""
    site = hook_site(model, name)
    if site in others or home_of(model, name) in others:
        raise AttachError(
            f"the {type(site).__name__} at the end of {name!r} belongs to the teacher too, as with "
            "a default argument act=nn.ReLU(), so the teacher would run the KD layer; pass "
            "copy.deepcopy(teacher)"
        )


def _stock_sequential(module: nn.Module) -> bool:
    return isinstance(module, nn.Sequential) and type(module).forward is nn.Sequential.forward


def store_path(hooked: nn.Module) -> tuple[str, ...]:
    """Child names from ``hooked`` to the module that gets the layer as its child ``kd``.

    The layer never becomes a child of a container, because other code counts and runs the children
    of containers. It becomes a child of the module in a checkpoint_wrapper, where torch expects all
    tensors, and `descend` goes there too.
    """
    path: list[str] = []
    module = innermost(hooked)
    while isinstance(module, _CONTAINERS) and child_table(module):
        key = next(reversed(child_table(module)))
        child = child_table(module)[key]
        if child is None:
            break
        path.append(key)
        module = innermost(child)
    return tuple(path)


def home_of(model: nn.Module, name: str) -> nn.Module:
    """The module that gets the layer of point ``name`` as its child."""
    site = hook_site(model, name)
    return descend(site, store_path(site))


def place(model: nn.Module, name: str, slot: Slot, path: Path, tape: Tape) -> None:
    """Put ``slot`` and its hook into ``model`` at point ``name``.

    Raises:
        AttachError: if the module already has a KD layer, or another attribute ``kd``.
    """
    site, home = hook_site(model, name), home_of(model, name)
    present = getattr(home, SLOT, None)
    if hasattr(home, SLOT) and not isinstance(present, Slot):
        raise AttachError(
            f"the module at {name!r} ({type(home).__name__}) already has an attribute {SLOT!r}, "
            "which is the name of a KD layer; rename that attribute or choose another point, "
            "find_points(student) lists them"
        )
    if present is not None:
        raise AttachError(
            f"there is already a {SLOT!r} at {name!r}: two points refer to the same module (such "
            "as a stage and its last block), or the student was attached or loaded before; choose "
            "one of the points, call kd.remove() on the earlier handle, or attach to a new model "
            "and then load the state_dict() of this one"
        )
    store = store_path(site)  # before add_module, which would make the slot the last child
    home.add_module(SLOT, slot)
    hook = InsertLayer(name, store, path, tape, has_bias(site))
    # Other hooks, such as those of an earlier handle, get what the next module receives, in
    # whatever order they and the layer came: a tool may add its hooks in the first forward.
    hook.key = site.register_forward_hook(hook, prepend=True).id
    # torch.fx treats modules of torch.nn as leaves without hooks, and quantisation replaces them.
    # With another __module__, this one is traced.
    site.__module__ = __name__


def inserts(model: nn.Module) -> list[tuple[nn.Module, int, InsertLayer]]:
    """All KD-layer hooks in ``model``, as tuples (hooked module, key of the hook, hook)."""
    return [
        (module, key, hook)
        for module in model.modules()
        for key, hook in forward_hooks(module).items()
        if isinstance(hook, InsertLayer)
    ]


def slots(model: nn.Module) -> dict[str, Slot]:
    """The KD layers in ``model``, by the names of their points.

    If ``model`` holds several students that have a point of one name, these get their full names.
    """
    found = inserts(model)
    times = Counter(hook.name for _, _, hook in found)
    whole = {innermost(module): name for name, module in plainly_named(model)}
    return {
        hook.name if times[hook.name] == 1 else whole[innermost(module)]: hook.slot(module)
        for module, _, hook in found
    }


def take_out(model: nn.Module, tape: object = None) -> None:
    """Remove KD layers and their hooks: all of them, or those that write to ``tape``."""
    for module, key, hook in inserts(model):
        if tape is None or hook.tape is tape:
            displace(module, key, hook)


def displace(module: nn.Module, key: int, hook: InsertLayer) -> None:
    """Undo `place`, for one of the `inserts`."""
    del forward_hooks(module)[key]
    child_table(descend(module, hook.store)).pop(SLOT)
    if not any(isinstance(other, InsertLayer) for other in forward_hooks(module).values()):
        vars(module).pop("__module__", None)
