"""Channel-wise distillation for dense prediction, as a loss."""

from typing import ClassVar

from torch import Tensor

from kdlayers.functional import _checks as check
from kdlayers.functional import channelwise
from kdlayers.losses._base import Weight
from kdlayers.losses._maps import check_maps, check_positions, on_one_grid
from kdlayers.losses._projected import ProjectedLoss


class ChannelWiseLoss(ProjectedLoss):
    r"""Channel-wise distillation, CWD (Shu, Liu, Gao, Yan, Shen, ICCV 2021).

    .. math:: L = \frac{T^2}{B C} \sum_{b,c} \mathrm{KL}( \phi(f^T_{bc}) \,\|\, \phi(f^S_{bc}) )

    with the softmax :math:`\phi` over positions; see :func:`kdlayers.functional.channelwise`. The
    teacher is detached. Maps are compared on the smaller grid; a train-only 1x1 convolution without
    bias matches different numbers of channels. The student learns where each channel is active.

    Args:
        temperature: above 0. Default 4; the authors' code and mmrazor have 1.
        weight, at, name, teacher_index: as for :class:`~kdlayers.DistillLoss`; ``at=None`` compares
            class maps. Default weight 1, as in the authors' code; mmrazor gives class maps 5.

    Raises:
        ArgumentError: if ``temperature`` is not above 0.
        ArgumentTypeError: if ``temperature`` is not a number.
        ShapeError: at the call, if the tensors are not maps ``[B, C, H, W]`` of one batch with 2
            positions or more, or the numbers of channels have changed.

    Example:
        >>> import torch
        >>> student = torch.tensor([2.0, 0.0, 0.0, 0.0]).reshape(1, 1, 2, 2)
        >>> teacher = torch.tensor([0.0, 8.0, 0.0, 0.0]).reshape(1, 1, 2, 2)
        >>> ChannelWiseLoss()(student, teacher)
        tensor(9.1229)
    """

    bias: ClassVar[bool] = False

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
        self.temperature = check.positive("temperature", temperature)
        self._hold("linear")

    def forward(self, student: Tensor, teacher: Tensor, targets: Tensor | None = None) -> Tensor:  # noqa: ARG002
        """The mean divergence for maps ``[B, C, H, W]``; the labels are not used."""
        student, teacher = self._ready(student, teacher)
        projected = self._projected(student, teacher)
        return channelwise(projected, teacher.detach(), temperature=self.temperature)

    def _read(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        check_maps(student, teacher)
        check_positions(student, teacher, self)
        return on_one_grid(student, teacher)

    def _make(self, student: Tensor, teacher: Tensor) -> None:
        if student.shape[1] != teacher.shape[1]:  # equal channels need no convolution
            super()._make(student, teacher)

    def extra_repr(self) -> str:
        """Shows temperature, weight and at."""
        return f"temperature={self.temperature}, {super().extra_repr()}"
