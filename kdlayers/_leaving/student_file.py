"""The content of a saved student: what is written, and what a file must be to be read."""

from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from math import isfinite
from reprlib import Repr
from typing import Any

import torch
from torch import Tensor

from kdlayers._layer.layer import MEMORY
from kdlayers._utils.archives import FROM_CHECKPOINT
from kdlayers._utils.checksums import checksum
from kdlayers._utils.plain_tensors import why_hollow, why_not_plain
from kdlayers._utils.tree import Path
from kdlayers.errors import CheckpointError

FORMAT = "kdlayers student"
VERSION = 3
"""Version 1 had no checksums."""
_ADDED: dict[int, dict[str, Any]] = {2: {"memory": "normal"}, 3: {"eps": 1e-5}}
"""What each version added to a layer's description, with the values that layers had before."""

_PLAIN = (bool, int, float, str, bytes, torch.dtype, torch.device, torch.Size)
_short = Repr()
_short.maxdict = 10


@dataclass(frozen=True)
class LayerDescription:
    """What is needed to put one KD layer into a fresh model; its tensors are in the state dict."""

    name: str
    path: Path
    in_channels: int
    num_templates: int
    alpha: float
    channel_dim: int
    memory: str = "normal"
    eps: float = 1e-5
    """Of the layer's batch norm."""


@dataclass(frozen=True)
class SavedStudent:
    """A file's content, after all checks."""

    layers: list[LayerDescription]
    state: OrderedDict[str, Any]
    """As returned by ``state_dict()``, with the version of every module that has one."""


def pack(layers: list[LayerDescription], state: dict[str, Any]) -> dict[str, Any]:
    """The content of the file: names, numbers, plain tensors, and checksums of all of them.

    Raises:
        CheckpointError: if something could not be read back.
    """
    # Some modules read the version that they wrote their state with.
    metadata: dict[str, dict[str, Any]] = getattr(state, "_metadata", {})
    content: dict[str, Any] = {
        "format": FORMAT,
        "version": VERSION,
        "layers": [asdict(layer) for layer in layers],
        "module_versions": {name: meta.get("version") for name, meta in metadata.items()},
        "state": {key: _portable(key, value) for key, value in state.items()},
    }
    for layer in content["layers"]:
        _check_layer(layer, "the student cannot be saved")
    return seal(content)


def seal(content: dict[str, Any]) -> dict[str, Any]:
    """``content`` with the checksums of every entry of the state, and of everything else."""
    sums = {key: checksum(value) for key, value in content["state"].items()}
    return {
        **content,
        "checksums": sums,
        "checksum": _description_sum({**content, "checksums": sums}),
    }


_TRAINING = {"state_dict", "state_dict_ema", "model", "model_ema", "model_state_dict"}
"""Keys by which training scripts keep a model's weights."""


def unpack(content: Any, label: str) -> SavedStudent:
    """The inverse of `pack`.

    Raises:
        CheckpointError: if ``content`` is damaged, of an unknown version, or something else.
    """
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        if isinstance(content, dict) and _TRAINING & content.keys():
            found = sorted(_TRAINING & content.keys())
            raise CheckpointError(
                f"{label} is a training script's checkpoint (it has {', '.join(found)}), not a "
                f"file of save_student. {FROM_CHECKPOINT}"
            )
        raise CheckpointError(
            f"{label} is not a file of save_student; load a plain checkpoint with "
            "model.load_state_dict(torch.load(path, weights_only=True))"
        )
    version = content.get("version")
    if type(version) is not int or not 1 <= version <= VERSION:
        raise CheckpointError(
            f"{label} has format version {_short.repr(version)}, but this kdlayers reads versions "
            f"1 to {VERSION}; install a newer kdlayers"
        )
    state, versions = content.get("state"), content.get("module_versions")
    layers = content.get("layers")
    if not (isinstance(state, dict) and isinstance(versions, dict) and isinstance(layers, list)):
        raise CheckpointError(f"{label} is damaged: it has no layers, no versions or no state")
    if not layers or not all(isinstance(key, str) for key in state):
        raise CheckpointError(f"{label} is damaged: it has no KD layers or keys without a name")
    described = [_layer(item, version, label) for item in layers]
    if version > 1:
        _check_sums(content, label)
    return SavedStudent(described, _with_versions(state, versions))


