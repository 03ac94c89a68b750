"""Points: where in student and teacher a KD layer and its supervision are."""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from kdlayers._models.dependence import ignored
from kdlayers._models.detectors import BACKBONE, inside, is_detector
from kdlayers._models.examples import example_for
from kdlayers._models.trace import Call, trace
from kdlayers._models.wrappers import innermost
from kdlayers._targets import TemplateTargets
from kdlayers._utils.table import table
from kdlayers._utils.torch_internals import is_batch_norm
from kdlayers.errors import ArgumentTypeError, LayoutError
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


@dataclass(frozen=True)
class Candidate:
    """A module that can take a KD layer: its name, output shape (of the example) and layout."""

    name: str
    shape: tuple[int, ...]
    layout: str
    remark: str = field(default="", repr=False)
    """A remark on the candidate; usually empty."""


class Candidates(list[Candidate]):
    """Candidate points in forward order; prints as a table, with the remarks below it."""

    left_out: dict[str, str]
    """Stages and blocks that cannot be points, with the reason."""

    def __repr__(self) -> str:
        rows = [("name", "shape", "layout")]
        rows += [(c.name, "x".join(map(str, c.shape)), c.layout) for c in self]
        lines = [table(rows)]
        lines += [f"{names}: {said}" for said, names in _grouped((c.name, c.remark) for c in self)]
        left_out = getattr(self, "left_out", {})
        lines += [f"not listed, {n}: {said}" for said, n in _grouped(left_out.items())]
        return "\n".join(lines)


def _grouped(remarks: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    """Each sentence once, with its names; of many names only the first and the last."""
    groups: dict[str, list[str]] = {}
    for name, said in remarks:
        if said:
            groups.setdefault(said, []).append(name)
    return [
        (said, ", ".join(names) if len(names) < 4 else f"{names[0]}, ..., {names[-1]}")
        for said, names in groups.items()
    ]


def find_points(model: nn.Module, example: Any = None) -> Candidates:
    """Stages and blocks of ``model`` that can take a KD layer, in forward order.

    Runs the model in eval mode, once plainly and once with gradients, without changing it. A
    candidate has parameters, runs once in a forward and returns features of a known layout. The
    list has stages and blocks, not the modules inside blocks; you can name any other module that
    runs once. Remarks below the table say where the model's output does not depend on a candidate,
    where a later module changes its output in place (a copy is recorded then), and which blocks are
    not listed because their layout is unknown.

    Args:
        model: any ``nn.Module`` that takes images; of a detector of torchvision the points of its
            backbone are listed.
        example: a small batch of images (or a tuple of arguments); default: two zero images of the
            size that the model states, else 224.

    Returns:
        A list of candidates, each with ``.name``, ``.shape``, ``.layout`` and ``.remark``.

    Raises:
        ArgumentError: if the model cannot run on the example.
        ArgumentTypeError: if ``model`` is not a module.

    Example:
        >>> import torch
        >>> from torchvision.models import resnet18
        >>> from kdlayers import find_points
        >>> find_points(resnet18(), torch.zeros(2, 3, 64, 64))[-1]
        Candidate(name='layer4', shape=(2, 512, 2, 2), layout='NCHW')
    """
    if not isinstance(model, nn.Module):
        raise ArgumentTypeError(
            f"find_points(model) takes a torch.nn.Module, got {type(model).__name__}"
        )
    args = example_for(model, example)
    prefix = f"{BACKBONE}." if is_detector(model) else ""
    model = inside(model)
    traced = trace(model, args, "model")
    names = set(_stages_and_blocks(model))
    calls = [call for call in traced.calls.values() if call.name in names]
    unread = ignored(traced, args, [call.name for call in calls])
    found = Candidates()
    found.left_out = {}
    for call in sorted(calls, key=lambda call: call.order):
        if call.calls > 1:
            found.left_out[call.name] = f"it runs {call.calls} times in one forward"
            continue
        if call.shared > 1:
            found.left_out[call.name] = f"it {call.ending}"
            continue
        try:
            layout = traced.layout(call.name)
        except LayoutError as error:
            found.left_out[call.name] = _reason(error, call.name)
            continue
        if layout.kind != "vector":
            remark = _remark(call, call.name in unread)
            found.append(Candidate(prefix + call.name, call.shape, str(layout), remark))
    found.left_out = {prefix + name: said for name, said in found.left_out.items()}
    return found


def _reason(error: LayoutError, name: str) -> str:
    """The error message about ``name``, without the advice to call find_points."""
    said = re.sub(r"(; choose another point)?[;,] find_points\(model\) lists .*", "", str(error))
    return said.replace(repr(name), "this module")


def _remark(call: Call, unread: bool) -> str:
    if unread:
        return (
            "the model's output does not depend on these features, so a KD layer is refused here; "
            "choose an earlier point"
        )
    if call.changed:
        return (
            "a later module changes the features in place, so losses on features record a copy of "
            "them, which takes the memory of one more map"
        )
    return ""


def _stages_and_blocks(model: nn.Module, prefix: str = "") -> Iterator[str]:
    for name, child in innermost(model).named_children():
        child = innermost(child)
        bare = not any(True for _ in child.parameters()) or _depth(child) == 0
        if bare or is_batch_norm(child):
            continue
        yield prefix + name
        if _is_stage(child):
            yield from _stages_and_blocks(child, f"{prefix}{name}.")


def _is_stage(module: nn.Module) -> bool:
    """A container of blocks, or a module that holds such a container."""
    containers = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
    if isinstance(module, containers):
        return any(_depth(child) >= 1 for child in module.children())
    return any(
        any(_depth(part) >= 2 for part in child.children())
        if isinstance(child, containers)
        else _is_stage(child)  # a wrapper, such as the ``encoder`` of Hugging Face's models
        for child in module.children()
    )


def _depth(module: nn.Module) -> int:
    return max((1 + _depth(child) for child in module.children()), default=0)
