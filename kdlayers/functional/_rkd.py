"""Relational distillation: distances and angles between the samples of a batch."""

import torch
from torch import Tensor
from torch.nn import functional as F

from kdlayers._utils.norms import inverse
from kdlayers.functional._checks import full_precision
from kdlayers.functional._relations import samples


@full_precision
def rkd_distance(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Distance-wise relational distillation: the distances of every two samples of a batch.

    .. math::
        L = \frac{1}{B^2} \sum_{i,j} h\Big( \frac{d^S_{ij}}{\mu^S} - \frac{d^T_{ij}}{\mu^T} \Big),
        \qquad d_{ij} = \| f_i - f_j \|_2, \quad
        \mu = \frac{1}{B (B - 1)} \sum_{i \ne j} d_{ij}

    with Huber's function :math:`h(x) = x^2 / 2` up to 1 and :math:`|x| - 1/2` above. The mean is
    over all :math:`B^2` pairs, as in the authors' code. Student and teacher may have different
    widths. The gradient flows to both arguments.

    Args:
        student: features ``[B, ...]`` of 3 samples or more, any real floating-point type;
            all axes but the first form one vector per sample.
        teacher: features ``[B, ...]`` of the same samples.

    Returns:
        A scalar, 0 or more.

    Raises:
        ShapeError: if the tensors are not features of the same samples, or of fewer than 3: one
            distance divided by its mean is always 1.
        ArgumentTypeError: if an argument is not a floating-point tensor.

    References:
        W. Park, D. Kim, Y. Lu, M. Cho, "Relational Knowledge Distillation", CVPR 2019, section
        3.2.1.

    Example:
        >>> import torch
        >>> student = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
        >>> teacher = torch.tensor([[0.0, 0.0, 1.0], [3.0, 0.0, 1.0], [0.0, 3.0, 1.0]])
        >>> rkd_distance(student, teacher)
        tensor(0.0185)
    """
    ours, theirs = (_distances(f) for f in samples(student, teacher, least=3))
    return _huber(_over_mean(ours), _over_mean(theirs))


@full_precision
def rkd_angle(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Angle-wise relational distillation: the angles of every three samples of a batch.

    .. math::
        L = \frac{1}{B^3} \sum_{i,j,k} h\big( \cos \angle f^S_i f^S_j f^S_k
            - \cos \angle f^T_i f^T_j f^T_k \big), \qquad
        \cos \angle f_i f_j f_k = \Big\langle \frac{f_i - f_j}{\|f_i - f_j\|},
            \frac{f_k - f_j}{\|f_k - f_j\|} \Big\rangle

    with Huber's function :math:`h` as in :func:`rkd_distance`, and the mean over all :math:`B^3`
    triples, as in the authors' code. The cosines come from the distances, by the law of cosines,
    so nothing of the size :math:`B^2 D` is made. Student and teacher may have different widths. The
    gradient flows to both arguments.

    Args:
        student: features ``[B, ...]`` of 3 samples or more, as in :func:`rkd_distance`.
        teacher: features ``[B, ...]`` of the same samples.

    Returns:
        A scalar, 0 or more. Two samples at one place have no direction: their cosines are 0.

    Raises:
        ShapeError: if the tensors are not features of the same samples, or of fewer than 3.
        ArgumentTypeError: if an argument is not a floating-point tensor.

    References:
        W. Park, D. Kim, Y. Lu, M. Cho, "Relational Knowledge Distillation", CVPR 2019, section
        3.2.2.

    Example:
        >>> import torch
        >>> student = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
        >>> teacher = torch.tensor([[0.0, 0.0, 1.0], [3.0, 0.0, 1.0], [0.0, 3.0, 1.0]])
        >>> rkd_angle(student, teacher)
        tensor(0.0038)
    """
    ours, theirs = (_distances(f) for f in samples(student, teacher, least=3))
    return _huber(_cosines(ours), _cosines(theirs))


@full_precision
def rkd(student: Tensor, teacher: Tensor, distance: float, angle: float) -> Tensor:
    """The weighted sum of both terms, from one matrix of distances."""
    ours, theirs = (_distances(f) for f in samples(student, teacher, least=3))
    total = ours.new_zeros(())
    if distance:
        total = total + distance * _huber(_over_mean(ours), _over_mean(theirs))
    if angle:
        total = total + angle * _huber(_cosines(ours), _cosines(theirs))
    return total


def _distances(features: Tensor) -> Tensor:
    """``[B, B]``, from differences: a difference of squared norms would lose digits."""
    return torch.cdist(features, features, compute_mode="donot_use_mm_for_euclid_dist")


def _over_mean(distances: Tensor) -> Tensor:
    """Distances over their off-diagonal mean; if all are 0, zeros without a gradient."""
    count = len(distances)
    return distances * (inverse(distances.sum()) * (count * (count - 1)))


def _cosines(distances: Tensor) -> Tensor:
    """``[B, B, B]``: at index (j, i, k) the cosine at sample j between samples i and k."""
    halves, inverses = 0.5 * distances.square(), inverse(distances)
    products = halves[:, :, None] + halves[:, None, :] - halves
    return products * inverses[:, :, None] * inverses[:, None, :]


def _huber(student: Tensor, teacher: Tensor) -> Tensor:
    """The mean of Huber's function of the difference."""
    return F.smooth_l1_loss(student, teacher.to(student.dtype))
