"""Relational knowledge distillation, as a loss."""

from typing import ClassVar

from torch import Tensor

from kdlayers.errors import ArgumentError
from kdlayers.functional import _checks as check
from kdlayers.functional._relations import samples
from kdlayers.functional._rkd import rkd
from kdlayers.losses._base import DistillLoss, Weight


class RKDLoss(DistillLoss):
    r"""Relational knowledge distillation (Park, Kim, Lu, Cho, CVPR 2019).

    .. math:: L = \lambda_D \, L_\mathrm{distance} + \lambda_A \, L_\mathrm{angle}

    It compares how the samples of a batch lie relative to each other: the distances of every two
    of them, and the angles of every three. See :func:`kdlayers.functional.rkd_distance` and
    :func:`~kdlayers.functional.rkd_angle`. Nothing is learnt, and the widths may differ. The whole
    features of a sample are one vector, so give the point after global pooling, as the paper does;
    maps work too. The teacher is detached. Time grows with the cube of the batch.

    Args:
        distance: weight of the distances, 0 or more. Default 25, that of RepDistiller on CIFAR-100;
            the authors' example for metric learning has 1.
        angle: weight of the angles, 0 or more. Default 50, also from RepDistiller; the authors'
            example has 2.
        weight, at, name, teacher_index: as for :class:`~kdlayers.DistillLoss`; ``at=None`` compares
            the models' outputs.

    Raises:
        ArgumentError: if a weight is negative, or both are 0.
        ArgumentTypeError: if a weight is not a number.
        ShapeError: at the call, if the tensors are not features of the same 3 samples or more.

    Example:
        >>> import torch
        >>> student = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
        >>> teacher = torch.tensor([[0.0, 0.0, 1.0], [3.0, 0.0, 1.0], [0.0, 3.0, 1.0]])
        >>> RKDLoss(at="avgpool")(student, teacher)
        tensor(0.6522)
    """

    detaches_teacher: ClassVar[bool] = True

    def __init__(
        self,
        *,
        distance: float = 25.0,
        angle: float = 50.0,
        weight: Weight = 1.0,
        at: str | tuple[str, str] | None = None,
        name: str | None = None,
        teacher_index: int | None = None,
    ) -> None:
        super().__init__(weight=weight, at=at, name=name, teacher_index=teacher_index)
        distance = check.not_negative("distance", distance)
        angle = check.not_negative("angle", angle)
        if distance == angle == 0:
            raise ArgumentError(
                "distance and angle are both 0: RKDLoss would compare nothing; give one of them a "
                "weight above 0"
            )
        self.distance = distance
        self.angle = angle

    def build(self, student: Tensor, teacher: Tensor) -> None:
        """Check that both are features of the same samples."""
        samples(student, teacher, least=1)

    def forward(self, student: Tensor, teacher: Tensor, targets: Tensor | None = None) -> Tensor:  # noqa: ARG002
        """The weighted sum for features ``[B, ...]``; the labels are not used."""
        self.build(student, teacher)
        return rkd(student, teacher.detach(), self.distance, self.angle)

    def extra_repr(self) -> str:
        """Shows both weights of the terms, weight and at."""
        return f"distance={self.distance}, angle={self.angle}, {super().extra_repr()}"
