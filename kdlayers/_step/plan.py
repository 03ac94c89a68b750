"""What the terms read of a batch, asked of each of them once."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kdlayers._models.trace import image_size
from kdlayers._step.tape import Forward, Wanted
from kdlayers._step.teacher import Taught, Teacher
from kdlayers._step.terms import Pair, Term


class Plan:
    """What some terms read of the student's forward, and of one forward of each teacher."""

    def __init__(self, terms: Sequence[Term], teachers: Sequence[Teacher]) -> None:
        self.terms = list(terms)
        self.teachers = list(teachers)
        self.recorded: dict[int, tuple[Plan, Any]] = {}
        """The same terms as they read a record, and the open record, by the record's tag."""
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
        """Run every teacher, no deeper than the terms read."""
        taught = []
        for teacher, taps, logits in zip(self.teachers, self.taps, self.logits, strict=True):
            taught.append(teacher.run(args, kwargs, taps, autocast, logits=logits))
        return taught

    def of_teachers(self, taught: Sequence[Taught]) -> list[Tensor]:
        """The teacher's tensor of each term, in its own layout, or as vectors."""
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
        """What each term compares, with its weight; the losses follow the student's device.

        ``teachers`` holds the teacher's tensor of each term, as `of_teachers` gives them.
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
            place = (student.device, student.dtype == torch.float64)
            if term.place != place:
                _follow(term.loss, *place)
                term.place = place
            pairs.append(Pair(student, templates, teacher, term.loss.weight_at(step)))
        return pairs

    def _mean_logits(self, taught: Sequence[Taught]) -> Tensor:
        """The weighted mean of the teachers' logits."""
        parts: list[Tensor] = []
        for teacher, (logits, _) in zip(self.teachers, taught, strict=True):
            if logits is not None:  # asked for in `teach`
                device = parts[0].device if parts else logits.device
                parts.append(teacher.weight * logits.to(device))
        return torch.stack(parts).sum(0)


def _follow(loss: nn.Module, device: torch.device, double: bool) -> None:
    """Move the loss to the student's device, and to float64 with a student in float64.

    Losses compute in float32 for all other dtypes. Parameters keep their identity for the
    optimiser.
    """
    tensors = (*loss.parameters(), *loss.buffers())
    floats = [tensor for tensor in tensors if tensor.is_floating_point()]
    if any(tensor.device != device for tensor in tensors):
        loss.to(device)
    if double and any(tensor.dtype != torch.float64 for tensor in floats):
        loss.to(torch.float64)
