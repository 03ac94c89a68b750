"""FitNet: regression of the teacher's features from the student's."""

from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from kdlayers._utils.chunks import work_dtype
from kdlayers.errors import ShapeError
from kdlayers.functional import _checks as check
from kdlayers.functional._precision import full_precision
from kdlayers.losses._base import DistillLoss, Weight
from kdlayers.losses._maps import check_maps, on_one_grid


class FitNetLoss(DistillLoss):
    r"""FitNet hints (Romero, Ballas, Kahou, Chassang, Gatta, Bengio, ICLR 2015).

    .. math::
        L = \frac{1}{B C_T H W} \sum \big( r(f^S) - f^T \big)^2

    with a learnt 1x1 convolution :math:`r` (with bias, PyTorch's initialisation) from the student's
    to the teacher's channels. The mean over everything, without the paper's factor 1/2. Maps of
    different size are compared on the smaller grid, to which the larger one is average-pooled. The
    teacher is detached. :meth:`parameters` has the regressor for the optimiser; the exported
    student does not have it. The paper trains on hints first and distils afterwards; here the term
    is part of the loss, as in later work.

    Args:
        weight, at, name, teacher_index: as for :class:`~kdlayers.DistillLoss`;
            :func:`kdlayers.attach_kd` needs ``at``. A weight of 100 is usual on CIFAR-100.

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

    detaches_teacher: ClassVar[bool] = True
    regressor: nn.Conv2d | None

    def __init__(
        self,
        *,
        weight: Weight = 1.0,
        at: str | tuple[str, str] | None = None,
        name: str | None = None,
        teacher_index: int | None = None,
    ) -> None:
        super().__init__(weight=weight, at=at, name=name, teacher_index=teacher_index)
        self.register_module("regressor", None)

    def build(self, student: Tensor, teacher: Tensor) -> None:
        """Make the regressor for the channels of both maps."""
        check_maps(student, teacher)
        if self.regressor is None:
            regressor = nn.Conv2d(student.shape[1], teacher.shape[1], 1)
            self.regressor = regressor.to(student.device, work_dtype(student))

    def _build_from(self, state: dict[str, Tensor]) -> None:
        saved = state.get("regressor.weight")
        if self.regressor is None and saved is not None:
            regressor = nn.Conv2d(saved.shape[1], saved.shape[0], 1)
            self.regressor = regressor.to(saved.device, saved.dtype)

    def forward(self, student: Tensor, teacher: Tensor, targets: Tensor | None = None) -> Tensor:  # noqa: ARG002
        """The mean squared difference for maps ``[B, C, H, W]``; the labels are not used."""
        self.build(student, teacher)
        weight, bias = self.regressor.weight, self.regressor.bias  # type: ignore[union-attr]
        if weight.shape[:2] != (teacher.shape[1], student.shape[1]):
            raise ShapeError(
                f"this FitNetLoss maps {weight.shape[1]} to {weight.shape[0]} channels, got "
                f"{check.shape(student)} and {check.shape(teacher)}; use one FitNetLoss for each "
                "point"
            )
        student, teacher = on_one_grid(student, teacher.detach())
        return _hint(student, teacher, weight, bias)


@full_precision
def _hint(student: Tensor, teacher: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # F.mse_loss would refuse a float64 teacher in its backward pass with torch 2.9.
    return (F.conv2d(student, weight, bias) - teacher).square().mean()
