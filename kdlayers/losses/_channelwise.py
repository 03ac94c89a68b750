"""Channel-wise distillation for dense prediction, as a loss."""

from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from kdlayers.errors import ShapeError
from kdlayers.functional import _checks as check
from kdlayers.functional import channelwise
from kdlayers.functional._checks import full_precision, work_dtype
from kdlayers.losses._base import DistillLoss, Weight
from kdlayers.losses._maps import check_maps, on_one_grid


class ChannelWiseLoss(DistillLoss):
    r"""Channel-wise distillation, CWD (Shu, Liu, Gao, Yan, Shen, ICCV 2021).

    .. math::
        L = \frac{T^2}{B C} \sum_{b,c} \mathrm{KL}\big( \phi(f^T_{bc}) \,\|\, \phi(f^S_{bc}) \big)

    with the softmax :math:`\phi` over the positions of a channel at temperature T: the student
    learns where each channel is active. See :func:`kdlayers.functional.channelwise`. It reads class
    maps (``at=None``) or features at any point. Where the numbers of channels differ, a learnt 1x1
    convolution brings the student's to the teacher's, without a bias, which the softmax would take
    away; it is in :meth:`parameters` for the optimiser
    and never in the exported student. Maps of different size are compared on the smaller grid, the
    larger one average-pooled. The teacher is detached.

    Args:
        temperature: above 0. Default 4.
        weight, at, name, teacher_index: as for :class:`~kdlayers.DistillLoss`; ``at=None`` compares
            the models' class maps. mmrazor gives class maps a weight of 5, with temperature 1.

    Raises:
        ArgumentError: if ``temperature`` is not above 0.
        ShapeError: at the call, if the tensors are not maps ``[B, C, H, W]`` of one batch with at
            least two positions, or the channels have changed.

    Example:
        >>> import torch
        >>> student = torch.tensor([2.0, 0.0, 0.0, 0.0]).reshape(1, 1, 2, 2)
        >>> teacher = torch.tensor([0.0, 8.0, 0.0, 0.0]).reshape(1, 1, 2, 2)
        >>> ChannelWiseLoss()(student, teacher)
        tensor(9.1229)
    """

    detaches_teacher: ClassVar[bool] = True
    projector: nn.Conv2d | None

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
        self.register_module("projector", None)

    def build(self, student: Tensor, teacher: Tensor) -> None:
        """Check the maps, and make the convolution where the numbers of channels differ."""
        check_maps(student, teacher)
        if min(student.shape[2], teacher.shape[2]) * min(student.shape[3], teacher.shape[3]) < 2:
            raise ShapeError(
                "ChannelWiseLoss compares where a channel is active, so the maps must have at "
                f"least 2 positions on one grid, got {check.shape(student)} and "
                f"{check.shape(teacher)}; choose an earlier point, or RKDLoss for vectors"
            )
        if self.projector is None and student.shape[1] != teacher.shape[1]:
            projector = nn.Conv2d(student.shape[1], teacher.shape[1], 1, bias=False)
            dtype = work_dtype(student)
            self.projector = projector.to(student.device, dtype)

    def _build_from(self, state: dict[str, Tensor]) -> None:
        saved = state.get("projector.weight")
        if self.projector is None and saved is not None:
            projector = nn.Conv2d(saved.shape[1], saved.shape[0], 1, bias=False)
            self.projector = projector.to(saved.device, saved.dtype)

    def forward(self, student: Tensor, teacher: Tensor, targets: Tensor | None = None) -> Tensor:  # noqa: ARG002
        """The mean divergence for maps ``[B, C, H, W]``; the labels are not used."""
        self.build(student, teacher)
        student, teacher = on_one_grid(student, teacher.detach())
        return channelwise(self._projected(student, teacher), teacher, temperature=self.temperature)

    def _projected(self, student: Tensor, teacher: Tensor) -> Tensor:
        made = self.projector
        if made is None:
            return student
        if (made.in_channels, made.out_channels) != (student.shape[1], teacher.shape[1]):
            raise ShapeError(
                f"this ChannelWiseLoss maps {made.in_channels} to {made.out_channels} channels, "
                f"got {check.shape(student)} and {check.shape(teacher)}; use one ChannelWiseLoss "
                "for each point"
            )
        return _convolved(student, made.weight)

    def extra_repr(self) -> str:
        """Shows the temperature besides weight and at."""
        return f"temperature={self.temperature}, {super().extra_repr()}"


@full_precision
def _convolved(maps: Tensor, weight: Tensor) -> Tensor:
    return F.conv2d(maps, weight)
