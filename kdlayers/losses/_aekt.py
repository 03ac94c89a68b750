"""AEKT: decoupled distillation behind a linear layer, with an adaptive target term."""

from typing import Literal, get_args

import torch
from torch import Tensor, nn

from kdlayers.errors import NotFittedError, ShapeError
from kdlayers.functional import _checks as check
from kdlayers.functional import standardize
from kdlayers.functional._aekt import Form, adaptive, ratio_limit
from kdlayers.functional._checks import full_precision, linear, work_dtype
from kdlayers.functional._decoupled import decouple
from kdlayers.functional._dkd import warn_of_two_classes
from kdlayers.functional._kd import divergence
from kdlayers.functional._mixed import classes_of, is_mixed
from kdlayers.functional._standardize import warn_of_signs
from kdlayers.losses._base import LogitLoss, Weight


class AEKTLoss(LogitLoss):
    r"""AEKT: adaptive transfer of explicit knowledge (Park, Lee, 2024), after one linear layer.

    .. math::
        z_d = W z^S + b, \qquad
        L = T^2 \big( \alpha\,\mathrm{TCKD} + \beta\,\mathrm{NCKD} + \gamma\,L_\mathrm{AEKT} \big)
        (z_d, z^T, y)

    Decoupled distillation and the adaptive term of :func:`kdlayers.functional.aekt` compare the
    teacher with :math:`z_d`, so the distillation reaches the student only through :math:`W`. Add
    the cross-entropy yourself, **on the student's own logits** :math:`z^S`. :meth:`parameters` has
    the layer for the optimiser; the exported student does not have it. :meth:`relations` returns
    :math:`W`, which the method reads as relations between classes. With labels that are
    probabilities ``[B, K]`` (mixup, CutMix, label smoothing) the three terms are label-weighted
    means over the classes with non-zero weight; one-hot rows give exactly the terms for class
    indices.

    **A reconstruction from the public summary.** It states three terms, the linear layer between
    the student's logits and the distillation, the cross-entropy before it, and the teacher/student
    ratio. The form of the adaptive term, all weights, the temperature, the bias and the
    initialisation are our choices. We claim no published accuracy.

    Args:
        form: of the adaptive term: ``"chi2"`` (default), ``"ratio_sq"``, ``"ratio"``, ``"is"``.
        alpha: weight of the target-class term, 0 or more. Default 1, as for decoupled distillation.
        beta: weight of the non-target-class term, 0 or more. Default 8, as for decoupled
            distillation; start lower on other data.
        gamma: weight of the adaptive term, 0 or more. Default 1, our choice; ``form="ratio"`` needs
            about 0.1.
        temperature: above 0. Default 4, as for decoupled distillation. With 1, give ``ratio_clip``
            or a small ``gamma``.
        standardize: standardise the mapped logits and the teacher's, by
            :func:`kdlayers.functional.standardize` (Sun et al., CVPR 2024). Default False.
        ratio_clip: largest ratio in the gradient; ``None`` (default): no clip.
        drop_one_minus_s: drop the factor 1 - s from the gradient. Default False.
        fc_bias: whether the linear layer has a bias. Default True.
        fc_init: ``"identity"`` (default), so that step 0 distils the raw logits, or ``"default"``,
            PyTorch's initialisation of a linear layer.
        weight, at, name, teacher_index: as for :class:`~kdlayers.DistillLoss`. Give ``weight`` a
            :class:`~kdlayers.schedules.LinearWarmup`, because the ratio is largest in the first
            epochs.

    :func:`kdlayers.attach_kd`, or the first call, makes the linear layer for the number of classes.
    :meth:`metrics` returns ``target``, ``others`` and ``adaptive``, the three terms before their
    weights, and ``ratio``, the mean of r.

    A logit of -inf (a masked class) may come from the teacher only: the linear layer turns one of
    the student's into NaN.

    Raises:
        ArgumentError: if an option or number is out of range; at the call, if a label is.
        ArgumentTypeError: if a setting is not a number; at the call, if the labels are missing or
            not a tensor of numbers.
        ShapeError: at the call, if shapes differ or the number of classes has changed.

    Warns:
        KDLayersWarning: at the call, with two classes, where the non-target term is always 0, and
            standardised logits have no gradient.

    Example:
        >>> import torch
        >>> loss = AEKTLoss(beta=1.0)
        >>> student, teacher = torch.tensor([[2.0, -1.0, 0.5]]), torch.tensor([[6.0, 1.0, -2.0]])
        >>> loss(student, teacher, torch.tensor([0])).detach()
        tensor(6.2878)
        >>> loss.relations().shape
        torch.Size([3, 3])
    """

    metric_names = ("target", "others", "adaptive", "ratio")
    fc: nn.Linear | None

    def __init__(
        self,
        *,
        form: Form = "chi2",
        alpha: float = 1.0,
        beta: float = 8.0,
        gamma: float = 1.0,
        temperature: float = 4.0,
        standardize: bool = False,
        ratio_clip: float | None = None,
        drop_one_minus_s: bool = False,
        fc_bias: bool = True,
        fc_init: Literal["identity", "default"] = "identity",
        weight: Weight = 1.0,
        at: str | tuple[str, str] | None = None,
        name: str | None = None,
        teacher_index: int | None = None,
    ) -> None:
        super().__init__(weight=weight, at=at, name=name, teacher_index=teacher_index)
        check.one_of("form", form, get_args(Form))
        check.one_of("fc_init", fc_init, ("identity", "default"))
        if ratio_clip is not None:
            ratio_clip = check.positive("ratio_clip", ratio_clip)
        self.form: Form = form
        self.alpha = check.not_negative("alpha", alpha)
        self.beta = check.not_negative("beta", beta)
        self.gamma = check.not_negative("gamma", gamma)
        self.temperature = check.positive("temperature", temperature)
        self.standardize = standardize
        self.ratio_clip = ratio_clip
        self.drop_one_minus_s = drop_one_minus_s
        self.fc_bias, self.fc_init = fc_bias, fc_init
        self.register_module("fc", None)

    def build(self, student: Tensor, teacher: Tensor) -> None:
        """Make the linear layer for the number of classes."""
        super().build(student, teacher)
        if self.fc is None:
            self._make_fc(student.shape[1], work_dtype(student), student.device)

    def _make_fc(self, classes: int, dtype: torch.dtype, device: torch.device) -> None:
        fc = nn.Linear(classes, classes, bias=self.fc_bias)
        if self.fc_init == "identity":
            nn.init.eye_(fc.weight)
            if self.fc_bias:
                nn.init.zeros_(fc.bias)
        self.fc = fc.to(device, dtype)

    def _build_from(self, state: dict[str, Tensor]) -> None:
        if self.fc is None and "fc.weight" in state:
            saved = state["fc.weight"]
            self._make_fc(len(saved), saved.dtype, saved.device)

    def forward(self, student: Tensor, teacher: Tensor, targets: Tensor | None = None) -> Tensor:
        """The three weighted terms for logits ``[B, K]`` and labels ``[B]`` or ``[B, K]``."""
        targets = check.given(targets, self)
        self.build(student, teacher)
        mapped = self._mapped(student)
        check.logits(mapped, teacher)
        limit = ratio_limit(student.dtype, self.ratio_clip)
        shares = None
        if is_mixed(targets):
            targets, shares = classes_of(targets, mapped.shape[1])
        if shares is not None:  # a row for every image and class, which its share weighs
            mapped, teacher = (t.repeat_interleave(shares.shape[1], 0) for t in (mapped, teacher))
            targets, shares = targets.flatten(), shares.flatten()
        return self._terms(mapped, teacher, check.labels(targets, mapped), shares, limit)

    @full_precision
    def _terms(
        self, student: Tensor, teacher: Tensor, targets: Tensor, shares: Tensor | None, limit: float
    ) -> Tensor:
        square = self.temperature**2
        if self.standardize:
            warn_of_signs(student)
            student, teacher = standardize(student), standardize(teacher)
        ours, theirs = decouple(student, teacher, targets, self.temperature)
        binary, taught = ours.binary(), theirs.binary()
        target = _mean_divergence(binary, taught, shares, square)
        others = torch.zeros_like(target)
        if self.beta:
            warn_of_two_classes(student)
            others = _mean_divergence(ours.others(), theirs.others(), shares, square)
        values, ratio = adaptive(binary, taught, self.form, limit, self.drop_one_minus_s)
        adapted, ratio = square * _mean(values, shares), _mean(ratio, shares)
        self._record(target=target, others=others, adaptive=adapted, ratio=ratio)
        return self.alpha * target + self.beta * others + self.gamma * adapted

    def _mapped(self, student: Tensor) -> Tensor:
        if self.fc is None or self.fc.in_features != student.shape[1]:
            made = self.fc.in_features if self.fc is not None else 0
            raise ShapeError(
                f"this AEKTLoss was made for {made} classes, but the logits are "
                f"{check.shape(student)}; use one AEKTLoss for each student"
            )
        return linear(student, self.fc.weight, self.fc.bias)

    def relations(self) -> Tensor:
        """``[K, K]``: the linear layer's matrix, detached: row i weighs the student's logits."""
        if self.fc is None:
            raise NotFittedError(
                "AEKTLoss has no matrix yet: attach_kd makes it, or the first call of the loss"
            )
        return self.fc.weight.detach()

    def extra_repr(self) -> str:
        """Shows form, numbers, weight and at."""
        numbers = f"alpha={self.alpha}, beta={self.beta}, gamma={self.gamma}"
        extra = ", standardize=True" if self.standardize else ""
        first = f"form={self.form!r}, {numbers}, temperature={self.temperature}{extra}"
        return f"{first}, {super().extra_repr()}"


def _mean(values: Tensor, shares: Tensor | None) -> Tensor:
    """Mean over samples of ``values [n]``; with shares, whose sum is the number of samples."""
    return values.mean() if shares is None else (values * shares).sum() / shares.sum()


def _mean_divergence(
    student: Tensor, teacher: Tensor, shares: Tensor | None, factor: float
) -> Tensor:
    if shares is None:
        return divergence(student, teacher, "mean", factor)
    return _mean(divergence(student, teacher, "none", factor), shares)
