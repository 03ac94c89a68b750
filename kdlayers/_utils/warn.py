"""Warnings that point at the user's line, for any depth of calls."""

import os
import warnings
from inspect import currentframe
from pathlib import Path

import torch

from kdlayers.errors import KDLayersWarning

_PACKAGES = (Path(__file__).parent.parent, Path(torch.__file__).parent)
_INSIDE = tuple(f"{package}{os.sep}" for package in _PACKAGES)


def warn(message: str) -> None:
    """Issue a `KDLayersWarning` at the innermost line that is neither kdlayers' nor torch's.

    It does nothing under a compiler, which cannot trace a warning.
    """
    if not torch.compiler.is_compiling():
        warnings.warn(message, KDLayersWarning, stacklevel=_level())


def _level() -> int:
    """The ``stacklevel`` of that line, for a warning in the function that calls this one."""
    frame, level = currentframe(), 0  # this function; its caller, which warns, is level 1
    while frame is not None and frame.f_code.co_filename.startswith(_INSIDE):
        frame, level = frame.f_back, level + 1
    return level
