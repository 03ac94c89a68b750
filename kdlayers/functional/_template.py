"""KL divergence of template scores from the teacher's soft assignment."""

import torch
from torch import Tensor
from torch.nn import functional as F

from kdlayers.errors import ShapeError
from kdlayers.functional import _checks as check
from kdlayers.functional._checks import Reduction, full_precision


@full_precision
def template_kl(scores: Tensor, assignment: Tensor, *, reduction: Reduction = "mean") -> Tensor:
    r"""KL divergence of the student's template scores from the teacher's soft assignment.

    .. math::
        L = \frac{1}{N} \sum_{i=1}^{N} \sum_{k=1}^{K} q_{ik}
            \big[ \log q_{ik} - \log \mathrm{softmax}(a_i)_k \big], \qquad 0 \log 0 = 0

    The loss is summed over templates and averaged over images and positions. There is no
    temperature, because the scores have a learnable scale.

    Args:
        scores: the scores :math:`a` before softmax, ``[..., K]``, templates last.
        assignment: the assignment :math:`q` of the same shape: 0 or more, sums to 1 over the last
            axis (not checked). It may hold zeros, as one-hot rows do. It gets no gradient.
        reduction: over positions: ``"mean"`` (default), ``"sum"`` or ``"none"``.

    Returns:
        A scalar, or ``[...]`` with ``reduction="none"``; 0 or more.

    Raises:
        ShapeError: if the shapes differ or the tensors are empty.
        ArgumentTypeError: if an argument is not a floating-point tensor.
        ArgumentError: if ``reduction`` is unknown.

    References:
        A. Gorgun, Y. Z. Gurbuz, A. A. Alatan, "Knowledge Distillation Layer that Lets the Student
        Decide", BMVC 2023. The reduction was checked against the authors' code.

    Example:
        >>> import torch
        >>> scores, one_hot = torch.zeros(2, 4, 8), torch.eye(8).reshape(2, 4, 8)
        >>> template_kl(scores, one_hot)
        tensor(2.0794)
    """
    check.floats("scores", scores)
    check.floats("assignment", assignment)
    if scores.dim() == 0 or scores.shape != assignment.shape:
        raise ShapeError(
            "scores and assignment must have one shape [..., templates], got "
            f"{check.shape(scores)} and {check.shape(assignment)}"
        )
    check.filled("scores", scores)
    assignment = assignment.detach()
    negative_entropy = torch.xlogy(assignment, assignment).sum(dim=-1)
    cross_entropy = -(assignment * F.log_softmax(scores, dim=-1)).sum(dim=-1)
    return check.reduce(negative_entropy + cross_entropy, reduction)
