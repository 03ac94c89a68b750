"""Inheritance and exploration: how close, or how far, two factors are."""

from math import sqrt
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from kdlayers._utils.norms import EPS, inverse, inverse_norm
from kdlayers.errors import ArgumentError, ShapeError
from kdlayers.functional import _checks as check
from kdlayers.functional._checks import Reduction, full_precision
from kdlayers.functional._gram import gram

Measure: TypeAlias = Literal["norm", "cosine", "cka"]
Scale: TypeAlias = Literal["mean", "sqrt_dim"]


def inheritance(
    student: Tensor,
    teacher: Tensor,
    *,
    p: int = 1,
    measure: Measure = "norm",
    scale: Scale = "mean",
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Distance of the student's factor from the teacher's: small when knowledge is inherited.

    With the unit vector of each sample over all its D entries, :math:`u(F_b) = \mathrm{vec}(F_b) /
    \max(\|\mathrm{vec}(F_b)\|_2, 10^{-12})`:

    .. math::
        d_p = \Big( \frac{1}{B D} \sum_{b,j} \big| u(F^S_b)_j - u(F^T_b)_j \big|^p \Big)^{1/p}

    The mean runs over batch **and** elements, and the root is taken once for the batch, so
    :math:`d_p \le 2 / \sqrt{D}`; weights near 50 are meant for this scale. A zero factor stays zero
    and gets no gradient. ``"cosine"`` gives :math:`1 - \cos`. ``"cka"`` gives 1 minus linear CKA,
    for factors :math:`X, Y \in \mathbb{R}^{B \times D}` with columns centred over the batch:

    .. math:: \mathrm{CKA} = \frac{\langle K, L \rangle}{\|K\|_F \|L\|_F}, \qquad
        K = X X^\top, \; L = Y Y^\top

    CKA is uninformative in small batches: independent factors of 2048 entries reach 0.97 at 64
    samples.

    Args:
        student: factor, ``[B, ...]``, D entries for each sample.
        teacher: factor of the same shape.
        p: 1 (default, as published) or 2; for ``measure="norm"`` only. With 2, 1e-12 is added under
            the root, so that equal factors have a gradient of 0 instead of NaN.
        measure: ``"norm"`` (default), ``"cosine"`` or ``"cka"``.
        scale: ``"mean"`` (default, as published) or ``"sqrt_dim"`` (our extension): times
            :math:`\sqrt D`, which lies in [0, 2] for every size. For ``measure="norm"`` only.
        reduction: over samples: ``"mean"`` (default), or with ``p=1`` and ``"cosine"`` also
            ``"sum"`` or ``"none"``.

    Returns:
        A scalar, or ``[B]`` with ``reduction="none"``; 0 or more.

    Raises:
        ShapeError: if the shapes differ, or for ``"cka"`` with fewer than 3 samples: of two, CKA
            is always 1.
        ArgumentTypeError: if an argument is not a floating-point tensor.
        ArgumentError: if an option is unknown or has no meaning together with another.

    References:
        Z. Huang et al., "Revisiting Knowledge Distillation: An Inheritance and Exploration
        Framework", CVPR 2021. Norm and cosine were checked against the authors' code. That code
        uses CKA with one sign for both purposes. Here it is a similarity, which inheritance raises
        and exploration lowers.

    Example:
        >>> import torch
        >>> inheritance(torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 0.0]]))
        tensor(0.6000)
    """
    _check(student, teacher, p, measure, scale, reduction)
    if measure == "norm":
        return _norm_distance(student, teacher, p, scale, reduction)
    if measure == "cosine":
        return check.reduce(1 - _cosine(student, teacher), reduction)
    return 1 - _linear_cka(student, teacher)


def exploration(
    student: Tensor,
    teacher: Tensor,
    *,
    p: int = 1,
    measure: Measure = "norm",
    scale: Scale = "mean",
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Similarity of the student's factor to the teacher's: small when something new is explored.

    .. math:: L = -d_p \quad \text{(norm)}, \qquad \frac1B \sum_b |\cos_b| \quad \text{(cosine)},
        \qquad \mathrm{CKA} \quad \text{(cka)}

    with the quantities of :func:`inheritance`. The optima differ: the negated norm prefers opposite
    factors and is at least :math:`-2 / \sqrt D`; the other two prefer unrelated factors. Arguments,
    errors and references are those of :func:`inheritance`.

    Returns:
        A scalar, or ``[B]`` with ``reduction="none"``; 0 or less for the norm, else 0 or more.

    Example:
        >>> import torch
        >>> exploration(torch.tensor([[3.0, 4.0]]), torch.tensor([[1.0, 0.0]]))
        tensor(-0.6000)
    """
    _check(student, teacher, p, measure, scale, reduction)
    if measure == "norm":
        return -_norm_distance(student, teacher, p, scale, reduction)
    if measure == "cosine":
        return check.reduce(_cosine(student, teacher).abs(), reduction)
    return _linear_cka(student, teacher)


@full_precision
def _norm_distance(
    student: Tensor, teacher: Tensor, p: int, scale: Scale, reduction: Reduction
) -> Tensor:
    difference = _unit(student) - _unit(teacher)
    factor = sqrt(difference.shape[1]) if scale == "sqrt_dim" else 1.0
    if p == 1:
        return factor * check.reduce(difference.abs().mean(dim=1), reduction)
    return factor * (difference.square().mean() + EPS).sqrt()


@full_precision
def _cosine(student: Tensor, teacher: Tensor) -> Tensor:
    return (_unit(student) * _unit(teacher)).sum(dim=1)


@full_precision
def _linear_cka(student: Tensor, teacher: Tensor) -> Tensor:
    return (_centred_gram(student) * _centred_gram(teacher)).sum()


def _centred_gram(factor: Tensor) -> Tensor:
    flat = factor.flatten(1)
    centred = flat - flat.mean(dim=0)
    products = gram(centred)
    return products * inverse(torch.linalg.vector_norm(products))


def _unit(factor: Tensor) -> Tensor:
    rows = factor.flatten(1)
    return rows * inverse_norm(rows)


def check_measure(p: int, measure: Measure, scale: Scale) -> None:
    """Raise if the options of a distance are unknown or contradict each other."""
    check.one_of("measure", measure, get_args(Measure))
    check.one_of("scale", scale, get_args(Scale))
    if p not in (1, 2):
        raise ArgumentError(f"p must be 1 or 2, got {p!r}")
    if measure != "norm" and (p != 1 or scale != "mean"):
        raise ArgumentError(
            f'p and scale apply to measure="norm" only; leave them out with measure={measure!r}, '
            "which has no exponent and does not depend on the size"
        )


def _check(
    student: Tensor, teacher: Tensor, p: int, measure: Measure, scale: Scale, reduction: Reduction
) -> None:
    check.floats("student", student)
    check.floats("teacher", teacher)
    if student.dim() < 2 or student.shape != teacher.shape:
        raise ShapeError(
            "student and teacher must be factors of one shape [batch, ...], got "
            f"{check.shape(student)} and {check.shape(teacher)}"
        )
    check.filled("factors", student)
    check_measure(p, measure, scale)
    if measure == "cka" and len(student) < 3:
        raise ShapeError(
            f'measure="cka" compares samples: it needs a batch of 3 or more, got {len(student)} '
            "(of 2 samples, CKA is always 1); use drop_last=True in the DataLoader"
        )
    if reduction != "mean" and (p == 2 or measure == "cka"):
        raise ArgumentError(
            f'reduction={reduction!r} is not possible with p=2 or measure="cka", which give one '
            'value for the whole batch; use reduction="mean"'
        )
