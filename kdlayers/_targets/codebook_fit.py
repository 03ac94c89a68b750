"""The passes that learn a codebook: k-means on a sample, then a Lloyd step if it is small."""

from collections.abc import Callable

import torch
from torch import Tensor

from kdlayers._targets.distances import nearest, sums_by_index
from kdlayers._targets.hash import derive_seed
from kdlayers._targets.kmeans import kmeans, mean_centers
from kdlayers._targets.reservoir import Reservoir, Sample, sample_size
from kdlayers._utils.distributed import all_sum, rank
from kdlayers._utils.warn import warn
from kdlayers.errors import FitError

ROWS_PER_CENTER, SMALL_SAMPLE = 256, 2**14
"""Rows in a sample: the first number for each centre, and at least the second in all."""
ENOUGH_ROWS = 256
"""With this many rows for each centre, centres of a sample are about as good as those of all rows.
"""


class SamplePass:
    """Samples rows, then clusters them."""

    stage = "sampling features"
    labelled = False

    def __init__(self, k: int, seed: int, install: Callable[..., None]) -> None:
        self._k, self._seed, self._install = k, seed, install
        self._reservoir: Reservoir | None = None

    def take(self, rows: Tensor, labels: Tensor) -> None:  # noqa: ARG002
        """Offer a block to the sample."""
        _check_size(rows)
        if self._reservoir is None:
            wanted = max(ROWS_PER_CENTER * self._k, SMALL_SAMPLE)
            capacity = sample_size(wanted, self._k, rows.shape[1])
            self._reservoir = Reservoir(capacity, self._seed)
        self._reservoir.add(rows)

    def finish(self) -> "LloydPass | None":
        """Cluster the sample; another pass reads all rows if there are few for each centre."""
        if self._reservoir is None:
            raise FitError("fit() got batches without a single row: all were empty")
        sample = self._reservoir.merged()
        _check_enough(sample, self._k)
        result = kmeans(sample.rows, self._k, derive_seed(self._seed, 0))
        # Ranks may run on different hardware, so all use rank 0's centres.
        centers, counts = from_first_rank(result.centers), from_first_rank(result.counts)
        if sample.complete or len(sample.rows) >= ENOUGH_ROWS * self._k:
            self._install(centers=centers, counts=counts, inertia=from_first_rank(result.inertia))
            return None
        return LloydPass(centers, self._install)


class LloydPass:
    """One exact Lloyd step: each centre becomes the mean of all rows nearest to it."""

    stage = "refining centres"
    labelled = False

    def __init__(self, centers: Tensor, install: Callable[..., None]) -> None:
        self._centers, self._install = centers, install
        self._sums = torch.zeros_like(centers, dtype=torch.float64)
        self._counts = torch.zeros(len(centers), dtype=torch.long, device=centers.device)
        self._distance = torch.zeros((), dtype=torch.float64, device=centers.device)

    def take(self, rows: Tensor, labels: Tensor) -> None:  # noqa: ARG002
        """Add a block to the sums."""
        distances, index = nearest(rows, self._centers)
        # Relative to the centre, so that the sums keep their precision.
        self._sums += sums_by_index(rows - self._centers[index], index, len(self._centers))
        self._counts += torch.bincount(index, minlength=len(self._centers))
        self._distance += distances.sum(dtype=torch.float64)

    def finish(self) -> None:
        """Use the means as the centres."""
        sums, counts, distance = (all_sum(t) for t in (self._sums, self._counts, self._distance))
        moves = mean_centers(sums, counts, torch.zeros_like(sums))
        # Moving a centre to the mean lowers the sum of squared distances by n |move|^2.
        inertia = (distance - (counts * moves.square().sum(dim=1)).sum()) / counts.sum()
        centers = (self._centers.double() + moves).to(self._centers.dtype)
        self._install(centers=centers, counts=counts, inertia=inertia.clamp(min=0))


def _check_size(rows: Tensor) -> None:
    largest = float(rows.abs().amax())
    # The largest squared distance is that between opposite corners.
    if 4 * rows.shape[1] * largest**2 > torch.finfo(rows.dtype).max:
        raise FitError(
            f"the teacher's features reach {largest:.2g}, so their squared distances overflow "
            f"{rows.dtype}: choose a point after a normalisation layer, or run the teacher in "
            "float64"
        )


def _check_enough(sample: Sample, k: int) -> None:
    rows = len(sample.rows)
    if rows < k:
        fewer = max(1, rows // 16)
        raise FitError(
            f"CodebookTargets({k}) needs at least {k} positions, but the batches hold {rows}; pass "
            f"more data, or choose a smaller codebook, such as KDPoint(..., "
            f"targets=CodebookTargets({fewer})) with {rows // fewer} positions for each centre"
        )
    distinct = len(sample.tags.unique())
    if distinct < k:
        warn(
            f"CodebookTargets({k}) saw only {distinct} distinct feature vectors, so some centres "
            f"are equal or never chosen; lower num_templates to {distinct} or less",
        )


def from_first_rank(tensor: Tensor) -> Tensor:
    """The tensor of rank 0, on all ranks."""
    return all_sum(tensor if rank() == 0 else torch.zeros_like(tensor))
