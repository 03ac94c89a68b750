"""Similarity-preserving knowledge distillation, as a loss."""

from typing import ClassVar

from torch import Tensor

from kdlayers.functional import similarity_preserving
from kdlayers.functional._relations import samples
from kdlayers.losses._base import DistillLoss, Weight


class SimilarityPreservingLoss(DistillLoss):
    r"""Similarity-preserving knowledge distillation (Tung, Mori, ICCV 2019).

    .. math:: L = \frac{1}{B^2} \big\| \tilde G^S - \tilde G^T \big\|_F^2

    with the inner products :math:`G` of the samples of a batch, each row divided by its norm: two
    samples that are similar for the teacher should be similar for the student. See
    :func:`kdlayers.functional.similarity_preserving`. Nothing is learnt, and the widths may differ.
    Maps of different size are compared on the smaller grid with :func:`kdlayers.attach_kd`. The
    teacher is detached.

    Args:
        weight, at, name, teacher_index: as for :class:`~kdlayers.DistillLoss`; the default weight
            is 3000, RepDistiller's on CIFAR-100, as the value is at most 4 / B. ``at`` is usually
            the point of the last feature maps; ``at=None`` compares the models' outputs.

    Raises:
        ShapeError: at the call, if the tensors are not features of the same 2 samples or more.

    Example:
        >>> import torch
        >>> student = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> teacher = torch.tensor([[1.0, 0.0, 1.0], [1.0, 0.0, 1.0]])
        >>> SimilarityPreservingLoss(at="layer4")(student, teacher)
        tensor(0.2929)
    """

    detaches_teacher: ClassVar[bool] = True

    def __init__(
        self,
        *,
        weight: Weight = 3000.0,
        at: str | tuple[str, str] | None = None,
        name: str | None = None,
        teacher_index: int | None = None,
    ) -> None:
        super().__init__(weight=weight, at=at, name=name, teacher_index=teacher_index)

    def build(self, student: Tensor, teacher: Tensor) -> None:
        """Check that both are features of the same samples."""
        samples(student, teacher, least=1)

    def forward(self, student: Tensor, teacher: Tensor, targets: Tensor | None = None) -> Tensor:  # noqa: ARG002
        """The squared difference for features ``[B, ...]``; the labels are not used."""
        self.build(student, teacher)
        return similarity_preserving(student, teacher.detach())
