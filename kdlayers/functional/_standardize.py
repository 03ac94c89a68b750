"""Logit standardisation: every sample's logits get mean 0 and standard deviation 1."""

import torch
from torch import Tensor

from kdlayers._utils.warn import warn
from kdlayers.errors import ShapeError
from kdlayers.functional import _checks as check
from kdlayers.functional._checks import full_precision

_EPS = 1e-7


@full_precision
def standardize(logits: Tensor) -> Tensor:
    r"""Standardise the logits of each sample over the classes.

    .. math:: \tilde z_{bk} = \frac{z_{bk} - \bar z_b}{\sigma_b + 10^{-7}}, \qquad
        \sigma_b^2 = \frac{1}{K - 1} \sum_k (z_{bk} - \bar z_b)^2

    A loss on standardised logits compares how the logits relate to each other, not how large they
    are, so a small student need not reach the teacher's range. Apply it to student and teacher
    before the temperature.

    Args:
        logits: ``[B, K]``, or class maps ``[B, K, H, W]``, of any real floating-point type, with
            ``K >= 2``.

    Returns:
        A tensor of the same shape, in float32 or better. Logits that are all equal become 0, and
        get no gradient. A logit of -inf has no mean: the whole sample becomes NaN. With two classes
        the result is always plus and minus :math:`1 / \sqrt 2`, without a gradient.

    Raises:
        ShapeError: if ``logits`` are not ``[B, K]`` or ``[B, K, H, W]`` with at least two classes.
        ArgumentTypeError: if ``logits`` is not a floating-point tensor.

    References:
        S. Sun, W. Ren, J. Li, R. Wang, X. Cao, "Logit Standardization in Knowledge Distillation",
        CVPR 2024, algorithm 1. The deviation divides by K - 1 and the constant is 1e-7, as in the
        authors' code.

    Example:
        >>> import torch
        >>> standardize(torch.tensor([[6.0, 2.0, -2.0]]))
        tensor([[ 1.,  0., -1.]])
    """
    check.floats("logits", logits)
    if logits.dim() not in (2, 4) or logits.shape[1] < 2 or not logits.numel():
        raise ShapeError(
            "logits must be [batch, classes] or [batch, classes, height, width] with at least 2 "
            f"classes, got {check.shape(logits)}"
        )
    return standardized(logits, 1.0)


def warn_of_signs(logits: Tensor) -> None:
    """Warn of two classes, whose standardised logits are plus and minus a constant."""
    if logits.shape[1] == 2:
        warn(
            "with 2 classes standardised logits only tell which class is larger, so the gradient "
            "of a loss on them is always 0; leave out standardize=True"
        )


def standardized(logits: Tensor, temperature: float) -> Tensor:
    """Standardised logits, of float32 or wider, over the temperature: one division for both."""
    deviation, mean = torch.std_mean(logits, dim=1, keepdim=True)
    scale = deviation + _EPS
    if temperature != 1:
        scale = scale * temperature
    without_gradient = check.readable(deviation) and not logits.requires_grad
    if not (without_gradient or check.known_above(0, deviation)):
        # Over infinity equal logits get no gradient; over the constant they would get a huge one.
        scale = scale.masked_fill(deviation == 0, torch.inf)
    return (logits - mean) / scale
