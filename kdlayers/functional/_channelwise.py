"""Channel-wise distillation: where in the image each channel is active."""

from torch import Tensor

from kdlayers.errors import ShapeError
from kdlayers.functional import _checks as check
from kdlayers.functional._checks import full_precision


@full_precision
def channelwise(student: Tensor, teacher: Tensor, *, temperature: float = 4.0) -> Tensor:
    r"""Channel-wise distillation: KL divergence of each channel's distribution over positions.

    .. math::
        L = \frac{T^2}{B C} \sum_{b,c} \mathrm{KL}\big( \phi(f^T_{bc}) \,\|\, \phi(f^S_{bc}) \big),
        \qquad \phi(f)_i = \frac{\exp(f_i / T)}{\sum_j \exp(f_j / T)}

    with :math:`i, j` over the positions. Summed over positions, averaged over samples and channels.
    The gradient flows to both arguments.

    Args:
        student: maps ``[B, C, H, W]``, any real floating-point type: features or class maps.
        teacher: maps of the same shape.
        temperature: above 0. Default 4; the authors' code has 1.

    Returns:
        A scalar, 0 or more; 0 where the distributions agree.

    Raises:
        ShapeError: if the tensors are not maps of one shape with at least two positions.
        ArgumentTypeError: if an argument is not a floating-point tensor.
        ArgumentError: if ``temperature`` is not above 0.

    References:
        C. Shu, Y. Liu, J. Gao, Z. Yan, C. Shen, "Channel-wise Knowledge Distillation for Dense
        Prediction", ICCV 2021, section 3.2.

    Example:
        >>> import torch
        >>> student = torch.tensor([2.0, 0.0, 0.0, 0.0]).reshape(1, 1, 2, 2)
        >>> teacher = torch.tensor([0.0, 8.0, 0.0, 0.0]).reshape(1, 1, 2, 2)
        >>> channelwise(student, teacher)
        tensor(9.1229)
    """
    check.floats("student", student)
    check.floats("teacher", teacher)
    if student.dim() != 4 or student.shape != teacher.shape:
        raise ShapeError(
            "student and teacher must be maps of one shape [batch, channels, height, width], got "
            f"{check.shape(student)} and {check.shape(teacher)}"
        )
    if student.shape[2] * student.shape[3] < 2 or not student.numel():
        raise ShapeError(
            "maps must have a sample, a channel and at least 2 positions to compare, got "
            f"{check.shape(student)}"
        )
    temperature = check.positive("temperature", temperature)
    ours, theirs = ((maps.flatten(2) / temperature).log_softmax(2) for maps in (student, teacher))
    factor = temperature**2 / (student.shape[0] * student.shape[1])
    return (theirs.exp() * (theirs - ours)).sum() * factor
