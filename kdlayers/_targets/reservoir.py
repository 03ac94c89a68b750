"""A bounded uniform sample of rows from a stream of any length, in one or several groups."""

from typing import NamedTuple

import torch
from torch import Tensor

from kdlayers._targets.hash import counter_keys, derive_seed, row_tags
from kdlayers._utils.distributed import all_rows, all_sum, rank

LARGEST_SAMPLE = 2**28
"""Maximum number of elements in a sample (1 GiB in float32), unless that gives too few rows."""
LEAST_ROWS = 16
"""Minimum number of rows for each centre."""

_LAST = 2**63 - 1


def sample_size(wanted: int, centers: int, width: int) -> int:
    """Rows to sample for ``centers`` centres: ``wanted``, or fewer if rows are too wide."""
    return min(wanted, max(LEAST_ROWS * centers, LARGEST_SAMPLE // width))


class Sample(NamedTuple):
    """Rows of a reservoir, sorted by group and then by content."""

    rows: Tensor
    """[n, D]."""
    groups: Tensor
    """Group of each row, [n]."""
    tags: Tensor
    """A number for each row that depends only on its values, [n]."""
    complete: bool
    """Whether the sample holds all rows that were added on all ranks."""


class Reservoir:
    """Keeps at most ``capacity`` rows of each group; all rows have the same probability.

    Each row gets a random key from its running index. A group keeps the rows with the smallest
    keys (bottom-k sampling). The same rule merges the samples of several ranks into a uniform
    sample of the union. At most ``1.25 * capacity * groups`` rows and a block are in memory.

    Args:
        capacity: maximum number of rows in each group.
        seed: seed of the keys; it is combined with the rank.
        groups: number of groups, such as classes.
    """

    def __init__(self, capacity: int, seed: int, *, groups: int = 1) -> None:
        self.capacity = capacity
        self.groups = groups
        self.added = 0
        self._seed = derive_seed(seed, rank())
        self._parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        self._settled = 0
        self._counts = self._limits = torch.zeros(groups, dtype=torch.long, device="cpu")

    @property
    def held(self) -> int:
        """Rows in memory now."""
        return sum(len(part[0]) for part in self._parts)

    def add(
        self, rows: Tensor, groups: Tensor | None = None, *, content: Tensor | None = None
    ) -> None:
        """Offer rows [n, D] of groups [n]; rows are sorted by ``content`` [n, *] if given."""
        if groups is None:
            groups = torch.zeros(len(rows), dtype=torch.long, device=rows.device)
        if not self.added:
            self._counts = torch.zeros(self.groups, dtype=torch.long, device=rows.device)
            self._limits = torch.full_like(self._counts, _LAST)
        keys = counter_keys(self.added, len(rows), self._seed, rows.device)
        self.added += len(rows)
        self._counts += torch.bincount(groups, minlength=self.groups)
        kept = (keys < self._limits[groups]).nonzero().squeeze(1)
        tags = row_tags((rows if content is None else content)[kept])
        self._parts.append((keys[kept], groups[kept], tags, rows[kept]))
        if self.held - self._settled > self.capacity * self.groups // 4:
            self._settle()

    def totals(self) -> Tensor:
        """Rows offered so far on all ranks, by group: [groups]."""
        return all_sum(self._counts)

    def local(self) -> tuple[Tensor, Tensor]:
        """This rank's rows and their groups."""
        _, groups, _, rows = self._settle()
        return rows, groups

    def merged(self) -> Sample:
        """The sample of all ranks together, the same on each."""
        keys, groups, tags, rows = self._settle()
        # Exchange the keys first, so that only rows of the merged sample are sent.
        _, limits = self._smallest(all_rows(keys), all_rows(groups))
        mine = keys <= limits[groups]
        rows, groups, tags = (all_rows(part[mine]) for part in (rows, groups, tags))
        order = _sorted_by(groups, tags)
        complete = bool((self.totals() <= self.capacity).all())
        return Sample(rows[order], groups[order], tags[order], complete)

    def _settle(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        keys, groups, tags, rows = (torch.cat(part) for part in zip(*self._parts, strict=True))
        kept, self._limits = self._smallest(keys, groups)
        part = (keys[kept], groups[kept], tags[kept], rows[kept])
        self._parts, self._settled = [part], len(kept)
        return part

    def _smallest(self, keys: Tensor, groups: Tensor) -> tuple[Tensor, Tensor]:
        """Indices of each group's ``capacity`` smallest keys, and its largest kept key."""
        order = _sorted_by(groups, keys)
        groups = groups[order]
        starts = torch.searchsorted(groups, torch.arange(self.groups, device=groups.device))
        place = torch.arange(len(groups), device=groups.device) - starts[groups]
        last = place == self.capacity - 1
        limits = torch.full((self.groups,), _LAST, device=keys.device)
        limits[groups[last]] = keys[order[last]]
        return order[place < self.capacity], limits


def _sorted_by(first: Tensor, second: Tensor) -> Tensor:
    """Stable order by ``first``, then ``second``."""
    order = second.argsort(stable=True)
    return order[first[order].argsort(stable=True)]
