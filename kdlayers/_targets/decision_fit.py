"""The passes that learn decisions: discriminants, sub-classes, prototypes and the count table."""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from kdlayers._targets.codebook_fit import from_first_rank
from kdlayers._targets.distances import affine, nearest_index, own_subclass, sums_by_index
from kdlayers._targets.hash import derive_seed
from kdlayers._targets.kmeans import kmeans, mean_centers
from kdlayers._targets.lda import Scatter, check_range, discriminants
from kdlayers._targets.reservoir import Reservoir, sample_size
from kdlayers._targets.rows import BLOCK
from kdlayers._utils.distributed import all_sum
from kdlayers._utils.warn import warn
from kdlayers.errors import FitError

COMPONENTS = 60
"""The default, the authors' value for CIFAR-100. It is reduced silently if there are fewer."""
ROWS_PER_SUBCLASS, SMALL_SAMPLE = 256, 2048
"""Rows in the sample of a class; more than for a codebook, because no later pass refines these
centres."""


@dataclass
class Plan:
    """The user's options, and the results of the passes so far."""

    subclasses: int
    components: int
    num_classes: int | None
    seed: int
    install: Callable[..., None]
    projection: Tensor = field(init=False)
    shift: Tensor = field(init=False)
    centers: Tensor = field(init=False)
    prototypes: Tensor = field(init=False)

    def own(self, z: Tensor, labels: Tensor) -> Tensor:
        """Sub-class of each row of z."""
        return own_subclass(z, labels, self.centers, self.subclasses)


class ScatterPass:
    """Collects the statistics for linear discriminant analysis."""

    stage = "class statistics"
    labelled = True

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._scatter = Scatter(plan.num_classes)
        self._dtype = torch.float32

    def take(self, rows: Tensor, labels: Tensor) -> None:
        """Add a block."""
        self._dtype = rows.dtype
        self._scatter.add(rows, labels)

    def finish(self) -> "SubclassPass":
        """Find the discriminant directions."""
        plan = self._plan
        self._scatter.reduce()
        plan.num_classes = len(self._scatter.counts)
        _check_classes(self._scatter.counts, plan.subclasses)
        directions, offsets = discriminants(self._scatter)
        if len(directions) < plan.components != COMPONENTS:
            warn(
                f"DecisionTargets(components={plan.components}) is reduced to {len(directions)}: "
                f"{plan.num_classes} classes and features of width {directions.shape[1]} have no "
                "more discriminant directions; pass at most this number of components, or omit it"
            )
        plan.projection = from_first_rank(directions[: plan.components].to(self._dtype))
        plan.shift = from_first_rank(offsets[: plan.components].to(self._dtype))
        return SubclassPass(plan)


class _ProjectedPass:
    """A pass over z, the projections of the rows."""

    labelled = True

    def __init__(self, plan: Plan) -> None:
        self._plan = plan

    def take(self, rows: Tensor, labels: Tensor) -> None:
        """Project a block and add it."""
        check_range(labels, self._plan.num_classes)
        self.add(affine(rows, self._plan.projection, self._plan.shift), labels, rows)

    def add(self, z: Tensor, labels: Tensor, rows: Tensor) -> None:
        """Add projections [n, d] of rows [n, D] with labels [n]."""
        raise NotImplementedError


class SubclassPass(_ProjectedPass):
    """Samples each class, then clusters each class."""

    stage = "sampling classes"

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        classes = plan.num_classes or 0
        wanted = max(ROWS_PER_SUBCLASS * plan.subclasses, SMALL_SAMPLE)
        capacity = sample_size(wanted, plan.subclasses, classes * len(plan.projection))
        self._reservoir = Reservoir(capacity, plan.seed, groups=classes)

    def add(self, z: Tensor, labels: Tensor, rows: Tensor) -> None:
        """Offer a block to the sample, sorted by the features, which do not depend on the LDA."""
        self._reservoir.add(z, labels, content=rows)

    def finish(self) -> "PrototypePass | None":
        """Cluster each class; run the other passes in memory if the sample holds all rows."""
        plan = self._plan
        _check_classes(self._reservoir.totals(), plan.subclasses)
        sample = self._reservoir.merged()
        sizes = torch.bincount(sample.groups, minlength=self._reservoir.groups).tolist()
        clusters = [
            kmeans(rows, plan.subclasses, derive_seed(plan.seed, 1 + label)).centers
            for label, rows in enumerate(sample.rows.split(sizes))
        ]
        plan.centers = from_first_rank(torch.cat(clusters))
        prototypes = PrototypePass(plan)
        if not sample.complete:
            return prototypes
        self._replay(prototypes)
        decisions = prototypes.finish()
        self._replay(decisions)
        decisions.finish()
        return None

    def _replay(self, target: _ProjectedPass) -> None:
        z, labels = self._reservoir.local()
        for part, part_labels in zip(z.split(BLOCK), labels.split(BLOCK), strict=True):
            target.add(part, part_labels, part)


