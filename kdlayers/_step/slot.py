"""The slot: the parts of a KD layer inside a student, and how they load from a state dict."""

import threading
from typing import Any

import torch

from kdlayers._layer.layer import KDLayer, LayerParts

SLOT = "kd"
"""The name under which a slot is a child of its module."""


class Slot(LayerParts):
    """The parts of a KD layer inside a model. Only its hook makes it act; it is not a `KDLayer`.

    Called as a module it returns its input, so that a parent which runs all its children does not
    run it. `as_layer` gives the layer that can be called.
    """

    def forward(self, x: Any, *_: Any, insert: bool = False, **__: Any) -> Any:
        """``x`` unchanged; with ``insert``, what `enhance` gives."""
        return self.enhance(x) if insert else x

    def as_layer(self) -> KDLayer:
        """A KD layer of the very same parts, whose ``alpha`` and ``memory`` are the slot's."""
        with torch.random.fork_rng(devices=[]):
            layer = _LayerOfSlot(1, 1, channel_dim=self.channel_dim)
        layer.head, layer.norm, layer.value = self.head, self.norm, self.value
        layer.training = self.training
        layer.__dict__["slot"] = self  # not a submodule, which would hold the parts twice
        return layer

    def extra_repr(self) -> str:
        """Shows alpha, and that the layer acts through its hook."""
        return f"{super().extra_repr()}, acts through a hook"

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        # A checkpoint of the plain student has no keys of any KD layer: it loads strictly, and the
        # layers keep their values. load_state_dict works on its own copy of the dict.
        own = self.state_dict()
        if _may_keep_values(state_dict, prefix, list(own), missing_keys):
            state_dict.update({prefix + key: value for key, value in own.items()})
        reports = missing_keys, unexpected_keys, error_msgs
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *reports)


class _LayerOfSlot(KDLayer):
    """A slot's parts as a layer that computes; its options are those of the slot."""

    def __getattribute__(self, name: str) -> Any:
        slot = object.__getattribute__(self, "__dict__").get("slot")
        if slot is not None and name in ("alpha", "memory"):
            return getattr(slot, name)
        return super().__getattribute__(name)

    def __setattr__(self, name: str, value: Any) -> None:
        slot = self.__dict__.get("slot")
        if slot is not None and name in ("alpha", "memory"):
            setattr(slot, name, value)
        else:
            super().__setattr__(name, value)


class _Loading(threading.local):
    """What the KD layers found in the load_state_dict call that runs in this thread."""

    call: object = None
    """The list of missing keys, which torch makes anew for each call."""
    found = False
    left_out: list[str]


_loading = _Loading()


def _may_keep_values(
    state: dict[str, Any], prefix: str, keys: list[str], missing: list[str]
) -> bool:
    """Whether a KD layer that has no keys in ``state`` keeps its values without being reported.

    It does if no other KD layer has keys either: the state is the plain student's. If another one
    has, the state is of a student with other KD layers, and this layer's keys are missing.

    Args:
        state: the part of the state dict that torch hands to this layer.
        prefix: what its keys begin with.
        keys: the layer's own keys, without prefix.
        missing: the list in which torch collects missing keys. Keys of layers that were visited
            before, and kept their values, are added to it.
    """
    if _loading.call is not missing:
        _loading.call, _loading.found, _loading.left_out = missing, False, []
    if any(key.startswith(prefix) for key in state):
        _loading.found = True
        missing += _loading.left_out
        _loading.left_out = []
        return False
    if _loading.found:
        return False
    _loading.left_out += [prefix + key for key in keys]
    return True
