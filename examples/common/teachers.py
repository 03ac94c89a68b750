"""Loads teachers from files, renames the weights of other implementations, and explains errors."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

# The teachers that most papers use (Y. Tian et al., ICLR 2020, "vanilla") differ from ours only in
# the names of the weights. Each rule applies to the whole name, in this order.
RENAMED = {
    "resnet": [(r"\.downsample\.", ".shortcut.")],
    "wrn": [
        (r"^bn1\.", "last.0."),
        (r"^block(\d)\.layer\.(\d+)\.", r"layer\1.\2."),
        (r"\.convShortcut\.", ".shortcut."),
    ],
    "resnet50": [(r"^conv1\.", "stem.0."), (r"^bn1\.", "stem.1."), (r"^linear\.", "fc.")],
}


def load_teacher(model: nn.Module, name: str, path: Path, *, rename: bool = True) -> dict[str, Any]:
    """Load the weights in ``path`` into ``model``; returns the file's ``"facts"``, if it has any.

    The file holds a state dict, or a dict with one under ``"model"`` or ``"state_dict"``. Names are
    ours or (with ``rename``) those of the usual CIFAR teachers, with or without the prefix
    ``module.``.

    Raises:
        SystemExit: if the file cannot be read, or does not fit.
    """
    if not path.exists():
        raise SystemExit(f"there is no file {path}")
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise SystemExit(
            f"{path} cannot be read as a checkpoint of tensors and numbers; for safety, other "
            f"files are not read: {error}"
        ) from None
    given, wanted = state_of(saved, path), model.state_dict()
    if rename and given.keys() != wanted.keys():
        given = renamed(given, name)
    check_fit(wanted, given, name, path)
    model.load_state_dict(given)
    return saved.get("facts", {})


def state_of(saved: Any, path: Path) -> dict[str, Tensor]:
    """The state dict in the content of a file."""
    for key in ("model", "state_dict"):
        if isinstance(saved, dict) and isinstance(saved.get(key), dict):
            saved = saved[key]
    tensors = isinstance(saved, dict) and all(isinstance(v, Tensor) for v in saved.values())
    if not tensors or not saved:
        keys = list(saved)[:5] if isinstance(saved, dict) else type(saved).__name__
        raise SystemExit(
            f"{path} has no state dict, neither plain nor under 'model' or 'state_dict': found "
            f"{keys}"
        )
    return {name.removeprefix("module."): value for name, value in saved.items()}


def renamed(state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """The state with our names."""
    family = name if name in RENAMED else re.match("[a-z]*", name)[0]
    rules = RENAMED.get(family, [])
    found = {}
    for key, value in state.items():
        ours = key
        for pattern, replacement in rules:
            ours = re.sub(pattern, replacement, ours)
        found[ours] = value
    return found


def check_fit(wanted: dict[str, Tensor], given: dict[str, Tensor], name: str, path: Path) -> None:
    """Exit with a list of differences unless names and shapes agree."""
    missing = sorted(wanted.keys() - given)
    unknown = sorted(given.keys() - wanted)
    shapes = [
        f"{key} is {list(given[key].shape)} and should be {list(wanted[key].shape)}"
        for key in sorted(wanted.keys() & given)
        if wanted[key].shape != given[key].shape
    ]
    problems = [
        f"{len(names)} {what}: {', '.join(names[:5])}{', ...' if len(names) > 5 else ''}"
        for what, names in (
            ("missing", missing),
            ("unknown", unknown),
            ("of another shape", shapes),
        )
        if names
    ]
    if problems:
        raise SystemExit(f"{path} does not fit {name}; {'; '.join(problems)}")
