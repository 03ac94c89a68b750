"""The terms of the loss, the tensors that they read, and their weighted sum."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias
from weakref import ref

import torch
from torch import Tensor, nn

from kdlayers._models.examples import image_size
from kdlayers._models.layouts import Layout, Size, common_size, pool
from kdlayers._models.vectors import Vectors
from kdlayers._step.tape import Forward, Wanted
from kdlayers._step.teacher import Taught, Teacher
from kdlayers._utils.torch_internals import plain
from kdlayers._utils.tree import leaves
from kdlayers.errors import ArgumentError, ArgumentTypeError
from kdlayers.functional._checks import NARROW, work_dtype
from kdlayers.losses import DistillLoss, TemplateLoss

_SOURCE = "_kd_source"

Shapes: TypeAlias = tuple[tuple[int, ...], ...]
"""Shapes of all tensors among a model's inputs, without the batch."""


class Source:
    """The teacher and the point that ``kd.fit`` fitted a module to; copies forget them."""

    def __init__(self, model: Callable[[], nn.Module | None], tap: str | None) -> None:
        self.model = model
        self.tap = tap

    def __reduce__(self) -> tuple[Any, ...]:
        return _no_source, ()


def _no_source() -> None:
    return None


@dataclass
class Term:
    """One loss, and which tensors of the student and the teacher it compares.

    If ``point`` is None, the loss compares logits. Otherwise it compares features at ``point``:
    the scores of the KD layer if ``scores`` is True, with channels last, or the features that the
    next module receives, as maps ``[B, C, H, W]``. If ``teacher_index`` is None, the loss reads the
    mean of all teachers' logits, or the first teacher's features.
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
    """Height and width of the pooled teacher grid, relative to the teacher's own grid, for the
    example; only an estimate for images of other sizes, where grids may round differently."""
    example: Shapes = ()
    """Shapes of the example."""
    example_grid: Size = (1, 1)
    """The student's grid at this point, for the example."""
    readers: tuple[Vectors, Vectors] | None = None
    """Readers of the student's and the teacher's vectors, if the loss does not compare maps."""
    positions: int = 1
    """Positions of the student at this point, for images of the size of the example."""

    on_grid: bool = field(init=False)
    """Whether the loss compares maps position by position, rather than logits or vectors."""
    channels: list[int] = field(init=False)
    """The axes of the channels in the student's map and the teacher's."""
    place: tuple[torch.device, bool] | None = field(default=None, init=False)
    """Device of the student's tensor in the last step, and whether it was float64."""

    def __post_init__(self) -> None:
        layouts = [y for y in (self.student_layout, self.teacher_layout) if y is not None]
        class_scores = self.loss.on_logits and all(y.kind == "vector" for y in layouts)
        self.on_grid = len(layouts) == 2 and self.readers is None and not class_scores
        self.channels = [y.channel_dim for y in layouts]

    def value(
        self, student: Tensor, teacher: Tensor, targets: Tensor | None, templates: Tensor | None
    ) -> Tensor:
        """The value of the loss; with ``templates``, ``student`` holds unit vectors."""
        student, teacher = self.pair(student, teacher)
        # Scores are linear in the unit vectors, so pooling the vectors pools the scores.
        given = {} if templates is None else {"templates": templates}
        value = self.loss(student, teacher, targets, **given)
        if not isinstance(value, Tensor):
            raise self.unusable(f"a {type(value).__name__}")
        if value.dim():
            raise self.unusable(f"a tensor of shape {list(value.shape)}")
        return value

    def unusable(self, found: str) -> ArgumentTypeError:
        """The error for a loss whose forward returned ``found``."""
        return ArgumentTypeError(
            f"{self.name}: the forward of {type(self.loss).__name__} returned {found}; return a "
            "scalar tensor with a gradient, such as (student - teacher).square().mean()"
        )

    def without_gradient(self) -> ArgumentTypeError:
        """The error for a loss that trains nothing."""
        return self.unusable(
            "a value that does not depend on the student, as after detach() or item(), so it would "
            "train nothing (a loss that is only logged needs weight=0)"
        )

    def pair(self, student: Tensor, teacher: Tensor) -> tuple[Tensor, Tensor]:
        """Bring both tensors to the same grid and device, and to float64 if the student has it."""
        double = student.dtype == torch.float64 and teacher.is_floating_point()
        teacher = teacher.to(student.device, torch.float64 if double else None)
        ours, theirs = self.student_layout, self.teacher_layout
        if not self.on_grid or ours is None or theirs is None:
            return student, teacher
        if student.shape[0] != teacher.shape[0]:
            return student, teacher  # the loss or the handle raises the error
        if student.dim() == teacher.dim() == 4:  # maps, or tokens that form a grid already
            left = student.movedim(self.channels[0], -1)
            right = teacher.movedim(self.channels[1], -1)
        else:
            left, right = ours.to_grid(student), theirs.to_grid(teacher)
        if left.shape[1:3] != right.shape[1:3]:
            size = common_size(size_of(left), size_of(right))
            left, right = pool(left, size), pool(right, size)
        if self.scores:
            return left, right
        return left.movedim(-1, 1), right.movedim(-1, 1)

    def remember(self, teachers: Sequence[Teacher]) -> None:
        """Remember that ``kd.fit`` has just fitted this term to its teacher."""
        setattr(self._learner, _SOURCE, Source(ref(self._model(teachers)), self.tap))

    def learnt_elsewhere(self, teachers: Sequence[Teacher]) -> str | None:
        """Description of another teacher or point that an earlier ``kd.fit`` fitted this term to.

        None if there is none, or if the user fitted or loaded the targets.
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
        """The fitted module, targets or loss; the user may pass it to another `attach_kd`."""
        targets = self.loss.template_targets if isinstance(self.loss, TemplateLoss) else None
        return self.loss if targets is None else targets

    def _model(self, teachers: Sequence[Teacher]) -> nn.Module:
        return teachers[self.teacher_index or 0].model

    def teacher_alone(self, teacher: Tensor, ours: Size | None) -> Tensor:
        """The teacher's tensor as the loss reads it, for `fit`; ``ours`` is the student's grid."""
        if not self.on_grid or self.teacher_layout is None:
            return teacher
        grid = self.teacher_layout.to_grid(teacher)
        grid = pool(grid, self.compared(size_of(grid), ours))
        return grid if self.scores else grid.movedim(-1, 1)

    def compared(self, theirs: Size, ours: Size | None) -> Size:
        """The grid on which the loss compares a teacher's grid and the student's, if known."""
        if ours is not None:
            return common_size(ours, theirs)
        height, width = (n * part for n, part in zip(theirs, self.shrink, strict=True))
        return max(1, round(height)), max(1, round(width))

    def student_grid(self, forward: Forward) -> Size | None:
        """The student's own grid in a forward; None if the loss compares no maps."""
        if not self.on_grid or self.student_layout is None or self.point is None:
            return None
        recorded = forward.scores[self.point][0] if self.scores else forward.features[self.point]
        image = image_size((forward.args, forward.kwargs))
        return size_of(self.student_layout.to_grid(recorded, image))


