"""Template supervision: the loss of the KD layers."""

from typing import Any, ClassVar

from torch import Tensor, nn

from kdlayers._targets import divergence_from
from kdlayers._targets.fitter import Fitter
from kdlayers.errors import ArgumentTypeError, ShapeError
from kdlayers.functional import _checks as check
from kdlayers.functional import template_kl
from kdlayers.losses._base import DistillLoss, Weight


class TemplateLoss(DistillLoss):
    r"""KL divergence of the student's template scores from the teacher's soft assignment.

    .. math::
        L = \frac{1}{BHW} \sum_{i} \mathrm{KL}\big( q_i \,\|\, \mathrm{softmax}(a_i) \big)

    with the scores :math:`a` of a KD layer before its batch norm and :math:`q` from
    :class:`~kdlayers.CodebookTargets` or :class:`~kdlayers.DecisionTargets`. The loss is summed
    over templates and averaged over images and positions; see
    :func:`kdlayers.functional.template_kl`. :func:`kdlayers.attach_kd` uses this loss at its KD
    points. The teacher gets no gradient.

    Both tensors have their channels last and the same positions: ``[B, H, W, K]`` and
    ``[B, H, W, D]``, or ``[N, K]`` and ``[N, D]``.

    Args:
        template_targets: what turns the teacher's features into an assignment. ``None`` (default):
            the second argument of the call already is the assignment.
        weight, at, name: as for :class:`~kdlayers.DistillLoss`; :func:`kdlayers.attach_kd` sets
            them.

    Raises:
        ArgumentTypeError: if ``template_targets`` has no method ``soft_assignment``.
        NotFittedError: at the call, before the targets have been fitted.
        ShapeError: at the call, if positions or the number of templates differ.

    References:
        A. Gorgun, Y. Z. Gurbuz, A. A. Alatan, "Knowledge Distillation Layer that Lets the Student
        Decide", BMVC 2023. Checked against the authors' code.

    Example:
        >>> import torch
        >>> scores, assignment = torch.zeros(2, 4, 4, 8), torch.full((2, 4, 4, 8), 1 / 8)
        >>> TemplateLoss()(scores, assignment)
        tensor(0.)
    """

    detaches_teacher: ClassVar[bool] = True
    template_targets: Any
    """`CodebookTargets`, `DecisionTargets`, a module with ``soft_assignment``, or None."""

    def __init__(
        self,
        *,
        template_targets: nn.Module | None = None,
        weight: Weight = 1.0,
        at: str | tuple[str, str] | None = None,
        name: str | None = None,
    ) -> None:
        super().__init__(weight=weight, at=at, name=name)
        if template_targets is not None and not hasattr(template_targets, "soft_assignment"):
            raise ArgumentTypeError(
                "template_targets must be CodebookTargets(...), DecisionTargets(...) or None, got "
                f"{type(template_targets).__name__}"
            )
        self.template_targets = template_targets

    def forward(
        self,
        student: Tensor,
        teacher: Tensor,
        targets: Tensor | None = None,
        *,
        templates: Tensor | None = None,
    ) -> Tensor:
        """The divergence: scores ``[..., K]``, features ``[..., D]`` at the same positions.

        With ``templates`` ``[K, C]``, ``student`` holds unit vectors ``[..., C]``. Their products
        with the templates are the scores, which are then never stored for all positions.
        """
        check.floats("student", student)
        check.floats("teacher", teacher)
        if student.dim() < 2 or student.shape[:-1] != teacher.shape[:-1]:
            raise ShapeError(
                "student scores [..., templates] and teacher features [..., channels] must have "
                f"the same positions, channels last, got {check.shape(student)} and "
                f"{check.shape(teacher)}; for maps [B, C, H, W] use .movedim(1, -1)"
            )
        teacher, soft = teacher.detach(), self.template_targets
        if soft is None:
            return template_kl(student if templates is None else student @ templates.T, teacher)
        if hasattr(soft, "divergence"):  # the user's own targets need only ``soft_assignment``
            return soft.divergence(student, teacher, targets, templates=templates)  # type: ignore[no-any-return]
        return divergence_from(soft.soft_assignment(teacher, targets), student, templates)

    def fitter(self, *, seed: int = 0) -> Fitter | None:
        """The fitter of the template targets; ``None`` without them."""
        return None if self.template_targets is None else self.template_targets.fitter(seed=seed)

    @property
    def fitted(self) -> bool:
        """Whether the template targets are fitted; True without them."""
        return self.template_targets is None or self.template_targets.fitted
