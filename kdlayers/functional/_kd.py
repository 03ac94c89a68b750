"""Knowledge distillation by softened logits."""

from math import isfinite

from torch import Tensor

from kdlayers.functional import _checks as check
from kdlayers.functional._checks import Reduction, full_precision
from kdlayers.functional._standardize import standardized


@full_precision
def kd(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float = 4.0,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Knowledge distillation: KL divergence of the softened class distributions.

    .. math::
        L = T^2 \, \frac{1}{B} \sum_b \mathrm{KL}\big(
            \mathrm{softmax}(z^T_b / T) \,\|\, \mathrm{softmax}(z^S_b / T) \big)

    The sum over classes is averaged over samples (and pixels). The factor T^2 makes the size of the
    gradient independent of the temperature. The value is computed in log space, in float32 or
    better. Both arguments get a gradient: compute the teacher's logits under ``torch.no_grad()``. A
    logit of -inf is a class of probability 0.

    Args:
        student: logits, ``[B, K]``, or class maps, ``[B, K, H, W]``, of any real floating-point
            type, with ``K >= 2``.
        teacher: logits of the same shape.
        temperature: above 0. Default 4, usual for CIFAR-100; 1 is usual for ImageNet.
        reduction: ``"mean"`` over samples and pixels (default), ``"sum"``, or ``"none"`` for one
            value per sample or pixel.

    Returns:
        A scalar; with ``reduction="none"`` ``[B]``, or ``[B, H, W]`` for maps. 0 or more, and 0
        where the distributions are equal.

    Raises:
        ShapeError: if the tensors are not logits, or class maps, of one shape.
        ArgumentTypeError: if a tensor is not floating-point, or ``temperature`` not a number.
        ArgumentError: if ``temperature`` is not above 0, or ``reduction`` is unknown.

    References:
        G. Hinton, O. Vinyals, J. Dean, "Distilling the Knowledge in a Neural Network", 2015,
        section 2; the factor T^2 is discussed at the end of that section.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[2.0, -1.0, 0.5]]), torch.tensor([[6.0, 1.0, -2.0]])
        >>> kd(student, teacher, temperature=4.0)
        tensor(2.6012)
    """
    check.scores(student, teacher)
    temperature = check.positive("temperature", temperature)
    if temperature != 1:
        student, teacher = student / temperature, teacher / temperature
    ours, theirs = student.log_softmax(dim=1), teacher.log_softmax(dim=1)
    return divergence(ours, theirs, reduction, temperature**2)


@full_precision
def standardized_kd(
    student: Tensor, teacher: Tensor, temperature: float, reduction: Reduction
) -> Tensor:
    """:func:`kd` of standardised logits; see :func:`kdlayers.functional.standardize`."""
    check.scores(student, teacher)
    ours, theirs = standardized(student, temperature), standardized(teacher, temperature)
    return divergence(ours.log_softmax(dim=1), theirs.log_softmax(dim=1), reduction, temperature**2)


def divergence(student: Tensor, teacher: Tensor, reduction: Reduction, factor: float) -> Tensor:
    """``factor`` times KL(teacher || student) of log-probabilities ``[B, n, ...]``, reduced."""
    shares, difference = teacher.exp(), teacher - student
    readable = check.readable(difference)
    if not readable:
        difference = _without_infinity(shares, difference)
    axes = None if reduction == "mean" else 1  # None: all
    values = (shares * difference).sum(dim=axes)
    if readable:
        # The mask is a quarter of the loss's time, so it is left out where the result is finite.
        total = values.detach().sum() if values.dim() else values
        if not isfinite(total.item()):
            values = (shares * _without_infinity(shares, difference)).sum(dim=axes)
    if reduction == "mean":  # one sum over everything, then one product
        return values * (factor * student.shape[1] / student.numel())
    return check.reduce(values * factor, reduction)


def _without_infinity(shares: Tensor, difference: Tensor) -> Tensor:
    """A share of 0, as of a masked class with the logit -inf, adds 0 rather than 0 * inf."""
    return difference.masked_fill(shares == 0, 0.0)
