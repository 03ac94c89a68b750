"""Attention transfer: where the channels' energy lies."""

from typing import ClassVar

from torch import Tensor

from kdlayers._utils.norms import inverse_norm
from kdlayers.functional._precision import full_precision
from kdlayers.losses._base import DistillLoss, Weight
from kdlayers.losses._maps import check_maps, on_one_grid


class AttentionTransferLoss(DistillLoss):
    r"""Attention transfer by activations (Zagoruyko, Komodakis, ICLR 2017).

    .. math::
        Q(f) = \mathrm{vec}\Big( \sum_c f_c^2 \Big), \qquad
        L = \frac{1}{B H W} \sum_b \left\| \frac{Q(f^S_b)}{\|Q(f^S_b)\|_2}
            - \frac{Q(f^T_b)}{\|Q(f^T_b)\|_2} \right\|_2^2

    The squared difference of the unit attention maps, averaged over samples **and positions** as
    usual implementations do, so the value is at most 4 / (HW): hence the large weight. (The paper
    writes the norm, not its square, times beta / 2.) Nothing is learnt, and the numbers of channels
    may differ. Maps of different size are compared on the smaller grid, the larger one
    average-pooled. The teacher is detached.

    Args:
        weight: factor in ``kd.loss``, a number or a function of the step. Default 1000, usual for
            this mean.
        at: a name, or a pair (student's, teacher's); needed with :func:`kdlayers.attach_kd`.
        name: key in ``kd.terms``.
        teacher_index: index of the teacher to learn from, where there are several.

    Raises:
        ShapeError: at the call, if the tensors are not maps ``[B, C, H, W]`` of one batch.

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

    def forward(self, student: Tensor, teacher: Tensor, targets: Tensor | None = None) -> Tensor:  # noqa: ARG002
        """The mean squared difference for maps ``[B, C, H, W]``; the labels are not used."""
        check_maps(student, teacher)
        student, teacher = on_one_grid(student, teacher.detach())
        return _difference(student, teacher)


@full_precision
def _difference(student: Tensor, teacher: Tensor) -> Tensor:
    return (unit_attention(student) - unit_attention(teacher)).square().mean()


def unit_attention(maps: Tensor) -> Tensor:
    """``[B, H * W]``: the energy at each position, of unit length for each sample."""
    energy = attention(maps)
    return energy * inverse_norm(energy)


@full_precision
def attention(maps: Tensor) -> Tensor:
    """``[B, H * W]``: the energy at each position, a mean over channels."""
    return maps.square().mean(dim=1).flatten(1)