def size_of(grid: Tensor) -> Size:
    """Rows and columns of a grid ``[B, H, W, C]``."""
    return grid.shape[1], grid.shape[2]


def shapes_of(inputs: Any) -> Shapes:
    """Shapes of all tensors in ``inputs``, without the batch."""
    return tuple(tuple(tensor.shape[1:]) for _, tensor in leaves(inputs))


@dataclass
class Pair:
    """The tensors of one term in one batch, and its weight (a tensor under torch.compile)."""

    student: Tensor
    templates: Tensor | None
    teacher: Tensor
    weight: float | Tensor


class Plan:
    """What a list of terms reads from the student's forward and from each teacher's forward."""

    def __init__(self, terms: Sequence[Term], teachers: Sequence[Teacher]) -> None:
        self.terms = list(terms)
        self.teachers = list(teachers)
        self.recorded: dict[tuple[Any, ...], tuple[Plan, list[str], Any]] = {}
        """The same terms as they read a record, the fields that they read, and the open record, by
        the record's tag and the student's grids."""
        self.taps: list[list[str]] = [[] for _ in teachers]
        self.logits = [False] * len(teachers)
        for term in terms:
            index = term.teacher_index or 0
            if term.tap is None and term.teacher_index is None:
                self.logits = [True] * len(teachers)
            elif term.tap is None:
                self.logits[index] = True
            elif term.tap not in self.taps[index]:
                self.taps[index].append(term.tap)
        points = [(term.point, term.scores) for term in terms if term.point is not None]
        self.wanted = Wanted(
            scores=tuple(dict.fromkeys(point for point, scores in points if scores)),
            features=tuple(dict.fromkeys(point for point, scores in points if not scores)),
            logits=any(term.point is None for term in terms),
        )

    def teach(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], autocast: torch.dtype | None = None
    ) -> list[Taught]:
        """Run every teacher, only as deep as the terms need."""
        taught = []
        for teacher, taps, logits in zip(self.teachers, self.taps, self.logits, strict=True):
            taught.append(teacher.run(args, kwargs, taps, autocast, logits=logits))
        return taught

    def of_teachers(self, taught: Sequence[Taught]) -> list[Tensor]:
        """The teacher's tensor for each term, in the teacher's layout, or as vectors."""
        found: list[Tensor] = []
        mean: Tensor | None = None
        for term in self.terms:
            logits, features = taught[term.teacher_index or 0]
            if term.tap is not None:
                reader = None if term.readers is None else term.readers[1]
                found.append(
                    features[term.tap] if reader is None else reader.of_taps(features, term.tap)
                )
            elif term.teacher_index is not None or len(taught) == 1:
                found.append(logits)  # type: ignore[arg-type]  # asked for in `teach`
            else:
                mean = self._mean_logits(taught) if mean is None else mean
                found.append(mean)
        return found

    def pairs(
        self, forward: Forward, logits: Tensor, teachers: Sequence[Tensor], step: int
    ) -> list[Pair]:
        """The tensors and the weight of each term; moves the losses to the student's device.

        ``teachers`` holds the teacher's tensor for each term, as `of_teachers` returns them.
        """
        pairs = []
        for term, teacher in zip(self.terms, teachers, strict=True):
            student, templates = logits, None
            if term.point is not None and term.scores:
                student, templates = forward.scores[term.point]
            elif term.point is not None:
                student = forward.features[term.point]
            if term.readers is not None:
                student = term.readers[0](student, image_size((forward.args, forward.kwargs)))
            elif term.student_layout is not None and term.student_layout.kind == "tokens":
                image = image_size((forward.args, forward.kwargs))
                student = term.student_layout.on_grid(student, image)
            if type(student) is not Tensor:
                student = plain(student)
            place = (student.device, student.dtype == torch.float64)
            if term.place != place:
                was_double = term.place is not None and term.place[1]
                follow(term.loss, *place, was_double)
                term.place = place
            pairs.append(Pair(student, templates, teacher, term.loss.weight_at(step)))
        return pairs

    def _mean_logits(self, taught: Sequence[Taught]) -> Tensor:
        """The weighted mean of the teachers' logits, in float32 or better."""
        parts: list[Tensor] = []
        for teacher, (logits, _) in zip(self.teachers, taught, strict=True):
            if logits is not None:  # asked for in `teach`
                device = parts[0].device if parts else logits.device
                parts.append(teacher.weight * logits.to(device, work_dtype(logits)))
        return torch.stack(parts).sum(0)


