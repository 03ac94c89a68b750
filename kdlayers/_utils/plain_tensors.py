"""Which tensors of a file or state can be copied into a model."""

from typing import Any

import torch
from torch import Tensor


def why_not_plain(value: Any) -> str | None:
    """Why ``value`` cannot be an entry of a state, in words; None for a plain tensor.

    A plain tensor has all its values in memory. An expanded tensor in a small file may declare any
    size.
    """
    if not isinstance(value, Tensor):
        return f"is a {type(value).__name__}, not a tensor"
    if value.is_meta:
        return "is a meta tensor, which has no values"
    if value.layout is not torch.strided:
        return f"is a sparse tensor ({value.layout})"
    if value.is_quantized:
        return "is a quantized tensor"
    return why_hollow(value)


def why_hollow(value: Tensor) -> str | None:
    """As `why_not_plain`, for a tensor in memory that declares more bytes than it holds."""
    declared = value.numel() * value.element_size()
    held = value.untyped_storage().nbytes()
    return None if declared <= held else f"declares {declared} bytes but holds {held}"


def finite(value: Tensor) -> bool:
    """Whether it has neither NaN nor infinity."""
    return not (value.is_floating_point() or value.is_complex()) or bool(value.isfinite().all())
