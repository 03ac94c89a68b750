"""Checksums of tensors and of the nested containers that states are made of."""

import ctypes
import hashlib
from collections.abc import Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from kdlayers._utils.plain_tensors import why_hollow
from kdlayers.errors import CheckpointError

_DEPTH = 32
_NODES = 1_000_000


class _Digest(Protocol):
    def update(self, data: Any, /) -> None: ...


def checksum(tree: Any) -> str:
    """SHA-256 of names, numbers and tensors in dicts, lists and tuples, as 64 hex digits.

    Equal trees have equal checksums on all devices and for any order of dict keys. A tensor
    counts with its dtype, its shape and its bytes, and any other object with its type alone.

    Raises:
        CheckpointError: if the tree is too deep or too large, or a tensor is expanded: reading it
            would take more memory than it holds.
    """
    digest = hashlib.sha256()
    left = [_NODES]
    _add(digest, tree, _DEPTH, left)
    return digest.hexdigest()


def _add(digest: _Digest, tree: Any, depth: int, left: list[int]) -> None:
    left[0] -= 1
    if depth == 0 or left[0] < 0:
        raise CheckpointError("a state is nested too deeply, or has too many entries, to be read")
    if isinstance(tree, Tensor):
        _add_tensor(digest, tree)
    elif isinstance(tree, Mapping):
        digest.update(f"dict {len(tree)}\n".encode())
        for key, value in sorted(tree.items(), key=lambda item: str(item[0])):
            _add(digest, key, depth - 1, left)
            _add(digest, value, depth - 1, left)
    elif isinstance(tree, (list, tuple)):
        digest.update(f"list {len(tree)}\n".encode())
        for value in tree:
            _add(digest, value, depth - 1, left)
    elif isinstance(tree, bytes):
        digest.update(f"bytes {len(tree)}\n".encode())
        digest.update(tree)
    else:
        known = tree is None or type(tree) in (bool, int, float, str, torch.dtype, torch.device)
        text = repr(tree).encode() if known else b""
        digest.update(f"{type(tree).__name__} {len(text)}\n".encode())
        digest.update(text)


def _add_tensor(digest: _Digest, tensor: Tensor) -> None:
    digest.update(f"{tensor.dtype} {list(tensor.shape)} {tensor.layout}\n".encode())
    if tensor.is_meta or tensor.layout is not torch.strided:
        return  # the reader of the state refuses them
    why = why_hollow(tensor)
    if why is not None:
        raise CheckpointError(f"the state is damaged: a tensor {why}")
    if tensor.is_quantized:
        for part in quantisation(tensor):
            _add(digest, part, 2, [8])
        tensor = tensor.int_repr()
    values = tensor.detach().cpu().resolve_conj().resolve_neg().contiguous()
    size = values.numel() * values.element_size()
    if size:
        # The memory itself, without a copy; bytes(tensor) would need NumPy.
        digest.update((ctypes.c_char * size).from_address(values.data_ptr()))


def quantisation(tensor: Tensor) -> tuple[Any, ...]:
    """Scales, zero points and axis of a quantised tensor."""
    if tensor.qscheme() in (torch.per_tensor_affine, torch.per_tensor_symmetric):
        return tensor.q_scale(), tensor.q_zero_point()
    points = tensor.q_per_channel_scales(), tensor.q_per_channel_zero_points()
    return (*points, tensor.q_per_channel_axis())
