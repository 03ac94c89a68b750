"""Baking: hooks become plain submodules."""

import copy
from collections.abc import Callable
from functools import partial
from inspect import Parameter, signature
from types import MethodType
from typing import Any

from torch import nn

from kdlayers._models.wrappers import refuse_shards, student_inside
from kdlayers._step.hooks import is_recording
from kdlayers._step.sites import displace, inserts
from kdlayers._step.slot import Slot
from kdlayers._utils.torch_internals import drop_hooks, move_later_hooks
from kdlayers._utils.tree import Path, pick, put
from kdlayers.errors import AttachError

MERGING = ("fuse", "reparameterize", "switch_to_deploy")
"""Methods that merge the parts of a module, by the names that timm and others look for."""


class _Baked(nn.Module):
    """A module, its first child, followed by a KD layer; has the module's attributes too."""

    def __getattr__(self, name: str) -> Any:
        # The parent may read them, such as the stride of a convolution. Neither special methods
        # (copying would copy the module without its layer), nor the children of a Sequential, nor
        # methods that return the module in another form, which would take the place of the layer.
        try:
            return super().__getattr__(name)
        except AttributeError:
            module = next(iter(self.__dict__.get("_modules", {}).values()), None)
            special = name.startswith("__") or not name.isidentifier() or name in MERGING
            if module is None or special:
                raise
            return getattr(module, name)


class BakedStep(_Baked, nn.Sequential):
    """For a module that takes and returns one tensor; TorchScript and exports can read it."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """As the module itself, which may have another name for its argument."""
        return super().__call__(*args, *kwargs.values())


class BakedPoint(_Baked):
    """For a module with several arguments or outputs."""

    def __init__(self, module: nn.Module, layer: nn.Module, path: Path) -> None:
        super().__init__()
        self.module = module
        self.layer = layer
        self.path = path

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The module's output, with its features sent through the layer."""
        output = self.module(*args, **kwargs)
        return put(output, self.path, self.layer(pick(output, self.path)))


def bake(student: nn.Module) -> nn.Module:
    """A copy of the student in which every KD layer is a plain submodule and no hook is left.

    The copy gives the same outputs, runs without hooks, and can be scripted by TorchScript where
    the student itself could be; its state-dict keys differ. The student is not changed.

    Args:
        student: a model with KD layers, attached or detached. Wrappers such as ``torch.compile``,
            DDP or a moving average are not copied.

    Returns:
        The copy, in the student's mode.

    Raises:
        AttachError: if the model has no KD layers, or FSDP has split its parameters.

    Example:
        >>> import torch
        >>> from torchvision.models import resnet18
        >>> from kdlayers import KDPoint, attach_kd, bake
        >>> student = resnet18().eval()
        >>> kd = attach_kd(student, at=[KDPoint("layer4", num_templates=16)])
        >>> images = torch.randn(2, 3, 64, 64)
        >>> torch.equal(bake(student)(images), student(images))
        True
    """
    return replace_layers(student, Slot.as_plain_layer, "bake")


def replace_layers(student: nn.Module, made: Callable[[Slot], nn.Module], call: str) -> nn.Module:
    """A copy of ``student`` without hooks, with ``made(slot)`` as a submodule for every slot.

    Args:
        student: the student, bare or in a wrapper such as ``torch.compile``, DDP or a moving
            average.
        made: returns the module that replaces a slot.
        call: name of the public function, for messages.

    Raises:
        AttachError: if there is no KD layer, or FSDP has split the student.
    """
    student = student_inside(student)
    refuse_shards(student, call)
    if not inserts(student):
        raise AttachError(
            f"this {type(student).__name__} has no KD layers, so there is nothing to {call}: "
            "use or export it directly, or add KD layers with attach_kd(student, teacher, at=[...])"
        )
    baked = copy.deepcopy(student)
    for module, key, hook in inserts(baked):
        point = _baked_point(module, made(hook.slot(module)), hook.path)
        move_later_hooks(key, module, point)
        displace(module, key, hook)
        _replace(baked, module, point)
    return _without_record_hooks(baked)


def _baked_point(module: nn.Module, layer: nn.Module, path: Path) -> nn.Module:
    point: nn.Module = BakedPoint(module, layer, path)
    # TorchScript does not support *args; use a Sequential if the module takes one tensor.
    kinds = [parameter.kind for parameter in signature(module.forward).parameters.values()]
    if path == () and kinds == [Parameter.POSITIONAL_OR_KEYWORD]:
        point = BakedStep(module, layer)
    point.training = module.training
    return point


def _replace(model: nn.Module, old: nn.Module, new: nn.Module) -> None:
    """Put ``new`` in the place of ``old``, also where a model keeps it outside its children."""
    for parent in list(model.modules()):
        if parent is new or parent is old:
            continue
        _exchanged(vars(parent), old, new)
        if isinstance(parent, nn.TransformerEncoderLayer) and new in parent.children():
            # In eval mode it computes with the weights of its children, unless these have hooks or
            # its activation is unknown.
            parent.activation_relu_or_gelu = 0


def _exchanged(held: Any, old: nn.Module, new: nn.Module, depth: int = 4) -> Any:
    """``held`` with ``new`` instead of ``old``; lists and dicts are changed in place."""
    if held is old:
        return new
    if isinstance(held, MethodType) and held == old.__call__:
        return new.__call__
    if depth == 0:
        return held
    if type(held) is tuple:
        items = tuple(_exchanged(item, old, new, depth - 1) for item in held)
        return items if any(a is not b for a, b in zip(items, held, strict=True)) else held
    if type(held) is partial:
        given = (held.func, held.args)
        func, args = found = _exchanged(given, old, new, depth)
        _exchanged(held.keywords, old, new, depth - 1)
        return held if found is given else partial(func, *args, **held.keywords)
    if isinstance(held, (dict, list)):
        for key, item in held.items() if isinstance(held, dict) else enumerate(held):
            found = _exchanged(item, old, new, depth - 1)
            if found is not item:
                held[key] = found
    return held


def _without_record_hooks(model: nn.Module) -> nn.Module:
    for module in model.modules():
        drop_hooks(module, is_recording)
    return model
