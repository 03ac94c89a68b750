"""DIST: correlations of class probabilities, within samples and within classes."""

import torch
from torch import Tensor

from kdlayers.errors import ShapeError
from kdlayers.functional import _checks as check
from kdlayers.functional._checks import full_precision

_EPS = 1e-8


@full_precision
def dist(
    student: Tensor,
    teacher: Tensor,
    *,
    beta: float = 1.0,
    gamma: float = 1.0,
    temperature: float = 1.0,
) -> Tensor:
    r"""Distillation from a stronger teacher: one minus Pearson's correlation, in two directions.

    .. math::
        L = T^2 \Big[ \beta \big( 1 - \tfrac{1}{B} \sum_b \rho(p^S_{b\cdot}, p^T_{b\cdot}) \big)
          + \gamma \big( 1 - \tfrac{1}{K} \sum_k \rho(p^S_{\cdot k}, p^T_{\cdot k}) \big) \Big],
        \qquad p = \mathrm{softmax}(z / T)

    with Pearson's correlation :math:`\rho`: over the classes of a sample (inter-class relation),
    and over the samples of a class (intra-class relation). Both relations give 0 where the
    student's probabilities are an increasing linear function of the teacher's, so a student of
    another scale is not penalised. The gradient flows to both arguments.

    Args:
        student: logits, ``[B, K]``, any real floating-point type, ``K >= 2``.
        teacher: logits of the same shape.
        beta: weight of the inter-class relation, 0 or more. Default 1, as in the authors' code.
        gamma: weight of the intra-class relation, 0 or more. Default 1, as in the authors' code.
        temperature: above 0. Default 1, as in the authors' code.

    Returns:
        A scalar between 0 and twice ``(beta + gamma)`` times the squared temperature.

    Raises:
        ShapeError: if the tensors are not logits of one shape, or ``gamma`` is above 0 and the
            batch holds one sample, whose classes have no correlation.
        ArgumentTypeError: if an argument is not a floating-point tensor.
        ArgumentError: if a number is out of range.

    References:
        T. Huang, S. You, F. Wang, C. Qian, C. Xu, "Knowledge Distillation from A Stronger Teacher",
        NeurIPS 2022, section 4. The product of the norms gets 1e-8 added, as in the authors' code,
        so probabilities that hardly vary, as of a class that no sample resembles, count little.

    Example:
        >>> import torch
        >>> student = torch.tensor([[2.0, -1.0, 0.5], [0.0, 1.0, 0.0]])
        >>> teacher = torch.tensor([[6.0, 1.0, -2.0], [0.0, 3.0, 1.0]])
        >>> dist(student, teacher)
        tensor(0.0095)
    """
    check.logits(student, teacher)
    beta = check.not_negative("beta", beta)
    gamma = check.not_negative("gamma", gamma)
    temperature = check.positive("temperature", temperature)
    if gamma and student.shape[0] < 2:
        raise ShapeError(
            f"the intra-class relation of DIST needs a batch of 2 or more, got "
            f"{check.shape(student)}; use drop_last=True in the DataLoader, or gamma=0"
        )
    ours, theirs = (_centred(logits, temperature) for logits in (student, teacher))
    total = _weighted(beta, _correlations(ours, theirs, 1))
    if gamma:
        ours, theirs = (p - p.mean(dim=0, keepdim=True) for p in (ours, theirs))
        total = total + _weighted(gamma, _correlations(ours, theirs, 0))
    return total if temperature == 1 else temperature**2 * total


def _correlations(student: Tensor, teacher: Tensor, dim: int) -> Tensor:
    """Correlations of centred vectors along ``dim``; 0 without a gradient for zero vectors."""
    ours, theirs = (torch.linalg.vector_norm(value, dim=dim) for value in (student, teacher))
    norms = ours * theirs
    scale = norms + _EPS
    if not check.known_above(0, norms):  # left out where it does nothing, as in `cosine`
        scale = scale.masked_fill((ours == 0) | (theirs == 0), torch.inf)
    found: Tensor = (student * teacher).sum(dim=dim) / scale
    return found


def _weighted(weight: float, correlations: Tensor) -> Tensor:
    """``weight`` times one minus the mean."""
    return weight - weight * correlations.mean()


def _centred(logits: Tensor, temperature: float) -> Tensor:
    """Class probabilities minus their mean over classes, which is 1 / K."""
    if temperature != 1:
        logits = logits / temperature
    return logits.softmax(dim=1) - 1 / logits.shape[1]
