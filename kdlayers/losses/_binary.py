"""Knowledge distillation of independent classes, as a loss."""

from torch import Tensor

from kdlayers.functional import _checks as check
from kdlayers.functional import binary_kd
from kdlayers.functional._binary import independent
from kdlayers.losses._base import LogitLoss, Weight
from kdlayers.losses._class_maps import resized


class BinaryKDLoss(LogitLoss):
    r"""Knowledge distillation of independent classes, for several labels per image or one logit.

    .. math::
        L = T^2 \, \frac{1}{B K} \sum_{b, k} \mathrm{KL}\big( (p^T_{bk}, 1 - p^T_{bk}) \,\|\,
            (p^S_{bk}, 1 - p^S_{bk}) \big), \quad p_{bk} = \sigma(z_{bk} / T)

    Use it where you train with binary cross-entropy, and :class:`KDLoss` where you train with
    cross-entropy. It takes logits ``[B, K]`` and class maps ``[B, K, H, W]``, as for masks that
    overlap, with one class or more. The teacher's map is interpolated to the size of the student's.
    It needs no labels. See :func:`kdlayers.functional.binary_kd`.

    Args:
        temperature: above 0. Default 1.
        weight, at, name, teacher_index: as for :class:`~kdlayers.DistillLoss`. The default weight
            of 1 is our choice, beside the mean of ``binary_cross_entropy_with_logits``.

    Raises:
        ArgumentError: if ``temperature`` is not above 0.
        ArgumentTypeError: if ``temperature`` is not a number.
        ShapeError: at the call, if the tensors are not logits of one shape, or class maps of the
            same images and classes.

    References:
        P. Yang et al., "Multi-Label Knowledge Distillation", ICCV 2023, multi-label logits
        distillation. The mean over classes and the temperature are ours.

    Example:
        >>> import torch
        >>> loss = BinaryKDLoss(weight=0.5)
        >>> loss(torch.tensor([[2.0, -1.0, 0.5]]), torch.tensor([[6.0, 1.0, -2.0]]))
        tensor(0.3753)
    """

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

    def build(self, student: Tensor, teacher: Tensor) -> None:
        """Check the shapes of a dry run: logits, or class maps of any size."""
        if check.is_map(student) or student.shape[1:] == (1,):
            independent(student, teacher, sized=False)
        else:
            super().build(student, teacher)

    def forward(self, student: Tensor, teacher: Tensor, targets: Tensor | None = None) -> Tensor:  # noqa: ARG002
        """The mean divergence for logits ``[B, K]`` or class maps; the labels are not used."""
        if check.is_map(student):
            independent(student, teacher, sized=False)
            teacher = resized(teacher, student)
        return binary_kd(student, teacher, temperature=self.temperature)

    def extra_repr(self) -> str:
        """Shows temperature, weight and at."""
        return f"temperature={self.temperature}, {super().extra_repr()}"
