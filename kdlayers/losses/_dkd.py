"""Decoupled knowledge distillation, as a loss."""

from torch import Tensor

from kdlayers.functional import _checks as check
from kdlayers.functional import dkd, standardize
from kdlayers.functional._standardize import warn_of_signs
from kdlayers.losses._base import LogitLoss, Weight


class DKDLoss(LogitLoss):
    r"""Decoupled knowledge distillation (Zhao, Cui, Song, Qiu, Liang, CVPR 2022).

    .. math:: L = T^2 \big( \alpha \, \mathrm{TCKD} + \beta \, \mathrm{NCKD} \big)

    See :func:`kdlayers.functional.dkd` for the two terms. The authors add the loss to the
    cross-entropy. On CIFAR-100 they raise its weight from 1/20 in the first epoch to 1 in the
    20th, as ``LinearWarmup(19, start=1 / 20, steps_per_epoch=len(loader))`` of
    :mod:`kdlayers.schedules` does. The loss needs the labels: class indices ``[B]``, or
    probabilities ``[B, K]`` from mixup, CutMix or label smoothing. For probabilities it is the
    label-weighted mean over the classes with non-zero weight; one-hot rows give exactly the loss
    for class indices. Time and memory grow with the number of these classes: two after mixup, all
    classes for soft labels.

    Args:
        alpha: weight of the target-class term, 0 or more. Default 1, as in the authors' code.
        beta: weight of the non-target-class term, 0 or more. Default 8, the authors' value for one
            pair of networks; their values run from 0.5 (ImageNet) to 8. Start lower on other data.
        temperature: above 0. Default 4, the authors' value on CIFAR-100; they use 1 on ImageNet.
        standardize: standardise the logits of both first, by
            :func:`kdlayers.functional.standardize` (Sun et al., CVPR 2024). Default False.
        weight, at, name, teacher_index: as for :class:`~kdlayers.DistillLoss`.

    Raises:
        ArgumentError: if a number is out of range; at the call, if a label is.
        ArgumentTypeError: if a setting is not a number; at the call, if the labels are missing or
            not a tensor of numbers.
        ShapeError: at the call, if the tensors are not logits of one shape with a label per sample.

    Warns:
        KDLayersWarning: at the call, with two classes, where the non-target term is always 0, and
            standardised logits have no gradient.

    Example:
        >>> import torch
        >>> loss = DKDLoss(beta=1.0)
        >>> student, teacher = torch.tensor([[2.0, -1.0, 0.5]]), torch.tensor([[6.0, 1.0, -2.0]])
        >>> loss(student, teacher, torch.tensor([0]))
        tensor(4.2928)
    """

    def __init__(
        self,
        *,
        alpha: float = 1.0,
        beta: float = 8.0,
        temperature: float = 4.0,
        standardize: bool = False,
        weight: Weight = 1.0,
        at: str | tuple[str, str] | None = None,
        name: str | None = None,
        teacher_index: int | None = None,
    ) -> None:
        super().__init__(weight=weight, at=at, name=name, teacher_index=teacher_index)
        self.alpha = check.not_negative("alpha", alpha)
        self.beta = check.not_negative("beta", beta)
        self.temperature = check.positive("temperature", temperature)
        self.standardize = standardize

    def forward(self, student: Tensor, teacher: Tensor, targets: Tensor | None = None) -> Tensor:
        """The weighted sum for logits ``[B, K]`` and labels ``[B]`` or ``[B, K]``."""
        targets = check.given(targets, self)
        if self.standardize:
            check.logits(student, teacher)
            warn_of_signs(student)
            student, teacher = standardize(student), standardize(teacher)
        return dkd(
            student,
            teacher,
            targets,
            alpha=self.alpha,
            beta=self.beta,
            temperature=self.temperature,
        )

    def extra_repr(self) -> str:
        """Shows alpha, beta, temperature, weight and at."""
        numbers = f"alpha={self.alpha}, beta={self.beta}, temperature={self.temperature}"
        extra = ", standardize=True" if self.standardize else ""
        return f"{numbers}{extra}, {super().extra_repr()}"
