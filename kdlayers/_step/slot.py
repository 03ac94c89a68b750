"""The slot: a module in the student that holds the parts of a KD layer and loads its state."""

import threading
from typing import Any

import torch

from kdlayers._layer.layer import KDLayer, LayerParts

SLOT = "kd"
"""The name under which a slot is a child of its module."""


class Slot(LayerParts):
    """The parts of a KD layer inside a model. It is not a `KDLayer`; a hook applies it.

    Its forward is the identity, so a parent that runs all its children is not affected. `as_layer`
    returns a layer that can be called.
    """

    def forward(self, x: Any, *_: Any, insert: bool = False, **__: Any) -> Any:
        """Return ``x`` unchanged; with ``insert``, the result of `enhance`."""
        return self.enhance(x) if insert else x

    def as_layer(self) -> KDLayer:
        """A KD layer that shares the parts, ``alpha`` and ``memory`` of this slot."""
        layer = self._with_parts(_LayerOfSlot)
        layer.__dict__["slot"] = self  # not as a submodule, which would register the parts twice
        return layer

    def as_plain_layer(self) -> KDLayer:
        """As `as_layer`, for a model without the slot: the layer has its own options."""
        layer = self._with_parts(KDLayer)
        layer.alpha, layer.memory = self.alpha, self.memory
        return layer

    def _with_parts(self, kind: type[KDLayer]) -> KDLayer:
        with torch.random.fork_rng(devices=[]):
            layer = kind(1, 1, channel_dim=self.channel_dim)
        layer.head, layer.norm, layer.value = self.head, self.norm, self.value
        layer.training = self.training
        return layer

    def extra_repr(self) -> str:
        """Show alpha, and that a hook applies the layer."""
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
        # A checkpoint of the plain student has no keys of KD layers. It loads strictly, and the
        # layers keep their values. load_state_dict passes its own copy of the dict.
        own = self.state_dict()
        if _may_keep_values(state_dict, prefix, list(own), missing_keys):
            state_dict.update({prefix + key: value for key, value in own.items()})
        reports = missing_keys, unexpected_keys, error_msgs
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *reports)


class _LayerOfSlot(KDLayer):
    """A KD layer with the parts of a slot; its options are those of the slot.

    They are properties, which `torch.compile` can follow, and have no values in ``__dict__``, which
    it would find first. TorchScript cannot follow them, and takes their values as constants.
    """

    __jit_unused_properties__ = ("alpha", "memory")
    __constants__ = ("alpha", "memory")

    @property
    def alpha(self) -> Any:
        """The slot's value ratio."""
        return self.slot.alpha  # type: ignore[union-attr]

    @alpha.setter
    def alpha(self, value: float) -> None:
        self._set("alpha", value)

    @property
    def memory(self) -> Any:
        """The slot's memory mode."""
        return self.slot.memory  # type: ignore[union-attr]

    @memory.setter
    def memory(self, value: str) -> None:
        self._set("memory", value)

    def _set(self, name: str, value: Any) -> None:
        slot = self.__dict__.get("slot")
        if slot is not None:  # the constructor sets options before there is one
            setattr(slot, name, value)


class _Loading(threading.local):
    """The keys of KD layers in the load_state_dict call that runs in this thread."""

    call: object = None
    """The list of missing keys. torch creates a new list for each call."""
    found = False
    left_out: list[str]


_loading = _Loading()


def _may_keep_values(
    state: dict[str, Any], prefix: str, keys: list[str], missing: list[str]
) -> bool:
    """Whether a KD layer without keys in ``state`` keeps its values, and no key counts as missing.

    This holds if no KD layer has keys: the state is that of the plain student. If another KD layer
    has keys, the state is that of a student with other KD layers, and the keys of this layer are
    missing.

    Args:
        state: the state dict that torch passes to this layer.
        prefix: prefix of the layer's keys.
        keys: the layer's own keys, without prefix.
        missing: the list in which torch collects missing keys. If another layer has keys, those of
            earlier layers without keys are added to it.
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
