"""Seeds transforms that have their own random generators, such as those of Albumentations."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

NAMES = ("transform", "transforms", "target_transform")
"""Where data sets keep their transforms."""


@contextmanager
def own_generators(dataset: Any, value: int) -> Generator[None, None, None]:
    """Context in which the generators of the data set's transforms are seeded.

    A transform has such generators if it has ``set_random_seed`` and ``set_random_state``, as
    ``albumentations.Compose`` has from version 1.4.21 on. Generators that cannot be found this way
    are noticed later, when a view differs from itself.
    """
    found = [transform for transform in _transforms(dataset) if _can_seed(transform)]
    states = [(t, t.random_generator, t.py_random) for t in found]
    for transform in found:
        transform.set_random_seed(value & 0xFFFFFFFF)
    try:
        yield
    finally:
        for transform, arrays, python in states:
            transform.set_random_state(arrays, python)


def _transforms(dataset: Any) -> list[Any]:
    """The transforms of a data set, and of the data sets that it wraps (as ``Subset`` does)."""
    found: list[Any] = []
    while dataset is not None:
        found += [getattr(dataset, n) for n in NAMES if getattr(dataset, n, None) is not None]
        dataset = getattr(dataset, "dataset", None)
    return found


def _can_seed(transform: Any) -> bool:
    names = ("set_random_seed", "set_random_state", "random_generator", "py_random")
    return all(hasattr(transform, name) for name in names)
