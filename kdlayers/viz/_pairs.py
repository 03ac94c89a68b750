"""Tables over classes, and the strongest pairs in them."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kdlayers._targets import DecisionTargets
from kdlayers.errors import ArgumentError, NotFittedError, ShapeError
from kdlayers.functional import _checks as check


@dataclass(frozen=True)
class Pair:
    """One entry off the diagonal of a table over classes."""

    row: int
    column: int
    value: float
    names: tuple[str, str]
    """Names of the row's and the column's class; the indices if no names were given."""


def strongest_pairs(
    table: Tensor, class_names: Sequence[str] | None = None, *, top: int = 10
) -> list[Pair]:
    r"""The entries of greatest magnitude off the diagonal.

    In :meth:`AEKTLoss.relations <kdlayers.AEKTLoss.relations>` entry (i, j) is the weight of the
    student's logit of class j in the logit of class i that is compared with the teacher's. In
    :func:`class_decisions` it is how often the teacher takes class i for class j.

    Args:
        table: ``[C, C]``.
        class_names: C names; default: the indices.
        top: largest number of pairs. Default 10. Entries that are 0 are left out.

    Returns:
        Pairs in decreasing order of magnitude; ties by row, then column.

    Raises:
        ShapeError: if ``table`` is not square.
        ArgumentError: if the number of names is not C, ``top`` is below 1, or an entry is not
            finite.
        ArgumentTypeError: if ``top`` is not an int.

    Example:
        >>> import torch
        >>> from kdlayers.viz import strongest_pairs
        >>> table = torch.tensor([[1.0, 0.25, 0.0], [-0.5, 1.0, 0.0], [0.0, 0.0, 1.0]])
        >>> for pair in strongest_pairs(table, ["cat", "dog", "car"]):
        ...     print(*pair.names, pair.value)
        dog cat -0.5
        cat dog 0.25
    """
    check.count("top", top)
    table = check_square(table).detach().cpu()
    names = names_of(class_names, len(table))
    if not table.isfinite().all():
        raise ArgumentError("the table has NaN or infinite entries: did training diverge?")
    strength = table.abs().clone().fill_diagonal_(0).flatten()
    order = strength.argsort(descending=True, stable=True)[:top]
    places = [divmod(int(place), len(table)) for place in order if strength[place] > 0]
    return [Pair(i, j, float(table[i, j]), (names[i], names[j])) for i, j in places]


def class_decisions(targets: DecisionTargets) -> Tensor:
    r"""How often the teacher takes positions of one class for each class.

    The decisions are summed over the sub-classes of the chosen class, and averaged over the
    sub-classes of the positions' own class, weighted by their numbers of positions n:

    .. math:: D_{cc'} = \frac{\sum_{s \in c} n_s \sum_{s' \in c'} P_{ss'}}{\sum_{s \in c} n_s}

    Args:
        targets: the targets of a point, after ``kd.fit``.

    Returns:
        ``[C, C]``, rows summing to 1; zeros for a class without positions.

    Raises:
        NotFittedError: before ``fit``.

    Example:
        >>> import torch
        >>> from kdlayers import DecisionTargets, viz
        >>> features = torch.tensor([[0.0, 0.0], [1.0, 1.0], [4.0, 0.0], [5.0, 1.0]])
        >>> labels = torch.tensor([0, 0, 1, 1])
        >>> targets = DecisionTargets(subclasses=1, components=1).fit([(features, labels)])
        >>> viz.class_decisions(targets)
        tensor([[1., 0.],
                [0., 1.]])
    """
    decisions, counts = fitted_tables(targets)
    classes, subclasses = counts.shape
    decided = decisions.view(classes, subclasses, classes, subclasses).sum(-1)
    total = counts.sum(1, keepdim=True).clamp_min(1)
    return torch.einsum("cs,csd->cd", counts.to(decided.dtype) / total, decided)


def fitted_tables(targets: DecisionTargets) -> tuple[Tensor, Tensor]:
    """P ``[K, K]`` and the numbers of positions ``[C, S]``."""
    if targets.decisions is None or targets.counts is None:
        raise NotFittedError("these DecisionTargets are not fitted yet; call kd.fit(loader) first")
    return targets.decisions, targets.counts


def check_square(table: Tensor) -> Tensor:
    """``table`` if it is ``[C, C]``."""
    if table.dim() != 2 or table.shape[0] != table.shape[1]:
        raise ShapeError(
            f"a table over classes must be [C, C], got {tuple(table.shape)}; use AEKTLoss.relations"
            "() or class_decisions(targets)"
        )
    return table


def names_of(class_names: Sequence[str] | None, count: int) -> list[str]:
    """The names as strings; the indices if there are none."""
    if class_names is None:
        return [str(index) for index in range(count)]
    if len(class_names) != count:
        raise ArgumentError(f"there are {count} classes, but {len(class_names)} class_names")
    return [str(name) for name in class_names]
