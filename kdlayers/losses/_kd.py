"""Knowledge distillation by softened logits, as a loss."""

from torch import Tensor

from kdlayers.functional import _checks as check
from kdlayers.functional import kd
from kdlayers.losses._base import LogitLoss, Weight


class KDLoss(LogitLoss):
    r"""Knowledge distillation by softened logits (Hinton, Vinyals, Dean, 2015).

    .. math::
        L = T^2 \, \mathrm{KL}\big(\mathrm{softmax}(z^T / T) \,\|\, \mathrm{softmax}(z^S / T)\big)

    The sum over classes, averaged over samples; see :func:`kdlayers.functional.kd`. The loss does
    not detach the teacher, so that a trainable teacher side gets its gradient, as in
    :class:`~kdlayers.losses.StudentFriendlyKDLoss`; :func:`kdlayers.attach_kd` runs the teacher
    without gradients.

    Args:
        temperature: above 0. Default 4, usual for CIFAR-100; 1 is usual for ImageNet.
        weight, at, name, teacher_index: as for :class:`~kdlayers.DistillLoss`. A usual weight on
            CIFAR-100 is 0.9, with 0.1 times the cross-entropy.

    Raises:
        ArgumentError: if ``temperature`` is not above 0.
        ShapeError: at the call, if the tensors are not logits of one shape ``[B, K]``.

    Example:
        >>> import torch
        >>> loss = KDLoss(temperature=4.0, weight=0.9)
        >>> loss(torch.tensor([[2.0, -1.0, 0.5]]), torch.tensor([[6.0, 1.0, -2.0]]))
        tensor(2.6012)
    """

    def __init__(
        self,
        *,
        temperature: float = 4.0,
        weight: Weight = 1.0,
        at: str | tuple[str, str] | None = None,
        name: str | None = None,
        teacher_index: int | None = None,
    ) -> None:
        super().__init__(weight=weight, at=at, name=name, teacher_index=teacher_index)
        check.positive("temperature", temperature)
        self.temperature = temperature

    def forward(self, student: Tensor, teacher: Tensor, targets: Tensor | None = None) -> Tensor:  # noqa: ARG002
        """The divergence for logits ``[B, K]``; the labels are not used."""
        return kd(student, teacher, temperature=self.temperature)

    def extra_repr(self) -> str:
        """Shows the temperature before weight and at."""
        return f"temperature={self.temperature}, {super().extra_repr()}"
