"""Which KD layers a state dict may leave out: all of them, or none."""

import threading
from typing import Any


class _Loading(threading.local):
    """What the KD layers found in the load_state_dict call that runs in this thread."""

    call: object = None
    """The list of missing keys, which torch makes anew for each call."""
    found = False
    left_out: list[str]


_loading = _Loading()


def may_keep_values(
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
