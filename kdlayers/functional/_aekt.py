"""The adaptive term of AEKT: explicit knowledge weighted by the teacher/student ratio."""

from math import exp
from typing import Literal, TypeAlias, get_args

import torch
from torch import Tensor

from kdlayers.functional import _checks as check
from kdlayers.functional._checks import Reduction, full_precision
from kdlayers.functional._decoupled import decouple
from kdlayers.functional._mixed import is_mixed, mean_over_classes

Form: TypeAlias = Literal["chi2", "ratio_sq", "ratio", "is"]

_LOG_RATIO_LIMIT = 60.0
"""exp(60) is 1e26; multiplied by a squared temperature and a batch it is finite in float32."""
_HALF_LIMIT = 1024.0
"""A gradient of this size times a temperature of 16 is finite in float16."""


def aekt(
    student: Tensor,
    teacher: Tensor,
    targets: Tensor,
    *,
    form: Form = "chi2",
    temperature: float = 4.0,
    ratio_clip: float | None = None,
    drop_one_minus_s: bool = False,
    reduction: Reduction = "mean",
) -> Tensor:
    r"""The adaptive term of AEKT (Park, Lee, 2024), without its target and non-target terms.

    Let :math:`a` and :math:`s` be the teacher's and the student's probability of the labelled
    class, softened by the temperature, and :math:`r = a / s`:

    .. math::
        L = T^2 \, \frac{1}{B} \sum_b \ell_b, \qquad
        \frac{\partial \ell}{\partial \log s} = c

    ============  ========================  =================  ======================
    form          :math:`\ell`              :math:`c`          optimum
    ============  ========================  =================  ======================
    ``chi2``      :math:`(s - a)^2 / s`     :math:`s - r a`    :math:`s = a`
    ``ratio_sq``  :math:`a^2 / s`           :math:`-r a`       :math:`s = 1`
    ``ratio``     :math:`a / s`             :math:`-r`         :math:`s = 1`
    ``is``        :math:`r - \log r - 1`    :math:`1 - r`      :math:`s = a`
    ============  ========================  =================  ======================

    **A reconstruction.** The public summary of the method says that the term weights the teacher's
    confidence in the target class by the teacher/student ratio; we did not have its formula.
    ``chi2`` turns the gradient :math:`s - a` of the target term into :math:`s - r a`. ``ratio_sq``
    and ``ratio`` fit the summary as well, but pull :math:`s` beyond :math:`a`.

    The value is the closed form. The gradient is that of the surrogate
    :math:`\mathrm{sg}(c) \log s`, which equals the closed form's unless ``ratio_clip`` or
    ``drop_one_minus_s`` change it. Only the student gets a gradient. So that results stay finite,
    :math:`r` is at most :math:`e^{60}`, and at most 1024 in the gradient of float16 logits.

    Args:
        student: logits, ``[B, K]``; in the method they have passed the extra linear layer.
        teacher: logits of the same shape.
        targets: class indices, ``[B]``, or probabilities ``[B, K]``. The term follows the labels
            even where the teacher is wrong. For probabilities it is the label-weighted mean over
            the classes with non-zero weight, as in :func:`dkd`; one-hot rows give the value for
            class indices.
        form: a row of the table. Default ``"chi2"``, our choice.
        temperature: above 0. Default 4, as for decoupled distillation. At 1 the ratio starts near
            K: use ``ratio_clip``.
        ratio_clip: largest :math:`r` in the gradient, above 0; ``None`` (default): no clip.
        drop_one_minus_s: divide the gradient by :math:`1 - s`, the factor that any function of
            :math:`s` has in its gradient with respect to the target's logit. Default False.
        reduction: over samples: ``"mean"`` (default), ``"sum"`` or ``"none"``.

    Returns:
        A scalar, or ``[B]`` with ``reduction="none"``; 0 or more.

    Raises:
        ShapeError: if the tensors are not logits of one shape with one label per sample.
        ArgumentTypeError: if the labels are not a tensor of numbers.
        ArgumentError: if a label or number is out of range, or an option unknown.

    Example:
        >>> import torch
        >>> student, teacher = torch.tensor([[2.0, -1.0, 0.5]]), torch.tensor([[6.0, 1.0, -2.0]])
        >>> aekt(student, teacher, torch.tensor([0]))
        tensor(1.9949)
    """
    check.one_of("form", form, get_args(Form))
    if ratio_clip is not None:
        ratio_clip = check.positive("ratio_clip", ratio_clip)
    check.logits(student, teacher)
    limit = ratio_limit(student.dtype, ratio_clip)

    def term(labels: Tensor, by: Reduction) -> Tensor:
        values = _of_logits(student, teacher, labels, form, temperature, limit, drop_one_minus_s)
        return check.reduce(values, by)

    if is_mixed(targets):
        return mean_over_classes(term, targets, student.shape[1], reduction)
    return term(targets, reduction)


def ratio_limit(dtype: torch.dtype, ratio_clip: float | None) -> float:
    """Largest ratio in the gradient with respect to logits of ``dtype``."""
    largest = _HALF_LIMIT if dtype == torch.float16 else exp(_LOG_RATIO_LIMIT)
    return largest if ratio_clip is None else min(ratio_clip, largest)


@full_precision
def _of_logits(
    student: Tensor,
    teacher: Tensor,
    targets: Tensor,
    form: Form,
    temperature: float,
    limit: float,
    drop_one_minus_s: bool,
) -> Tensor:
    temperature = check.positive("temperature", temperature)
    targets = check.labels(targets, student)
    ours, theirs = decouple(student, teacher.detach(), targets, temperature)
    values, _ = adaptive(ours.binary(), theirs.binary(), form, limit, drop_one_minus_s)
    return temperature**2 * values


def adaptive(
    student: Tensor, teacher: Tensor, form: Form, limit: float, drop_one_minus_s: bool
) -> tuple[Tensor, Tensor]:
    """The term without the squared temperature, and the ratio r, each ``[B]``.

    Args:
        student: log-probabilities ``[B, 2]`` of the target class and of all others together.
        teacher: the same of the teacher.
        form: a form of `aekt`.
        limit: largest r in the gradient.
        drop_one_minus_s: as in `aekt`.
    """
    log_s, log_rest = student.unbind(dim=1)
    with torch.no_grad():
        log_a = teacher[:, 0]
        s, a, log_r = log_s.exp(), log_a.exp(), (log_a - log_s).clamp(max=_LOG_RATIO_LIMIT)
        r = log_r.exp()
        value, slope = _value_and_slope(form, s, a, log_r, r, r.clamp(max=limit))
        if drop_one_minus_s:
            slope = slope / log_rest.exp().clamp(min=torch.finfo(slope.dtype).eps)
    surrogate = slope * log_s
    # The difference is exactly 0, so the value stays exact; its gradient is the surrogate's.
    return value + (surrogate - surrogate.detach()), r


def _value_and_slope(
    form: Form, s: Tensor, a: Tensor, log_r: Tensor, r: Tensor, clipped: Tensor
) -> tuple[Tensor, Tensor]:
    if form == "chi2":  # (s - a)(1 - r) is s (1 - r)^2 without the square, which would overflow
        return (s - a) * (1 - r), s - clipped * a
    if form == "ratio_sq":
        return a * r, -clipped * a
    if form == "ratio":
        return r, -clipped
    return log_r.expm1() - log_r, 1 - clipped
