"""Linear discriminant analysis from counts, sums and products of rows; rows are not stored."""

import torch
from torch import Tensor

from kdlayers._targets.distances import sums_by_index
from kdlayers._utils.distributed import all_rows, all_sum
from kdlayers.errors import FitError

TOLERANCE = 1e-4
"""Singular values up to this count as 0, as in scikit-learn."""
_CANCELLED = 1e-13
"""Variance within classes below this share of the column's total is rounding error."""


class Scatter:
    """Number, sum and products of the rows of each class, in float64.

    ``origin``, the median of the first block, is subtracted from the rows. It is near the data, so
    that differences of the sums keep their precision, and equals the value of constant columns.

    Args:
        classes: number of classes; ``None``: the largest label + 1.
    """

    def __init__(self, classes: int | None) -> None:
        self.counts = self.sums = self.gram = self.origin = torch.empty(0)
        self._classes = classes
        self._empty = True

    def add(self, rows: Tensor, labels: Tensor) -> None:
        """Add rows [n, D] with labels [n]."""
        classes = max(check_range(labels, self._classes), len(self.counts))
        if self._empty:
            self._start(rows)
        if classes > len(self.counts):
            missing = classes - len(self.counts)
            self.counts = torch.cat([self.counts, self.counts.new_zeros(missing)])
            self.sums = torch.cat([self.sums, self.sums.new_zeros(missing, rows.shape[1])])
        rows = rows.double() - self.origin
        self.counts += torch.bincount(labels, minlength=classes)
        self.sums += sums_by_index(rows, labels, classes)
        self.gram.addmm_(rows.T, rows)

    def reduce(self) -> None:
        """Sum over all ranks, relative to the origin of rank 0."""
        classes = int(all_rows(self.counts.new_tensor([len(self.counts)])).max())
        missing = classes - len(self.counts)
        counts = torch.cat([self.counts, self.counts.new_zeros(missing)])
        sums = torch.cat([self.sums, self.sums.new_zeros(missing, self.sums.shape[1])])
        origin = all_rows(self.origin.unsqueeze(0))[0]
        move = self.origin - origin
        total = sums.sum(dim=0)
        cross = total.outer(move)
        gram = self.gram + cross + cross.T + counts.sum() * move.outer(move)
        sums = sums + counts.unsqueeze(1) * move
        self.counts, self.sums, self.gram = all_sum(counts), all_sum(sums), all_sum(gram)
        self.origin = origin

    def _start(self, rows: Tensor) -> None:
        width = rows.shape[1]
        self.origin = rows.sort(dim=0).values[len(rows) // 2].double()
        self.counts = torch.zeros(self._classes or 0, dtype=torch.long, device=rows.device)
        self.sums = self.origin.new_zeros(self._classes or 0, width)
        self.gram = self.origin.new_zeros(width, width)
        self._empty = False


def check_range(labels: Tensor, classes: int | None) -> int:
    """Number of classes that the labels need; raise if one is negative or too large."""
    low, high = int(labels.min()), int(labels.max())
    if low < 0 or (classes is not None and high >= classes):
        allowed = "0 or more" if classes is None else f"0..{classes - 1} (num_classes={classes})"
        odd = low if low < 0 else high
        raise FitError(
            f"labels must be {allowed}, got labels from {low} to {high}; if {odd} marks positions "
            f"without a label, pass DecisionTargets(ignore_index={odd}), otherwise "
            "DecisionTargets(num_classes=...) with the number of classes"
        )
    return high + 1 if classes is None else classes


def discriminants(scatter: Scatter) -> tuple[Tensor, Tensor]:
    r"""Directions [r, D] and offsets [r] in float64: ``z = x @ directions.T + offsets``.

    The SVD solution with class frequencies as priors (Hastie, Tibshirani and Friedman, "The
    Elements of Statistical Learning", section 4.3.3): whiten the covariance within classes, then
    take the principal axes of the class means. With :math:`N` rows in :math:`C` classes the
    covariance within classes of ``z``, with divisor :math:`N - C`, is the identity. Directions are
    ordered by the variance between classes, and their entry of largest magnitude is positive.

    The singular values of the rows are the roots of the eigenvalues of the scatter matrix. float64
    resolves them to about 1e-7 of the largest, far below the tolerance of 1e-4.
    """
    counts = scatter.counts.double()
    rows, classes = counts.sum(), len(counts)
    means = scatter.sums / counts.unsqueeze(1)
    center = scatter.sums.sum(dim=0) / rows
    whitening = _whitening(scatter, means, rows, classes)
    spread = (rows.sqrt() * (counts / rows).sqrt() / (classes - 1) ** 0.5).unsqueeze(1)
    _, values, axes = torch.linalg.svd(spread * (means - center) @ whitening, full_matrices=False)
    kept = values > TOLERANCE * values[:1]
    directions = axes[kept] @ whitening.T
    if not len(directions):
        raise FitError(
            "no direction separates the classes: all class means of the features are equal; check "
            "that labels and features belong together"
        )
    largest = directions.abs().argmax(dim=1, keepdim=True)
    directions = directions * directions.gather(1, largest).sign()
    return directions, -directions @ (scatter.origin + center)


def _whitening(scatter: Scatter, means: Tensor, rows: Tensor, classes: int) -> Tensor:
    """Matrix [D, r] that makes the covariance within classes the identity."""
    within = scatter.gram - scatter.sums.T @ means
    variance = within.diagonal()
    varies = variance > _CANCELLED * scatter.gram.diagonal()
    scale = torch.where(varies, variance / rows, torch.ones_like(variance)).sqrt()
    # Columns that are constant within classes have no variance to whiten; they are dropped below.
    inverse = varies / scale
    standard = within * inverse.outer(inverse) / (rows - classes)
    values, vectors = torch.linalg.eigh((standard + standard.T) / 2)
    kept = values > TOLERANCE**2
    if not bool(kept.any()):
        raise FitError(
            "the features do not vary within any class, so there is no covariance to whiten; check "
            "the teacher's point and that the data hold several images per class"
        )
    whitening: Tensor = vectors[:, kept] * inverse.unsqueeze(1) / values[kept].sqrt()
    return whitening.flip(1)
