"""Passes of `kd.fit` over the user's loader; every pass sees the same data."""

import copy
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from functools import partial
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from kdlayers._utils.progress import shown
from kdlayers._utils.tree import leaves
from kdlayers._utils.warn import warn

Source = tuple[Callable[[int], object], Callable[[], object]]
"""A random source: a function that seeds it, and one that restores its state."""
DEPTH, MANY = 6, 64
"""Maximum depth of the search for generators, and maximum length of searched lists and dicts."""


class Passes:
    """Reads a loader several times. As a context manager it restores all random states at the end.

    Before each pass it seeds torch, Python's `random`, NumPy, and the generators of the loader, its
    samplers and its data set. Persistent workers keep their own random states, so it reads a copy
    of such a loader, which starts its workers in each pass.

    Args:
        loader: the loader of the batches.
        devices: indices of the CUDA devices whose random state is kept.
    """

    def __init__(self, loader: Iterable[Any], devices: Iterable[int]) -> None:
        self._loader = _with_fresh_workers(loader)
        self._devices = sorted(devices)
        self._stack = ExitStack()
        self._sources: list[Source] = []
        self._seen: dict[int, list[Tensor]] = {}

    def __enter__(self) -> Self:
        self._stack.enter_context(torch.random.fork_rng(devices=self._devices))
        self._sources = [*_global_sources(), *_held_sources(self._loader)]
        for _, restore in self._sources:
            self._stack.callback(restore)
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def batches(self, seed: int, title: str, *, progress: bool) -> Iterator[Any]:
        """One pass with ``seed``, with a progress bar if tqdm is installed, on a terminal.

        Warns:
            KDLayersWarning: if a pass with the same seed began with another batch.
        """
        torch.manual_seed(seed)
        for reseed, _ in self._sources:
            reseed(seed)
        for index, batch in enumerate(shown(self._loader, title, progress)):
            if index == 0:
                self._compare(seed, [tensor.clone() for _, tensor in leaves(batch)])
            yield batch

    def _compare(self, seed: int, first: list[Tensor]) -> None:
        seen = self._seen.setdefault(seed, first)
        if len(seen) == len(first) and all(map(_same, seen, first)):
            return
        warn(
            "kd.fit read the loader again and got different data, but codebooks and decisions need "
            "the same data in every pass: the loader or its data set uses a random source that "
            "kd.fit cannot seed; pass a loader without shuffling and augmentation"
        )


def _same(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors have the same bytes, so that NaN equals NaN."""
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    ours, theirs = (t.contiguous().reshape(-1).view(torch.uint8) for t in (first, second))
    return torch.equal(ours, theirs)


def _with_fresh_workers(loader: Iterable[Any]) -> Iterable[Any]:
    if not getattr(loader, "persistent_workers", False):
        return loader
    again = copy.copy(loader)
    vars(again).update(persistent_workers=False, _iterator=None)
    return again


def _global_sources() -> list[Source]:
    sources: list[Source] = [(random.seed, partial(random.setstate, random.getstate()))]
    numpy = sys.modules.get("numpy")
    if numpy is not None:
        sources.append(_legacy_numpy(numpy.random))
    return sources


def _held_sources(root: object) -> Iterator[Source]:
    """The generators in ``root`` and in the objects of its attributes."""
    numpy: Any = getattr(sys.modules.get("numpy"), "random", None)
    seen: set[int] = set()
    layer: list[Any] = [root]
    for _ in range(DEPTH):
        layer = [held for held in layer if id(held) not in seen]
        seen.update(map(id, layer))
        for held in layer:
            if isinstance(held, torch.Generator):
                yield held.manual_seed, partial(held.set_state, held.get_state())
            elif isinstance(held, random.Random):
                yield held.seed, partial(held.setstate, held.getstate())
            elif numpy is not None and isinstance(held, numpy.RandomState):
                yield _legacy_numpy(held)
            elif numpy is not None and isinstance(held, numpy.Generator):
                yield _numpy(held.bit_generator)
        layer = [inner for held in layer for inner in _inside(held)]


def _inside(held: object) -> list[Any]:
    if isinstance(held, (Tensor, nn.Module, type, ModuleType)):
        return []
    items = held
    if not isinstance(held, (dict, list, tuple)):
        items = getattr(held, "__dict__", {})
    elif len(held) > MANY:
        return []  # samples, not transforms
    return list(items.values()) if isinstance(items, dict) else list(items)  # type: ignore[call-overload]


def _legacy_numpy(source: Any) -> Source:
    return lambda seed: source.seed(seed % 2**32), partial(source.set_state, source.get_state())


def _numpy(bits: Any) -> Source:
    def set_to(state: Any) -> None:
        bits.state = state

    return lambda seed: set_to(type(bits)(seed).state), partial(set_to, bits.state)
