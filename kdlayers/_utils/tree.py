"""Tensors inside the tuples, lists and dicts that modules return."""

from collections.abc import Callable
from dataclasses import is_dataclass
from typing import Any, TypeAlias

from torch import Tensor

Path: TypeAlias = tuple[int | str, ...]


def leaves(tree: Any, path: Path = ()) -> list[tuple[Path, Tensor]]:
    """Every tensor of ``tree`` with the keys that lead to it, in order."""
    # Lists and a tuple of types, because older versions of torch.compile cannot trace generators.
    if isinstance(tree, Tensor):
        return [(path, tree)]
    found: list[tuple[Path, Tensor]] = []
    if isinstance(tree, dict):
        for key, branch in tree.items():
            found += leaves(branch, (*path, key))
    elif isinstance(tree, (tuple, list)):
        for index, branch in enumerate(tree):
            found += leaves(branch, (*path, index))
    return found


def pick(tree: Any, path: Path) -> Any:
    """The value at ``path``."""
    for key in path:
        tree = tree[key]
    return tree


def put(tree: Any, path: Path, value: Tensor) -> Any:
    """A copy of ``tree`` with ``value`` at ``path``; containers keep their types."""
    if not path:
        return value
    key, rest = path[0], path[1:]
    branch = put(tree[key], rest, value)
    if isinstance(tree, dict):
        copied = tree.copy()
        copied[key] = branch
        return copied
    items = [branch if index == key else item for index, item in enumerate(tree)]
    if isinstance(tree, list):
        return items
    return type(tree)(*items) if hasattr(tree, "_fields") else tuple(items)


def first_tensor(tree: Any) -> Tensor | None:
    """The first tensor, which for the output of a classifier is the logits."""
    found = leaves(tree)
    return found[0][1] if found else None


def main_tensor(tree: Any, batch: int | None = None, given: Any = ()) -> tuple[Path, Tensor] | None:
    """The features in a module's output, which are floating-point.

    The first of several values, such as features and attention weights; the largest value of a
    dict, such as the maps of a backbone by name. Vectors count only if there is nothing else.
    With the number of images, ``batch``, values of other numbers of samples count only if there is
    nothing else: blocks of TNT return the pixels of each patch before the patches of each image.
    Likewise empty values and the module's inputs, ``given``: encoders may return the images first.
    """
    found = [(path, t) for path, t in leaves(tree) if t.is_floating_point() and t.dim() > 1]
    inputs = {id(tensor) for _, tensor in leaves(given)}
    found = [item for item in found if item[1].numel() and id(item[1]) not in inputs] or found
    found = [item for item in found if item[1].dim() > 2] or found
    if not found:
        return None
    # Sequence-first tokens have the batch second; attention weights must not take their place.
    found = [item for item in found if batch in item[1].shape[:2]] or found
    named = isinstance(tree, dict) and not is_dataclass(tree)
    return max(found, key=lambda item: item[1].numel()) if named else found[0]


def mapped(tree: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A copy of ``tree`` with every tensor changed; containers keep their types."""
    for path, tensor in leaves(tree):
        tree = put(tree, path, change(tensor))
    return tree
