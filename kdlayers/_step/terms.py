"""A term of the loss: a `DistillLoss` together with the tensors it reads."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from kdlayers._models.layouts import Layout, common_size, pool
from kdlayers._models.trace import Trace
from kdlayers._models.vectors import Vectors, vectors
from kdlayers._step.tape import LOW
from kdlayers._step.teacher import Teacher
from kdlayers.errors import ArgumentError
from kdlayers.losses import DistillLoss, TemplateLoss

_SOURCE = "_kd_source"


class Source:
    """The teacher and its point that ``kd.fit`` has fitted a module to; copies know none."""

    def __init__(self, model: Callable[[], nn.Module | None], tap: str | None) -> None:
        self.model = model
        self.tap = tap

    def __reduce__(self) -> tuple[Any, ...]:
        return _no_source, ()


def _no_source() -> None:
    return None


@dataclass
class Term:
    """One loss, and how its student's and teacher's tensors are taken from a batch.

    With ``point`` None the loss compares logits. Else it compares features at ``point``: the scores
    of the KD layer if ``scores``, with channels last as template losses read them, or the features
    that the next module gets, as maps ``[B, C, H, W]``. With ``teacher_index`` None the teacher is
    the mean of all teachers' logits, or the first one's features.
    """

    name: str
    loss: DistillLoss
    teacher_index: int | None = None
    point: str | None = None
    tap: str | None = None
    scores: bool = False
    student_layout: Layout | None = None
    teacher_layout: Layout | None = None
    shrink: tuple[float, float] = (1.0, 1.0)
    """The pooled teacher grid over the teacher's own, height and width, seen at attach."""
    readers: tuple[Vectors, Vectors] | None = None
    """How the student's and the teacher's vectors are read, where the loss compares no maps."""
    positions: int = 1
    """Positions of the student at this point, for images of the size of the example."""

    place: tuple[torch.device, bool] | None = None
    """Device of the student's tensor that the loss followed last, and whether it was float64."""

    def value(
        self, student: Tensor, teacher: Tensor, targets: Tensor | None, templates: Tensor | None
    ) -> Tensor:
        """The loss; with ``templates``, ``student`` holds the unit vectors that they score."""
        student, teacher = self.pair(student, teacher)
        if templates is None:
            return self.loss(student, teacher, targets)  # type: ignore[no-any-return]
        # Scores are linear in the unit vectors, so pooling the latter has pooled them.
        value: Tensor = self.loss(student, teacher, targets, templates=templates)
        return value

    def pair(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Both tensors as the loss reads them: on one grid, and on the student's device."""
        teacher = teacher.to(student.device)
        ours, theirs = self.student_layout, self.teacher_layout
        if ours is None or theirs is None or self.compares_classes or self.readers is not None:
            return student, teacher
        if student.shape[0] != teacher.shape[0]:
            return student, teacher  # the loss or the handle says what is wrong
        left, right = ours.to_grid(student), theirs.to_grid(teacher)
        if left.shape[1:3] != right.shape[1:3]:
            size = common_size(_size(left), _size(right))
            left, right = pool(left, size), pool(right, size)
        if self.scores:
            return left, right
        return left.movedim(-1, 1), right.movedim(-1, 1)

    def remember(self, teachers: Sequence[Teacher]) -> None:
        """Note that ``kd.fit`` has just fitted this term to its teacher."""
        setattr(self._learner, _SOURCE, Source(ref(self._model(teachers)), self.tap))

    def learnt_elsewhere(self, teachers: Sequence[Teacher]) -> str | None:
        """Of what an earlier ``kd.fit`` fitted this term, if that is something else.

        What was fitted by hand or loaded is what the user wants.
        """
        source: Source | None = getattr(self._learner, _SOURCE, None)
        if source is None or not self.loss.fitted:
            return None
        same = source.model() is self._model(teachers)
        if same and source.tap == self.tap:
            return None
        return f"{source.tap!r} of {'this' if same else 'another'} teacher"

    @property
    def _learner(self) -> nn.Module:
        """What learns, and may be passed to another `attach_kd`: targets, or the loss."""
        targets = self.loss.template_targets if isinstance(self.loss, TemplateLoss) else None
        return self.loss if targets is None else targets

    def _model(self, teachers: Sequence[Teacher]) -> nn.Module:
        return teachers[self.teacher_index or 0].model

    @property
    def compares_classes(self) -> bool:
        """Whether class scores are compared, which stay as they are, and not maps."""
        layouts = (self.student_layout, self.teacher_layout)
        return self.loss.on_logits and all(y is not None and y.kind == "vector" for y in layouts)

    def teacher_alone(self, teacher: Tensor) -> Tensor:
        """The teacher's tensor as the loss reads it, for `fit`, where no student runs."""
        if self.teacher_layout is None or self.compares_classes or self.readers is not None:
            return teacher
        grid = self.teacher_layout.to_grid(teacher)
        height, width = _size(grid)
        size = (max(1, round(height * self.shrink[0])), max(1, round(width * self.shrink[1])))
        grid = pool(grid, size)
        return grid if self.scores else grid.movedim(-1, 1)


def _size(grid: Tensor) -> tuple[int, int]:
    return grid.shape[1], grid.shape[2]


def feature_term(
    name: str,
    loss: DistillLoss,
    student: Trace,
    teachers: Sequence[Teacher],
    point: str,
    tap: str,
) -> Term:
    """Term of a loss that compares the features at ``point`` and ``tap``."""
    term = Term(name, loss, loss.teacher_index, point, tap, scores=isinstance(loss, TemplateLoss))
    teacher = teachers[term.teacher_index or 0].traced
    term.student_layout, term.teacher_layout = student.layout(point), teacher.layout(tap)
    if loss.tokens != "patch":
        term.readers = vectors(loss.tokens, student, point, teacher, tap)
    ours = _size(term.student_layout.to_grid(_empty(student, point)))
    theirs = _size(term.teacher_layout.to_grid(_empty(teacher, tap)))
    term.positions = ours[0] * ours[1] + term.student_layout.prefix
    small = common_size(ours, theirs)
    term.shrink = (small[0] / theirs[0], small[1] / theirs[1])
    return term


def example_pair(term: Term, student: Trace, teachers: Sequence[Teacher]) -> tuple[Tensor, Tensor]:
    """Tensors of the shapes that the loss will get, from the dry runs, for `DistillLoss.build`."""
    teacher = teachers[term.teacher_index or 0].traced
    if term.point is None or term.tap is None:
        return student.logits, teacher.logits
    ours, theirs = _empty(student, term.point), _empty(teacher, term.tap)
    if term.readers is not None:
        ours, theirs = term.readers[0](ours), term.readers[1](theirs)
    return term.pair(ours, theirs)


def _empty(traced: Trace, name: str) -> Tensor:
    call = traced.call(name)
    return torch.zeros(call.shape, dtype=call.dtype, device=call.device)


def unique_names(terms: list[Term]) -> None:
    """Check that nothing in ``kd.terms`` would be logged under the key of something else.

    Raises:
        ArgumentError: if two losses have the same name, or one has the key of another's value.
    """
    taken = {"total": "the sum of all terms"}
    for term in terms:
        keys = {f"{term.name}.weighted": f"the weighted value of {term.name!r}"}
        metrics = term.loss.metric_names
        keys |= {f"{term.name}.{m}": f"the metric {m!r} of {term.name!r}" for m in metrics}
        taken |= keys
    seen: set[str] = set()
    for term in terms:
        if term.name in seen:
            raise ArgumentError(
                f"two losses are called {term.name!r}; give one of them another name=..."
            )
        if term.name in taken:
            raise ArgumentError(
                f"a loss is called {term.name!r}, but kd.terms[{term.name!r}] is "
                f"{taken[term.name]}; give it another name=..."
            )
        seen.add(term.name)


@dataclass
class Pair:
    """What a term compares in one batch, and its weight, which is a tensor under a compiler."""

    student: Tensor
    templates: Tensor | None
    teacher: Tensor
    weight: float | Tensor


def weighted_sum(
    terms: Sequence[Term], pairs: Sequence[Pair], targets: Tensor | None
) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, and every value by its key in ``kd.terms``; what torch.compile makes graphs of."""
    total: Tensor | None = None
    logged: dict[str, Tensor] = {}
    for term, pair in zip(terms, pairs, strict=True):
        value = term.value(pair.student, pair.teacher, targets, pair.templates)
        weight = pair.weight
        weighted = value * (weight.to(value.dtype) if isinstance(weight, Tensor) else weight)
        if weighted.dtype in LOW:
            weighted = weighted.float()
        total = weighted if total is None else total + weighted
        _log(logged, term, value.detach(), weighted.detach())
    if total is None:
        raise ArgumentError("there is no term to sum")
    logged["total"] = total.detach()
    return total, logged


def _log(logged: dict[str, Tensor], term: Term, value: Tensor, weighted: Tensor) -> None:
    """Add the entries of a term to ``logged``: its value, its weighted value, its metrics.

    Raises:
        ArgumentError: if a key is taken, by a metric that the loss had not announced.
    """
    entries = [(term.name, value), (f"{term.name}.weighted", weighted)]
    for name, metric in term.loss.metrics().items():
        entries.append((f"{term.name}.{name}", metric))
    for key, number in entries:
        if key not in logged:
            logged[key] = number
            continue
        raise ArgumentError(
            f"two values would be logged as {key!r} in kd.terms: a loss's name together "
            "with a metric is the name of another term; give one of the losses another name=..."
        )
