"""A term of the loss: a `DistillLoss` together with the tensors it reads."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kdlayers._models.layouts import Layout, common_size, pool
from kdlayers._models.trace import Trace
from kdlayers._step.hooks import score_key, templates_of
from kdlayers._step.teacher import Taught, Teacher, logits_of, mean_logits
from kdlayers.errors import ArgumentError
from kdlayers.losses import DistillLoss, TemplateLoss


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
    positions: int = 1
    """Positions of the student at this point, for images of the size of the example."""

    @property
    def key(self) -> str | None:
        """Key of the student's tensor on the tape; None for the logits."""
        if self.point is None:
            return None
        return score_key(self.point) if self.scores else self.point

    def reads(self, teacher: int) -> bool:
        """Whether the loss needs the features of the teacher of this index."""
        return self.tap is not None and teacher == (self.teacher_index or 0)

    def reads_logits(self, teacher: int) -> bool:
        """Whether the loss needs the logits of the teacher of this index."""
        return self.tap is None and self.teacher_index in (None, teacher)

    def teacher_tensor(self, teachers: Sequence[Teacher], taught: Sequence[Taught]) -> Tensor:
        """The teacher's tensor in its own layout, from what the teachers returned."""
        if self.tap is not None:
            return taught[self.teacher_index or 0][1][self.tap]
        if self.teacher_index is not None:
            return logits_of(taught[self.teacher_index])
        return mean_logits(teachers, taught)

    def pair(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Both tensors as the loss reads them: on one grid, and on the student's device."""
        teacher = teacher.to(student.device)
        if self.student_layout is None or self.teacher_layout is None:
            return student, teacher
        if student.shape[0] != teacher.shape[0]:
            return student, teacher  # the loss or the handle says what is wrong
        if self._classifiers:
            return student, teacher
        ours, theirs = self.student_layout.to_grid(student), self.teacher_layout.to_grid(teacher)
        size = common_size(_size(ours), _size(theirs))
        return self._form(pool(ours, size)), self._form(pool(theirs, size))

    def value(
        self,
        student: Tensor,
        teacher: Tensor,
        targets: Tensor | None,
        features: dict[str, Tensor],
    ) -> Tensor:
        """The loss; ``features`` has the templates where ``student`` are the unit vectors."""
        student, teacher = self.pair(student, teacher)
        templates = features.get(templates_of(self.key)) if self.key is not None else None
        # Scores are linear in the unit vectors, so pooling the latter has pooled them.
        extra = {} if templates is None else {"templates": templates}
        value: Tensor = self.loss(student, teacher, targets, **extra)
        return value

    @property
    def _classifiers(self) -> bool:
        """Whether class scores are compared, which stay as they are, and not maps."""
        layouts = (self.student_layout, self.teacher_layout)
        return self.loss.on_logits and all(y is not None and y.kind == "vector" for y in layouts)

    def teacher_alone(self, teacher: Tensor) -> Tensor:
        """The teacher's tensor as the loss reads it, for `fit`, where no student runs."""
        if self.teacher_layout is None or self._classifiers:
            return teacher
        grid = self.teacher_layout.to_grid(teacher)
        height, width = _size(grid)
        size = (max(1, round(height * self.shrink[0])), max(1, round(width * self.shrink[1])))
        return self._form(pool(grid, size))

    def _form(self, grid: Tensor) -> Tensor:
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
    return term.pair(_empty(student, term.point), _empty(teacher, term.tap))


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
class Inputs:
    """What the terms of one batch are computed from: a pair of tensors and a weight for each."""

    pairs: list[tuple[Tensor, Tensor]]
    weights: list[Tensor]
    targets: Tensor | None
    features: dict[str, Tensor]


def weighted_sum(terms: Sequence[Term], inputs: Inputs) -> tuple[Tensor, dict[str, Tensor]]:
    """The loss, and every value by its key in ``kd.terms``; what torch.compile makes graphs of."""
    total = torch.zeros((), device=inputs.pairs[0][0].device)
    logged: dict[str, Tensor] = {}
    for term, pair, weight in zip(terms, inputs.pairs, inputs.weights, strict=True):
        value = term.value(*pair, inputs.targets, inputs.features)
        weighted = weight.to(value.dtype) * value
        total = total + weighted
        _log(logged, term, value.detach(), weighted.detach())
    logged["total"] = total.detach()
    return total, logged


def _log(logged: dict[str, Tensor], term: Term, value: Tensor, weighted: Tensor) -> None:
    """Add the entries of a term to ``logged``: its value, its weighted value, its metrics.

    Raises:
        ArgumentError: if a key is taken, by a metric that the loss had not announced.
    """
    entries = {f"{term.name}.{name}": metric for name, metric in term.loss.metrics().items()}
    own = {term.name: value, f"{term.name}.weighted": weighted}
    taken = (entries.keys() & own.keys()) | ((entries.keys() | own.keys()) & logged.keys())
    if taken:
        raise ArgumentError(
            f"two values would be logged as {min(taken)!r} in kd.terms: a loss's name together "
            "with a metric is the name of another term; give one of the losses another name=..."
        )
    logged |= own
    logged |= entries