class PrototypePass(_ProjectedPass):
    """Means of the projections of each sub-class."""

    stage = "averaging sub-classes"

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        self._sums = torch.zeros_like(plan.centers, dtype=torch.float64)
        self._counts = torch.zeros(len(plan.centers), dtype=torch.long, device=self._sums.device)

    def add(self, z: Tensor, labels: Tensor, rows: Tensor) -> None:  # noqa: ARG002
        """Add a block to the sums."""
        own = self._plan.own(z, labels)
        self._sums += sums_by_index(z, own, len(self._counts))
        self._counts += torch.bincount(own, minlength=len(self._counts))

    def finish(self) -> "DecisionPass":
        """Compute the means; an empty sub-class keeps its centre."""
        plan = self._plan
        plan.prototypes = mean_centers(all_sum(self._sums), all_sum(self._counts), plan.centers)
        return DecisionPass(plan)


class DecisionPass(_ProjectedPass):
    """Counts how many rows of each sub-class are nearest to each prototype."""

    stage = "counting decisions"

    def __init__(self, plan: Plan) -> None:
        super().__init__(plan)
        size = len(plan.centers)
        self._table = torch.zeros(size, size, dtype=torch.int32, device=plan.centers.device)

    def add(self, z: Tensor, labels: Tensor, rows: Tensor) -> None:  # noqa: ARG002
        """Count a block."""
        decided = nearest_index(z, self._plan.prototypes)
        cells = self._plan.own(z, labels) * len(self._table) + decided
        self._table.view(-1).index_add_(0, cells, torch.ones_like(cells, dtype=torch.int32))

    def finish(self) -> None:
        """Divide each row of the table by its sum; an empty sub-class gets a one-hot row."""
        plan = self._plan
        table = all_sum(self._table)
        counts = table.sum(dim=1)
        shares = table.to(plan.centers.dtype) / counts.clamp(min=1).unsqueeze(1)
        empty = (counts == 0).nonzero().squeeze(1)
        shares[empty, empty] = 1.0
        plan.install(
            projection=plan.projection,
            shift=plan.shift,
            centers=plan.centers,
            prototypes=plan.prototypes,
            decisions=shares,
            counts=counts.reshape(-1, plan.subclasses),
        )


def _check_classes(counts: Tensor, subclasses: int) -> None:
    rows = counts.tolist()
    if len(rows) < 2:
        raise FitError(
            "every label is 0, but decisions need two classes or more; pass data with all classes, "
            "or use CodebookTargets, which needs no labels"
        )
    missing = [label for label, count in enumerate(rows) if not count]
    if missing:
        raise FitError(
            f"no sample of {_listed(missing)} of the {len(rows)} classes 0..{len(rows) - 1}; pass "
            "data with all classes, or set num_classes to the number of classes in the data"
        )
    few = [label for label, count in enumerate(rows) if count < subclasses]
    if few:
        raise FitError(
            f"too few positions of {_listed(few)} for {subclasses} sub-classes (minimum over the "
            f"classes: {min(rows)}); pass more data or DecisionTargets(subclasses={min(rows)})"
        )
    if sum(rows) <= len(rows):
        raise FitError(
            f"there are {sum(rows)} positions in {len(rows)} classes, which do not vary within "
            "classes; "
            "pass more data"
        )


def _listed(labels: list[int]) -> str:
    shown = ", ".join(str(label) for label in labels[:10])
    more = f" and {len(labels) - 10} more" if len(labels) > 10 else ""
    return f"class{'es' if len(labels) > 1 else ''} {shown}{more}"
