"""Creates the terms in `attach_kd`: what each one compares, on which grid, and its name."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kdlayers._models.layouts import common_size
from kdlayers._models.trace import Trace
from kdlayers._models.vectors import vectors
from kdlayers._step.teacher import Teacher
from kdlayers._step.terms import Term, shapes_of, size_of
from kdlayers.errors import ArgumentError
from kdlayers.losses import DistillLoss, TemplateLoss


def feature_term(
    name: str,
    loss: DistillLoss,
    student: Trace,
    teachers: Sequence[Teacher],
    point: str,
    tap: str,
) -> Term:
    """The term of a loss that compares the features at ``point`` and ``tap``."""
    teacher = teachers[loss.teacher_index or 0].traced
    ours, theirs = student.layout(point), teacher.layout(tap)
    our_size = size_of(ours.to_grid(_empty(student, point)))
    their_size = size_of(theirs.to_grid(_empty(teacher, tap)))
    small = common_size(our_size, their_size)
    return Term(
        name,
        loss,
        loss.teacher_index,
        point,
        tap,
        scores=isinstance(loss, TemplateLoss),
        student_layout=ours,
        teacher_layout=theirs,
        shrink=(small[0] / their_size[0], small[1] / their_size[1]),
        example=shapes_of(student.example or ()),
        example_grid=our_size,
        readers=None
        if loss.tokens == "patch"
        else vectors(loss.tokens, student, point, teacher, tap),
        positions=our_size[0] * our_size[1] + ours.prefix,
    )


def example_pair(term: Term, student: Trace, teachers: Sequence[Teacher]) -> tuple[Tensor, Tensor]:
    """Tensors for `DistillLoss.build`, with the shapes that the dry runs recorded."""
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
    """Check that all keys of ``kd.terms`` are distinct.

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
