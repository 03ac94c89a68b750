"""Finds the logits in a model's output by name, then by shape, and the features in a module's."""

from collections.abc import Mapping
from itertools import takewhile
from typing import Any

from torch import Tensor

from kdlayers._models.values import is_softmax
from kdlayers._utils.tree import Path, first_tensor, leaves
from kdlayers.errors import AttachError

NAMES = ("logits", "out", "prediction", "predictions", "pred", "preds", "output")
"""Keys and fields that hold logits, in Hugging Face's, torchvision's and common usage."""


def main_output(output: Any) -> Tensor | None:
    """The logits, or the first tensor if they are ambiguous; None if there is no tensor."""
    found = _found(output)
    return first_tensor(output) if found is None else found


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
        "are the logits; return the logits alone, or a dict or named tuple with the key 'logits'; "
        "a loss can also read a module that returns what it compares: at=(student's, teacher's)"
    )


def _after_map(output: Any, found: Tensor, image: tuple[int, int] | None) -> bool:
    """Whether the vector ``found`` comes after a map of the size of the images."""
    if image is None or found.dim() != 2 or _named(output) is found:
        return False
    before = takewhile(lambda tensor: tensor is not found, (t for _, t in leaves(output)))
    return any(tensor.dim() == 4 and tuple(tensor.shape[2:]) == image for tensor in before)


def features_of(output: Any, path: Path, name: str) -> Any:
    """The features at ``path`` of the output of the module ``name``.

    Raises:
        AttachError: if the output does not have the form that it had in the dry run.
    """
    found = output
    for key in path:
        if not _holds(found, key):
            raise AttachError(_other_form(output, name))
        found = found[key]
    if isinstance(found, (tuple, list, dict)):
        raise AttachError(_other_form(output, name))
    return found


def _holds(tree: Any, key: int | str) -> bool:
    """Whether a container has this key. Tensors do not count: a key would take one image."""
    if isinstance(tree, dict):
        return key in tree
    return isinstance(tree, (tuple, list)) and isinstance(key, int) and key < len(tree)


def _other_form(output: Any, name: str) -> str:
    return (
        f"the module at {name!r} returned a {type(output).__name__} in this forward, which it did "
        "not in the dry run of attach_kd, in eval mode; call the model without options that change "
        "its output (return_dict=False), or choose a point whose output has one form in training "
        "and in eval mode; find_points(model) lists points"
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
    floats = [item for item in leaves(output) if item[1].is_floating_point() and item[1].dim() > 1]
    candidates = [tensor for path, tensor in floats if not _is_mask(path)]
    if len(candidates) < 2:
        return candidates[0] if candidates else first_tensor(output)
    # Equal shapes are a main and auxiliary classifiers, the main one first, as in torchvision, or
    # probabilities before their logits.
    if not isinstance(output, Mapping) and len({tuple(t.shape) for t in candidates}) == 1:
        main, *others = candidates
        return next((t for t in others if is_softmax(main, t)), main)
    vectors = [t for t in candidates if t.dim() == 2]
    return vectors[0] if len(vectors) == 1 else None


def _is_mask(path: Path) -> bool:
    """Whether a name says that the tensor is a mask, as of the patches that ViTMAE left out."""
    return any(isinstance(key, str) and key.endswith("mask") for key in path)


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
