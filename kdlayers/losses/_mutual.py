"""Deep mutual learning: the divergence of one student from another."""

from typing import ClassVar

from torch import Tensor

from kdlayers.functional import _checks as check
from kdlayers.functional import kd
from kdlayers.losses._base import LogitLoss, Weight


class MutualLoss(LogitLoss):
    r"""Deep mutual learning (Zhang, Xiang, Hospedales, Lu, CVPR 2018): each learns from the other.

    .. math:: L_i = T^2 \, \mathrm{KL}\big( \mathrm{softmax}(z_j / T) \,\|\,
        \mathrm{softmax}(z_i / T) \big), \qquad T = 1

    for student :math:`i` and its peer :math:`j`, whose logits are detached: each network's loss
    trains that network alone. The loss is summed over classes and averaged over samples. Its value
    equals :func:`kdlayers.functional.kd`; it was checked against an independent re-implementation
    of the mutual learning in the released code of "Revisiting Knowledge Distillation: An
    Inheritance and Exploration Framework", CVPR 2021.

    Args:
        temperature: above 0. Default 1, as published.
        weight, at, name, teacher_index: as for :class:`~kdlayers.DistillLoss`.

    Raises:
        ArgumentError: if ``temperature`` is not above 0.
        ArgumentTypeError: if ``temperature`` is not a number.
        ShapeError: at the call, if the tensors are not logits of one shape ``[B, K]``.

    Example:
        >>> import torch
        >>> a, b = torch.tensor([[2.0, 0.0]]), torch.tensor([[0.0, 0.0]])
        >>> MutualLoss()(a, b), MutualLoss()(b, a)
        (tensor(0.4338), tensor(0.3278))
    """

    detaches_teacher: ClassVar[bool] = True

    def __init__(
        self,
        *,
        temperature: float = 1.0,
        weight: Weight = 1.0,
        at: str | tuple[str, str] | None = None,
        name: str | None = None,
        teacher_index: int | None = None,
    ) -> None:
        super().__init__(weight=weight, at=at, name=name, teacher_index=teacher_index)
        self.temperature = check.positive("temperature", temperature)

    def forward(self, student: Tensor, teacher: Tensor, targets: Tensor | None = None) -> Tensor:  # noqa: ARG002
        """The divergence from the peer, for logits ``[B, K]``; the labels are not used."""
        check.logits(student, teacher)
        return kd(student, teacher.detach(), temperature=self.temperature)

    def extra_repr(self) -> str:
        """Shows temperature, weight and at."""
        return f"temperature={self.temperature}, {super().extra_repr()}"
