"""Decoupled knowledge distillation: target-class and non-target-class terms."""

from torch import Tensor

from kdlayers._utils.warn import warn
from kdlayers.functional import _checks as check
from kdlayers.functional._checks import Reduction, full_precision
from kdlayers.functional._decoupled import decouple
from kdlayers.functional._kd import divergence
from kdlayers.functional._mixed import is_mixed, mean_over_classes


@full_precision
def tckd(
    student: Tensor,
    teacher: Tensor,
    targets: Tensor,
    *,
    temperature: float = 4.0,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Target-class distillation: KL divergence of the binary distributions target / not target.

    .. math::
        L = T^2 \, \frac{1}{B} \sum_b \Big[ a \log\frac{a}{s} + (1-a)\log\frac{1-a}{1-s} \Big]

    where :math:`a = \mathrm{softmax}(z^T/T)_y` and :math:`s = \mathrm{softmax}(z^S/T)_y` are the
    teacher's and the student's probability of the labelled class. :math:`\log(1-s)` is computed as
    a difference of log-sums, so saturated logits stay finite.

    Args:
        student: logits, ``[B, K]``, ``K >= 2``.
        teacher: logits of the same shape.
        targets: class indices, ``[B]``, of any integer type. The label counts, not the teacher's
            prediction. Its range is checked on the CPU only, where that needs no synchronisation.
            Or probabilities ``[B, K]`` (mixup, CutMix, label smoothing): the value of a sample is
            then the mean of the values for each class that holds weight, weighted by the labels.
            One-hot rows give exactly the value for class indices. The uniform part that label
            smoothing adds is left out where more than half of the classes have no other weight.
            Finding the classes waits for the device once.
        temperature: above 0. Default 4.
        reduction: over samples: ``"mean"`` (default), ``"sum"`` or ``"none"``.

    Returns:
        A scalar, or ``[B]`` with ``reduction="none"``; 0 or more.

    Raises:
        ShapeError: if the tensors are not logits of one shape with one label per sample.
        ArgumentTypeError: if the labels are not a tensor of numbers.
        ArgumentError: if a label is out of range, or ``temperature`` or ``reduction`` is unusable.

    References:
        B. Zhao, Q. Cui, R. Song, Y. Qiu, J. Liang, "Decoupled Knowledge Distillation", CVPR 2022,
        equation 5.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[2.0, -1.0, 0.5]]), torch.tensor([[6.0, 1.0, -2.0]])
        >>> tckd(student, teacher, torch.tensor([0]))
        tensor(1.8876)
    """
    if is_mixed(targets):
        check.logits(student, teacher)
        return mean_over_classes(
            lambda labels, by: tckd(
                student, teacher, labels, temperature=temperature, reduction=by
            ),
            targets,
            student.shape[1],
            reduction,
        )
    targets = _checked(student, teacher, targets, temperature)
    ours, theirs = decouple(student, teacher, targets, temperature)
    return divergence(ours.binary(), theirs.binary(), reduction, temperature**2)


@full_precision
def nckd(
    student: Tensor,
    teacher: Tensor,
    targets: Tensor,
    *,
    temperature: float = 4.0,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Non-target-class distillation: KL divergence among the classes that are not the label.

    .. math::
        L = T^2 \, \frac{1}{B} \sum_b \sum_{i \ne y} \hat p^T_i
            \log\frac{\hat p^T_i}{\hat p^S_i},
        \qquad \hat p_i = \frac{e^{z_i/T}}{\sum_{j \ne y} e^{z_j/T}}

    Its gradient with respect to the logit of the label is exactly 0. Arguments, result and errors
    are those of :func:`tckd`.

    Warns:
        KDLayersWarning: with two classes. Only one other class is left, so the term is always 0.

    References:
        B. Zhao, Q. Cui, R. Song, Y. Qiu, J. Liang, "Decoupled Knowledge Distillation", CVPR 2022,
        equation 6.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[2.0, -1.0, 0.5]]), torch.tensor([[6.0, 1.0, -2.0]])
        >>> nckd(student, teacher, torch.tensor([0]))
        tensor(2.4053)
    """
    if is_mixed(targets):
        check.logits(student, teacher)
        return mean_over_classes(
            lambda labels, by: nckd(
                student, teacher, labels, temperature=temperature, reduction=by
            ),
            targets,
            student.shape[1],
            reduction,
        )
    targets = _checked(student, teacher, targets, temperature)
    warn_of_two_classes(student)
    ours, theirs = decouple(student, teacher, targets, temperature)
    return divergence(ours.others(), theirs.others(), reduction, temperature**2)


