"""Finds the logits in a model's output by name, then by shape, and the features in a module's."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from kdlayers._utils.torch_internals import is_functional, plain
from kdlayers._utils.tree import Path, first_tensor, leaves
from kdlayers.errors import AttachError

NAMES = ("logits", "out", "prediction", "predictions", "pred", "preds", "output")
"""Keys and fields that hold logits, in Hugging Face's, torchvision's and common usage."""


def main_output(output: Any) -> Tensor | None:
    """The logits, or the first tensor if they are ambiguous; None if there is no tensor."""
    return _found(output) if why_unclear(output) is None else first_tensor(output)


def why_unclear(output: Any, image: tuple[int, int] | None = None) -> str | None:
    """Why it is unclear which tensor of ``output`` has the logits; None if it is clear.

    With the height and width of the images, ``image``, a map of this size that comes before a
    vector makes it unclear: the map may have a class for each pixel, the vector for each image.
    """
    found = _found(output)
    if first_tensor(output) is None or (found is not None and not _after_map(output, found, image)):
        return None
    if is_detections(output):
        return "it returns detections, one dict of boxes per image, so there are no logits"
    parts = ", ".join(
        f"{'.'.join(map(str, path)) or 'the tensor'} {list(tensor.shape)}"
        for path, tensor in leaves(output)
    )
    return (
        f"it returns several tensors ({parts}), and neither a name nor a shape shows which of them "
        "are the logits; return the logits alone, or a dict or named tuple with the key 'logits', "
        "or give the loss the name of the module that makes them, at=(student's, teacher's)"
    )


def _after_map(output: Any, found: Tensor, image: tuple[int, int] | None) -> bool:
    """Whether the vector ``found`` comes after a map of the size of the images."""
    if image is None or found.dim() != 2 or _named(output) is found:
        return False
    maps = [tensor.dim() == 4 and tuple(tensor.shape[2:]) == image for _, tensor in leaves(output)]
    where = next(i for i, (_, tensor) in enumerate(leaves(output)) if tensor is found)
    return any(maps[:where])


def features_of(output: Any, path: Path, name: str) -> Any:
    """The features at ``path`` of the output of the module ``name``.

    Raises:
        AttachError: if the output does not have the form that it had in the dry run.
    """
    found = output
    for key in path:
        if isinstance(found, Tensor):  # the key would take one image of it
            raise AttachError(_other_form(output, name))
        found = found[key]
    if isinstance(found, (tuple, list, dict)):
        raise AttachError(_other_form(output, name))
    return found


def _other_form(output: Any, name: str) -> str:
    return (
        f"the module at {name!r} returned a {type(output).__name__} in this forward, which it did "
        "not in the dry run of attach_kd, in eval mode; choose a point whose output has one form "
        "in training and in eval mode; find_points(model) lists points"
    )


def is_detections(output: Any) -> bool:
    """Whether this is what a detector returns: for every image a dict with its boxes."""
    listed = isinstance(output, (list, tuple)) and len(output) > 0
    return listed and all(isinstance(item, Mapping) and "boxes" in item for item in output)


def _found(output: Any) -> Tensor | None:
    named = _named(output)
    if named is not None:
        return named
    if is_detections(output):
        return None
    candidates = [t for _, t in leaves(output) if t.is_floating_point() and t.dim() > 1]
    if len(candidates) < 2:
        return candidates[0] if candidates else first_tensor(output)
    # Equal shapes are a main and auxiliary classifiers, the main one first, as in torchvision, or
    # probabilities before their logits.
    if not isinstance(output, Mapping) and len({tuple(t.shape) for t in candidates}) == 1:
        main, *others = candidates
        return next((t for t in others if _is_softmax(main, t)), main)
    vectors = [t for t in candidates if t.dim() == 2]
    return vectors[0] if len(vectors) == 1 else None


def _is_softmax(shares: Tensor, logits: Tensor) -> bool:
    """Whether ``shares`` are the probabilities of ``logits``; the first image shows it."""
    shares, logits = (plain(t)[:1].detach() for t in (shares, logits))
    if shares.device != logits.device or not _has_numbers(shares):
        return False
    return torch.allclose(shares, logits.to(shares).softmax(1), rtol=0, atol=1e-5)


def _has_numbers(tensor: Tensor) -> bool:
    """Whether a test on the values can be made: not of meta, fake and functional tensors."""
    real = type(tensor) is Tensor and not tensor.is_meta and not is_functional(tensor)
    return real and bool(tensor.numel())


def are_probabilities(output: Tensor) -> bool:
    """Whether the numbers of all classes are 0 or more and sum to 1, as after a softmax."""
    output = plain(output).detach().float()
    if output.dim() < 2 or output.shape[1] < 2 or not _has_numbers(output):
        return False
    one = torch.ones((), device=output.device)
    return bool((output >= 0).all()) and torch.allclose(output.sum(1), one, rtol=0, atol=1e-2)


def _named(output: Any) -> Tensor | None:
    for name in NAMES:
        if isinstance(output, Mapping):
            value = output.get(name)
        else:
            value = getattr(output, name, None) if hasattr(output, "_fields") else None
        found = None if value is None else first_tensor(value)
        if found is not None:
            return found
    return None
