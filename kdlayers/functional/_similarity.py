"""Similarity-preserving distillation: inner products of the samples of a batch."""

import torch
from torch import Tensor

from kdlayers.functional._checks import full_precision
from kdlayers.functional._features import feature_distance
from kdlayers.functional._gram import gram
from kdlayers.functional._relations import samples


@full_precision
def similarity_preserving(student: Tensor, teacher: Tensor) -> Tensor:
    r"""Similarity-preserving distillation: which samples of a batch are similar to each other.

    .. math::
        L = \frac{1}{B^2} \big\| \tilde G^S - \tilde G^T \big\|_F^2, \qquad
        G = Q Q^\top, \quad \tilde G_{i\cdot} = \frac{G_{i\cdot}}{\| G_{i\cdot} \|_2}

    where row :math:`i` of :math:`Q` holds all features of sample :math:`i`. Student and teacher may
    have different widths. The gradient flows to both arguments.

    Args:
        student: features ``[B, ...]`` of 2 samples or more, any real floating-point type;
            all axes but the first form one vector per sample.
        teacher: features ``[B, ...]`` of the same samples.

    Returns:
        A scalar between 0 and 4 / B.

    Raises:
        ShapeError: if the tensors are not features of the same samples, or of one sample only.
        ArgumentTypeError: if an argument is not a floating-point tensor.

    References:
        F. Tung, G. Mori, "Similarity-Preserving Knowledge Distillation", ICCV 2019, section
        3.

    Example:
        >>> import torch
        >>> student = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> teacher = torch.tensor([[1.0, 0.0, 1.0], [1.0, 0.0, 1.0]])
        >>> similarity_preserving(student, teacher)
        tensor(0.2929)
    """
    student, teacher = samples(student, teacher, least=2)
    # There are B² differences, so their mean is the sum divided by B².
    return feature_distance(_similarities(student), _similarities(teacher), "mse")


def _similarities(features: Tensor) -> Tensor:
    """``[B, B]``: inner products of the samples, each row of unit length; zeros stay zeros."""
    products = gram(features)
    norms = torch.linalg.vector_norm(products, dim=1, keepdim=True)
    scaled: Tensor = products / norms.clamp_min(1e-12).masked_fill(norms == 0, torch.inf)
    return scaled
