"""Knowledge distillation of independent classes, each with its own sigmoid."""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from kdlayers.errors import ShapeError
from kdlayers.functional import _checks as check
from kdlayers.functional._checks import Reduction, full_precision
from kdlayers.functional._kd import divergence


@full_precision
def binary_kd(
    student: Tensor,
    teacher: Tensor,
    *,
    temperature: float = 1.0,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Knowledge distillation of independent classes: KL divergence of "this class or not".

    .. math::
        L = T^2 \, \frac{1}{B K} \sum_{b, k} \mathrm{KL}\big( (p^T_{bk}, 1 - p^T_{bk}) \,\|\,
            (p^S_{bk}, 1 - p^S_{bk}) \big), \quad p_{bk} = \sigma(z_{bk} / T)

    For models that are trained with binary cross-entropy: with several labels for each image, or
    with one logit. Their probabilities do not sum to 1, so a softmax over the classes, as in
    :func:`kd`, would compare something else. The value is computed in log space, in float32 or
    better. Both arguments get a gradient: compute the teacher's logits under ``torch.no_grad()``.
    A logit of -inf or inf is a probability of 0 or 1.

    Args:
        student: logits, ``[B, K]``, or class maps, ``[B, K, H, W]``, of any real floating-point
            type, with ``K >= 1``.
        teacher: logits of the same shape.
        temperature: above 0. Default 1.
        reduction: ``"mean"`` over samples, classes and pixels (default), ``"sum"``, or ``"none"``
            for one value per logit.

    Returns:
        A scalar; with ``reduction="none"`` the shape of ``student``. 0 or more up to rounding, and
        0 where the probabilities are equal.

    Raises:
        ShapeError: if the tensors are not logits, or class maps, of one shape.
        ArgumentTypeError: if a tensor is not floating-point, or ``temperature`` not a number.
        ArgumentError: if ``temperature`` is not above 0, or ``reduction`` is unknown.

    References:
        P. Yang et al., "Multi-Label Knowledge Distillation", ICCV 2023, multi-label logits
        distillation. The mean over classes, as in
        :func:`torch.nn.functional.binary_cross_entropy_with_logits`, and the temperature are ours.

    Example:
        >>> import torch
        >>> binary_kd(torch.tensor([[2.0, -1.0, 0.5]]), torch.tensor([[6.0, 1.0, -2.0]]))
        tensor(0.3753)
    """
    independent(student, teacher)
    temperature = check.positive("temperature", temperature)
    ours, theirs = (_log_shares(logits / temperature) for logits in (student, teacher))
    return divergence(ours, theirs, reduction, temperature**2)


def _log_shares(logits: Tensor) -> Tensor:
    """Log-probabilities of each class and of its absence, ``[B, 2, K, ...]``."""
    return torch.stack([logsigmoid(logits), logsigmoid(-logits)], dim=1)


def independent(student: Tensor, teacher: Tensor, *, sized: bool = True) -> None:
    """Raise unless both are logits or class maps of one shape; unless ``sized``, of any size."""
    check.floats("student", student)
    check.floats("teacher", teacher)
    axes = None if sized or student.dim() == 2 else 2
    same = student.dim() == teacher.dim() and student.shape[:axes] == teacher.shape[:axes]
    if student.dim() not in (2, 4) or not same:
        raise ShapeError(
            "student and teacher must be logits [batch, classes] or class maps [batch, classes, "
            f"height, width] of one shape, got {check.shape(student)} and {check.shape(teacher)}"
        )
    check.filled("logits", student)
    check.filled("logits", teacher)
