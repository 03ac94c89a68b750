"""Converts the user's ``at`` to points with names, targets and numbers of templates."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeAlias

from torch import nn

from kdlayers._attaching.points import KDPoint
from kdlayers._models.names import is_glob
from kdlayers._models.trace import Trace
from kdlayers._targets import CodebookTargets, DecisionTargets, TemplateTargets
from kdlayers.errors import ArgumentError, ArgumentTypeError

At: TypeAlias = str | KDPoint | Mapping[str, str] | Sequence[str | KDPoint]


def resolve_points(at: At, student: Trace, teacher: Trace | None) -> list[KDPoint]:
    """Points in the student's forward order, complete with targets and numbers of templates.

    Raises:
        NoMatchError: if a name matches nothing.
        ArgumentError: if a point is given twice, or numbers do not fit together.
        ArgumentTypeError: if ``at`` has an unsupported type.
    """
    points = [p for item in _items(at) for p in _named(item, student, teacher)]
    names = [point.student for point in points]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ArgumentError(f"at names {twice} more than once; a point takes one KD layer")
    points.sort(key=lambda point: student.call(point.student).order)
    if teacher is None:
        return [_without_teacher(point) for point in points]
    shared = [p.targets for p in points if p.targets is not None]
    if len({id(targets) for targets in shared}) < len(shared):
        raise ArgumentError("two points share one targets object; make one for each point")
    last = len(points) - 1
    # The labels are those of the student's task; the teacher may know other classes.
    classes = _classes(student) or _classes(teacher)
    return [_with_targets(p, i == last, classes) for i, p in enumerate(points)]


def _items(at: At) -> list[KDPoint]:
    if isinstance(at, (str, KDPoint)):
        at = [at]
    if isinstance(at, Mapping):
        return [KDPoint(ours, theirs) for ours, theirs in at.items()]
    if isinstance(at, nn.Module) or not isinstance(at, Sequence):
        raise ArgumentTypeError(
            f"at must be names, a dict {{student: teacher}} or KDPoints, got {type(at).__name__}"
        )
    items = []
    for item in at:
        if not isinstance(item, (str, KDPoint)):
            raise ArgumentTypeError(
                f"at holds a {type(item).__name__}; give module names, as find_points(student) "
                "lists them, or KDPoint(student, teacher)"
            )
        items.append(KDPoint(item) if isinstance(item, str) else item)
    return items


def _named(point: KDPoint, student: Trace, teacher: Trace | None) -> list[KDPoint]:
    """The point with full names; one point for each name that matches a glob."""
    found = student.find(point.student, _student_advice(point, teacher))
    if len(found) > 1 and (point.targets is not None or point.teacher is not None):
        raise ArgumentError(
            f"KDPoint({point.student!r}) matches {found}, but has one teacher point or one set "
            "of targets; give a KDPoint for each"
        )
    points = []
    for name in found:
        theirs = name if point.teacher is None else point.teacher
        if teacher is not None:
            theirs = _teacher_name(theirs, name, point, teacher)
        points.append(replace(point, student=name, teacher=theirs))
    return points


def _teacher_name(theirs: str, ours: str, point: KDPoint, teacher: Trace) -> str:
    advice = "" if point.teacher is not None else _pair_advice(ours)
    found = teacher.find(theirs, advice)
    if len(found) > 1 or (is_glob(theirs) and point.teacher is not None):
        raise ArgumentError(
            f"the teacher's point for {ours!r} must be one name, but {theirs!r} is a glob for "
            f"{found}"
        )
    teacher.call(found[0])
    return found[0]


def _student_advice(point: KDPoint, teacher: Trace | None) -> str:
    """For a single name that only the teacher has."""
    if teacher is None or point.teacher is not None or point.student not in teacher.names:
        return ""
    both = f"'name in the student': {point.student!r}"
    return f"; the teacher has {point.student!r}: give both names, as in at={{{both}}}"


def _pair_advice(ours: str) -> str:
    return (
        f"; a single name is used for both models: if the teacher's name differs, give both, as "
        f"in at={{{ours!r}: 'name in the teacher'}} or KDPoint({ours!r}, 'name in the teacher')"
    )


def _without_teacher(point: KDPoint) -> KDPoint:
    needed = None if point.targets is None else point.targets.num_templates
    if needed is not None:
        return replace(point, num_templates=_same_number(point, needed))
    if point.num_templates is None:
        raise ArgumentError(
            f"without a teacher the number of templates at {point.student!r} is unknown; pass "
            f"KDPoint({point.student!r}, num_templates=...)"
        )
    return point


def _classes(model: Trace) -> int | None:
    clear = model.unclear is None and model.logits.dim() == 2
    return model.logits.shape[1] if clear else None


def _with_targets(point: KDPoint, last: bool, classes: int | None) -> KDPoint:
    targets = point.targets or _default_targets(point, last, classes)
    if isinstance(targets, DecisionTargets) and targets.num_classes is None:
        targets.num_classes = classes
    needed = targets.num_templates
    if needed is None:
        raise ArgumentError(
            f"the number of classes at {point.student!r} is unknown, because the output of student "
            "and teacher is not [batch, classes]; pass DecisionTargets(num_classes=...)"
        )
    return replace(point, targets=targets, num_templates=_same_number(point, needed))


def _same_number(point: KDPoint, needed: int) -> int:
    if point.num_templates not in (None, needed):
        raise ArgumentError(
            f"KDPoint({point.student!r}) has num_templates={point.num_templates}, but its targets "
            f"have {needed}; leave num_templates out"
        )
    return needed


def _default_targets(point: KDPoint, last: bool, classes: int | None) -> TemplateTargets:
    asked = point.num_templates
    if last:
        return CodebookTargets() if asked is None else CodebookTargets(asked)
    if asked is None:
        return DecisionTargets()
    if classes is None or asked % classes:
        raise ArgumentError(
            f"KDPoint({point.student!r}): {asked} templates cannot be divided evenly among "
            f"{classes} classes; pass targets=DecisionTargets(subclasses) or "
            f"CodebookTargets({asked})"
        )
    return DecisionTargets(asked // classes)
