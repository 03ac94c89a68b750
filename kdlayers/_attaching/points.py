"""Points: where in student and teacher a KD layer and its supervision are."""

from dataclasses import dataclass, field

from kdlayers._targets import TemplateTargets
from kdlayers.errors import ArgumentTypeError
from kdlayers.functional import _checks as check
from kdlayers.losses._base import Weight, check_weight


@dataclass(frozen=True)
class KDPoint:
    """A KD layer at one module of the student, supervised from one module of the teacher.

    Args:
        student: name of the student's module after which the layer goes.
        teacher: name of the teacher's module that supervises it; default: the student's name.
        targets: :class:`~kdlayers.CodebookTargets` or :class:`~kdlayers.DecisionTargets`. Default:
            ``CodebookTargets()`` at the last point in forward order, ``DecisionTargets()`` before.
        num_templates: number of templates K, 1 or more; default: what the targets need.
        alpha: value ratio, the factor of what the layer adds to the features, 0 or more. Default 1,
            as in all but one of the authors' configurations. With 0 the features do not change, and
            the loss still acts.
        weight: factor of the point's :class:`~kdlayers.losses.TemplateLoss` in ``kd.loss``: a
            number or a function of the step, such as those of :mod:`kdlayers.schedules`. Default 1,
            as in the authors' code. Without a teacher there is no such loss.

    Raises:
        ArgumentTypeError: if a name is not a string, ``targets`` are not template targets,
            ``num_templates`` or ``alpha`` is not a number, or ``weight`` is neither a number nor
            callable.
        ArgumentError: if ``num_templates`` is below 1, or ``alpha`` or ``weight`` is negative.

    Example:
        >>> from kdlayers import CodebookTargets, KDPoint
        >>> point = KDPoint("layer4", "stages.3", targets=CodebookTargets(512))
        >>> point.student, point.teacher, point.alpha
        ('layer4', 'stages.3', 1.0)
    """

    student: str
    teacher: str | None = None
    targets: TemplateTargets | None = field(default=None, kw_only=True)
    num_templates: int | None = field(default=None, kw_only=True)
    alpha: float = field(default=1.0, kw_only=True)
    weight: Weight = field(default=1.0, kw_only=True)

    def __post_init__(self) -> None:
        for label, name in (("student", self.student), ("teacher", self.teacher)):
            if not isinstance(name, str) and not (label == "teacher" and name is None):
                raise ArgumentTypeError(
                    f"KDPoint: {label} must be a module's name, got {type(name).__name__}"
                )
        if self.targets is not None and not isinstance(self.targets, TemplateTargets):
            raise ArgumentTypeError(
                "KDPoint: targets must be CodebookTargets(...) or DecisionTargets(...), got "
                f"{type(self.targets).__name__}"
            )
        if self.num_templates is not None:
            check.count("num_templates", self.num_templates)
        check.not_negative("alpha", self.alpha)
        check_weight(self.weight)