def follow(loss: nn.Module, device: torch.device, double: bool, was_double: bool) -> None:
    """Move the loss to the student's device, and to float64 and back with a student in float64.

    Losses compute in float32 for all other dtypes. Parameters keep their identity for the
    optimiser.
    """
    tensors = (*loss.parameters(), *loss.buffers())
    floats = [tensor for tensor in tensors if tensor.is_floating_point()]
    if any(tensor.device != device for tensor in tensors):
        loss.to(device)
    if double and any(tensor.dtype != torch.float64 for tensor in floats):
        loss.to(torch.float64)
    elif was_double and not double:
        loss.to(torch.float32)


class _Nothing(torch.autograd.Function):
    """The number 0, which depends on a tensor and gives it no gradient."""

    @staticmethod
    def forward(tensor: Tensor) -> Tensor:
        return tensor.new_zeros(())

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        pass  # torch.func needs it

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Any) -> None:  # noqa: ARG004
        return None


def _nothing(term: Term, pair: Pair, value: Tensor) -> Tensor:
    """The value times a weight of 0; exactly 0, where 0 times an infinite value would be NaN."""
    zero: Tensor = _Nothing.apply(pair.student).to(value)
    return sum((p.flatten()[:0].sum().to(value) for p in term.loss.parameters()), zero)


def weighted_sum(
    terms: Sequence[Term], pairs: Sequence[Pair], targets: Tensor | None
) -> tuple[Tensor, dict[str, Tensor], list[str]]:
    """The loss, all values by their keys in ``kd.terms``, and the terms without a gradient.

    torch.compile compiles this, so weights are not compared here.
    """
    total: Tensor | None = None
    logged: dict[str, Tensor] = {}
    constant: list[str] = []
    for term, pair in zip(terms, pairs, strict=True):
        value = term.value(pair.student, pair.teacher, targets, pair.templates)
        if not value.requires_grad:
            constant.append(term.name)
        weight = pair.weight
        if isinstance(weight, Tensor):
            factor = weight.to(value)
            weighted = torch.where(factor != 0, value * factor, 0.0)
        else:
            weighted = value * weight if weight else _nothing(term, pair, value)
        if weighted.dtype in NARROW:
            weighted = weighted.float()
        total = weighted if total is None else total + weighted
        entries = [(term.name, value.detach()), (f"{term.name}.weighted", weighted.detach())]
        entries += [(f"{term.name}.{name}", metric) for name, metric in term.loss.metrics().items()]
        for key, number in entries:
            if key in logged:  # the loss did not list this metric in metric_names
                raise ArgumentError(
                    f"two values have the key {key!r} in kd.terms: the name of a loss and its "
                    "metric together equal the name of another term; give one of the losses "
                    "another name=..."
                )
            logged[key] = number
    if total is None:
        raise ArgumentError("there is no term to sum")
    logged["total"] = total.detach()
    return total, logged, constant
