"""FitNet: regression of the teacher's features from the student's."""

from typing import ClassVar

from torch import Tensor, nn

from kdlayers.losses._base import Weight
from kdlayers.losses._feature import FeatureLoss
from kdlayers.losses._maps import check_maps, on_one_grid


class FitNetLoss(FeatureLoss):
    r"""FitNet hints (Romero, Ballas, Kahou, Chassang, Gatta, Bengio, ICLR 2015).

    .. math::
        L = \frac{1}{B C_T H W} \sum \big( r(f^S) - f^T \big)^2

    with a learnt 1x1 convolution :math:`r` (with bias, PyTorch's initialisation) from the student's
    to the teacher's channels. It is :class:`FeatureLoss` with ``distance="mse"``, on maps. The mean
    is over all elements; the paper's factor 1/2 is left out. Maps of different size are compared on
    the smaller grid, to which the larger one is average-pooled. The teacher is detached.
    :meth:`parameters` has the regressor for the optimiser; the exported student does not have it.
    The paper trains on hints first and distils afterwards; here the term is part of the loss, as in
    later work.

    Args:
        weight, at, name, teacher_index: as for :class:`~kdlayers.DistillLoss`;
            :func:`kdlayers.attach_kd` needs ``at``. RepDistiller has a weight of 100 on CIFAR-100.

    Raises:
        ShapeError: at the call, if the tensors are not maps ``[B, C, H, W]`` of one batch or the
            student's channels have changed.

    Example:
        >>> import torch
        >>> loss = FitNetLoss(at="layer4")
        >>> value = loss(torch.randn(2, 8, 4, 4), torch.randn(2, 16, 4, 4))
        >>> loss.regressor.weight.shape
        torch.Size([16, 8, 1, 1])
    """

    slot: ClassVar[str] = "regressor"
    regressor: nn.Conv2d | None

    def __init__(
        self,
        *,
        weight: Weight = 1.0,
        at: str | tuple[str, str] | None = None,
        name: str | None = None,
        teacher_index: int | None = None,
    ) -> None:
        super().__init__(
            distance="mse", weight=weight, at=at, name=name, teacher_index=teacher_index
        )

    def _read(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        check_maps(student, teacher)
        return on_one_grid(student, teacher)

    def extra_repr(self) -> str:
        """Shows weight and at."""
        return f"weight={self.weight!r}, at={self.at!r}"