def _check_sums(content: dict[str, Any], label: str) -> None:
    sums, state = content.get("checksums"), content["state"]
    if not isinstance(sums, dict) or set(sums) != set(state):
        raise CheckpointError(
            f"{label} is damaged: it has no checksums for some or all of its entries"
        )
    if content.get("checksum") != _description_sum(content):
        raise CheckpointError(f"{label} is damaged: the checksum of its description is wrong")
    for key, value in state.items():
        if checksum(value) != sums[key]:
            raise CheckpointError(
                f"{label} is damaged: the checksum of {key!r} is wrong; take another copy of it"
            )


def _description_sum(content: dict[str, Any]) -> str:
    parts = ("format", "version", "layers", "module_versions", "checksums")
    return checksum([content.get(part) for part in parts])


def _with_versions(state: Any, versions: Any) -> OrderedDict[str, Any]:
    """The result of ``state_dict()``, with the version of every module that has one."""
    ordered: OrderedDict[str, Any] = OrderedDict(state)
    numbers = {str(name): v for name, v in versions.items() if isinstance(v, int)}
    metadata = OrderedDict((name, {"version": v}) for name, v in numbers.items())
    setattr(ordered, "_metadata", metadata)  # noqa: B010  # where torch keeps it
    return ordered


def _layer(item: Any, version: int, label: str) -> LayerDescription:
    for since, values in _ADDED.items():
        if version < since and isinstance(item, dict):
            item = {**values, **item}
    _check_layer(item, f"{label} is damaged")
    return replace(LayerDescription(**item), path=tuple(item["path"]))


def _check_layer(item: Any, what: str) -> None:
    """Check a description field by field: the file may come from anywhere."""
    counts = ("in_channels", "num_templates", "channel_dim")
    valid = (
        isinstance(item, dict)
        and set(item) == {"name", "path", "alpha", "memory", "eps", *counts}
        and isinstance(item["name"], str)
        and isinstance(item["path"], (list, tuple))
        and all(isinstance(key, (int, str)) for key in item["path"])
        and all(type(item[key]) is int for key in counts)
        and all(type(item[key]) in (int, float) for key in ("alpha", "eps"))
        and all(isfinite(item[key]) and item[key] >= 0 for key in ("alpha", "eps"))
        and item["memory"] in MEMORY
        and item["channel_dim"] in (1, -1)
        and item["in_channels"] > 0
        and item["num_templates"] > 0
    )
    if not valid:
        raise CheckpointError(f"{what}: a KD layer is described by {_short.repr(item)}")


def _portable(key: str, value: Any) -> Any:
    """``value`` on the CPU; raise CheckpointError if a file without code cannot hold it."""
    if isinstance(value, Tensor):
        return _portable_tensor(key, value)
    if isinstance(value, Mapping):
        return {_portable(key, k): _portable(key, v) for k, v in value.items()}
    if type(value) in (list, tuple):
        return type(value)(_portable(key, item) for item in value)
    if value is None or type(value) in _PLAIN:
        return value
    raise CheckpointError(
        f"the student cannot be saved: its state {key!r} holds a {type(value).__name__}, and the "
        "file holds tensors, names and numbers only; let get_extra_state() return those"
    )


def _portable_tensor(key: str, value: Tensor) -> Tensor:
    value = value.detach()
    if type(value).__name__ == "DTensor":
        value = value.full_tensor()  # type: ignore[attr-defined]  # all processes contribute
    value = value.cpu()
    why = None if value.is_quantized else why_not_plain(value)
    if type(value) is not Tensor:
        why = f"is a {type(value).__name__}, a class that the file cannot store"
    # An expanded tensor is written out in full: its size must not exceed what the file holds.
    if why is not None and why != why_hollow(value):
        raise CheckpointError(f"the student cannot be saved: {key!r} {why}")
    return value if why is None else value.contiguous()
