"""Attention transfer: compares the energy of the channels at each position."""

from typing import ClassVar

from torch import Tensor

from kdlayers._utils.norms import inverse_norm
from kdlayers.functional._checks import full_precision
from kdlayers.losses._base import DistillLoss, Weight
from kdlayers.losses._maps import check_maps, check_positions, on_one_grid


class AttentionTransferLoss(DistillLoss):
    r"""Attention transfer by activations (Zagoruyko, Komodakis, ICLR 2017).

    .. math::
        Q(f) = \mathrm{vec}\Big( \sum_c f_c^2 \Big), \qquad
        L = \frac{1}{B H W} \sum_b \left\| \frac{Q(f^S_b)}{\|Q(f^S_b)\|_2}
            - \frac{Q(f^T_b)}{\|Q(f^T_b)\|_2} \right\|_2^2

    The loss is the squared difference of the unit attention maps, averaged over samples **and
    positions**, as in usual implementations. The value is at most 2 / (HW), so the weight is large.
    (The paper writes the norm, not its square, times beta / 2.) The loss has no parameters, and the
    numbers of channels may differ. Maps of different size are compared on the smaller grid, to
    which the larger one is average-pooled. The teacher is detached.

    Args:
        weight, at, name, teacher_index: as for :class:`~kdlayers.DistillLoss`; the default weight
            is 1000, usual for this mean, and :func:`kdlayers.attach_kd` needs ``at``.

    Raises:
        ShapeError: at the call, if the tensors are not maps ``[B, C, H, W]`` of one batch, with 2
            positions or more.

    Example:
        >>> import torch
        >>> student = torch.tensor([3.0, 0.0]).reshape(1, 1, 1, 2)
        >>> teacher = torch.tensor([[0.0, 1.0], [0.0, 2.0]]).reshape(1, 2, 1, 2)
        >>> AttentionTransferLoss(at="layer4")(student, teacher)
        tensor(1.)
    """

    detaches_teacher: ClassVar[bool] = True

    def __init__(
        self,
        *,
        weight: Weight = 1000.0,
        at: str | tuple[str, str] | None = None,
        name: str | None = None,
        teacher_index: int | None = None,
    ) -> None:
        super().__init__(weight=weight, at=at, name=name, teacher_index=teacher_index)

    def build(self, student: Tensor, teacher: Tensor) -> None:
        """Check that both are maps of several positions: one position is always the unit vector."""
        check_maps(student, teacher)
        check_positions(student, teacher, self)

    def forward(self, student: Tensor, teacher: Tensor, targets: Tensor | None = None) -> Tensor:  # noqa: ARG002
        """The mean squared difference for maps ``[B, C, H, W]``; the labels are not used."""
        self.build(student, teacher)
        student, teacher = on_one_grid(student, teacher.detach())
        ours, theirs = (
            energy * inverse_norm(energy) for energy in map(attention, (student, teacher))
        )
        return (ours - theirs).square().mean()


@full_precision
def attention(maps: Tensor) -> Tensor:
    """``[B, H * W]``: the energy at each position, a mean over channels; float32 or better."""
    return maps.square().mean(dim=1).flatten(1)