@full_precision
def dkd(
    student: Tensor,
    teacher: Tensor,
    targets: Tensor,
    *,
    alpha: float = 1.0,
    beta: float = 8.0,
    temperature: float = 4.0,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""Decoupled knowledge distillation: the two parts of KD with separate weights.

    .. math:: L = \alpha \, L_\mathrm{TCKD} + \beta \, L_\mathrm{NCKD}

    with :func:`tckd` and :func:`nckd`, both multiplied by the squared temperature. Plain KD is
    :math:`\mathrm{TCKD} + (1-a)\,\mathrm{NCKD}` with the teacher's confidence :math:`a`, which
    suppresses the second term where the teacher is sure. Here ``beta`` replaces :math:`1-a`.

    Args:
        student: logits, ``[B, K]``.
        teacher: logits of the same shape.
        targets: class indices ``[B]`` or probabilities ``[B, K]``, as in :func:`tckd`.
        alpha: weight of the target-class term, 0 or more. Default 1, as in the authors' code.
        beta: weight of the non-target-class term, 0 or more. Default 8, the authors' value for
            ResNet-32x4 to ResNet-8x4 on CIFAR-100. They use 2 to 8 on CIFAR-100 and 0.5 to 2 on
            ImageNet; start lower on other data.
        temperature: above 0. Default 4, the authors' value on CIFAR-100; they use 1 on ImageNet.
        reduction: over samples: ``"mean"`` (default), ``"sum"`` or ``"none"``.

    Returns:
        A scalar, or ``[B]`` with ``reduction="none"``; 0 or more.

    Raises:
        ShapeError: if the tensors are not logits of one shape with one label per sample.
        ArgumentTypeError: if the labels are not a tensor of numbers.
        ArgumentError: if a label is out of range or negative, or a number is unusable.

    Warns:
        KDLayersWarning: with two classes, where the non-target term is always 0.

    References:
        B. Zhao, Q. Cui, R. Song, Y. Qiu, J. Liang, "Decoupled Knowledge Distillation", CVPR 2022,
        equation 7. Values agree with the authors' code. That code gives infinities for saturated
        logits; here they stay finite.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[2.0, -1.0, 0.5]]), torch.tensor([[6.0, 1.0, -2.0]])
        >>> dkd(student, teacher, torch.tensor([0]), beta=1.0)
        tensor(4.2928)
    """
    if is_mixed(targets):
        check.logits(student, teacher)
        numbers = {"alpha": alpha, "beta": beta, "temperature": temperature}
        return mean_over_classes(
            lambda labels, by: dkd(student, teacher, labels, **numbers, reduction=by),
            targets,
            student.shape[1],
            reduction,
        )
    alpha = check.not_negative("alpha", alpha)
    beta = check.not_negative("beta", beta)
    targets = _checked(student, teacher, targets, temperature)
    ours, theirs = decouple(student, teacher, targets, temperature)
    square = temperature**2
    target = divergence(ours.binary(), theirs.binary(), reduction, alpha * square)
    if beta == 0:
        return target
    warn_of_two_classes(student)
    return target + divergence(ours.others(), theirs.others(), reduction, beta * square)


def warn_of_two_classes(student: Tensor) -> None:
    """Warn of two classes, with which the non-target term is always 0."""
    if student.shape[1] == 2:
        warn(
            "with 2 classes the non-target term of decoupled distillation (nckd, dkd, DKDLoss, "
            "AEKTLoss) is always 0; use kd / KDLoss instead, or set beta=0",
        )


def _checked(student: Tensor, teacher: Tensor, targets: Tensor, temperature: float) -> Tensor:
    check.logits(student, teacher)
    check.positive("temperature", temperature)
    return check.labels(targets, student)
