"""Knowledge distillation by softened logits, as a loss."""

from torch import Tensor

from kdlayers.functional import _checks as check
from kdlayers.functional import kd
from kdlayers.functional._checks import Reduction
from kdlayers.functional._kd import standardized_kd
from kdlayers.functional._standardize import warn_of_signs
from kdlayers.losses._base import LogitLoss, Weight
from kdlayers.losses._class_maps import counted, mean_where, resized


class KDLoss(LogitLoss):
    r"""Knowledge distillation by softened logits (Hinton, Vinyals, Dean, 2015).

    .. math::
        L = T^2 \, \mathrm{KL}\big(\mathrm{softmax}(z^T / T) \,\|\, \mathrm{softmax}(z^S / T)\big)

    The loss is summed over classes and averaged over samples; see :func:`kdlayers.functional.kd`.
    Class maps ``[B, K, H, W]`` of segmentation models are compared at every pixel and averaged over
    the pixels. The teacher's map is interpolated to the size of the student's; with ``at``, both
    are averaged to the smaller grid before, as the maps of every named point. If labels are given,
    pixels with the label ``ignore_index`` are ignored. The loss does not detach the teacher, so
    that a trainable teacher side gets its gradient, as in
    :class:`~kdlayers.losses.StudentFriendlyKDLoss`; :func:`kdlayers.attach_kd` runs the teacher
    without gradients.

    Args:
        temperature: above 0. Default 4, usual for CIFAR-100; 1 is usual for ImageNet.
        standardize: standardise the logits of both first, by
            :func:`kdlayers.functional.standardize` (Sun et al., CVPR 2024). Default False. Its
            authors use a temperature of 2 and a weight of 9 with it.
        ignore_index: label of the pixels to ignore, as in
            :func:`torch.nn.functional.cross_entropy`; used with class maps only. Default -100; 255
            is usual for segmentation data.
        weight, at, name, teacher_index: as for :class:`~kdlayers.DistillLoss`. A usual weight on
            CIFAR-100 is 0.9, with 0.1 times the cross-entropy.

    Raises:
        ArgumentError: if ``temperature`` is not above 0.
        ArgumentTypeError: if ``temperature`` is not a number, or ``ignore_index`` not an integer.
        ShapeError: at the call, if the tensors are not logits of one shape ``[B, K]`` or class maps
            of the same images and classes, or the labels of class maps are not ``[B, H, W]``.

    Warns:
        KDLayersWarning: at the call, with ``standardize=True`` and two classes, whose standardised
            logits have no gradient.

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
        standardize: bool = False,
        ignore_index: int = -100,
        weight: Weight = 1.0,
        at: str | tuple[str, str] | None = None,
        name: str | None = None,
        teacher_index: int | None = None,
    ) -> None:
        super().__init__(weight=weight, at=at, name=name, teacher_index=teacher_index)
        self.temperature = check.positive("temperature", temperature)
        self.standardize = standardize
        self.ignore_index = check.integer("ignore_index", ignore_index)

    def build(self, student: Tensor, teacher: Tensor) -> None:
        """Check the shapes of a dry run: logits, or class maps of any size."""
        if check.is_map(student):
            check.class_maps(student, teacher, sized=False)
        else:
            super().build(student, teacher)

    def forward(self, student: Tensor, teacher: Tensor, targets: Tensor | None = None) -> Tensor:
        """The divergence for logits ``[B, K]``, or for maps, whose labels mark ignored pixels."""
        if not check.is_map(student):
            return self._divergence(student, teacher, "mean")
        check.class_maps(student, teacher, sized=False)
        teacher = resized(teacher, student)
        if targets is None:
            return self._divergence(student, teacher, "mean")
        counts = counted(targets, student, self.ignore_index)
        return mean_where(self._divergence(student, teacher, "none"), counts)

    def _divergence(self, student: Tensor, teacher: Tensor, reduction: Reduction) -> Tensor:
        if self.standardize:
            warn_of_signs(student)
            return standardized_kd(student, teacher, self.temperature, reduction)
        return kd(student, teacher, temperature=self.temperature, reduction=reduction)

    def extra_repr(self) -> str:
        """Shows temperature, weight and at."""
        extra = ", standardize=True" if self.standardize else ""
        return f"temperature={self.temperature}{extra}, {super().extra_repr()}"
