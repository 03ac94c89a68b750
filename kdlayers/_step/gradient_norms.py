"""Gradient norms of each term with respect to the parameters that all terms share."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from kdlayers._models.undisturbed import undisturbed
from kdlayers._models.wrappers import sharded
from kdlayers._step.terms import Pair, Term
from kdlayers.errors import ArgumentError, ArgumentTypeError
from kdlayers.functional._checks import work_dtype

TASK = "task"
SCALES = (2.0**15, 2.0**10, 2.0**5, 1.0)
"""Factors of a value before its backward pass; the next one where gradients overflow."""


def gradient_norms(
    student: nn.Module,
    terms: Sequence[Term],
    pairs: Sequence[Pair],
    targets: Tensor | None,
    task: Tensor | None,
) -> dict[str, float]:
    """Gradient norms of all terms by name, unweighted and weighted, and of the task loss.

    Raises:
        ArgumentTypeError: if ``task``, or what a loss returns, is not a scalar tensor with a
            gradient.
        ArgumentError: if a term is called "task", no parameter is shared, or FSDP has sharded the
            student.
    """
    if sharded(student):
        raise ArgumentError(
            "kd.gradient_norms needs one backward pass for each loss, but FSDP has sharded the "
            "student and frees its parameters after the first; call it before fully_shard"
        )
    losses = nn.ModuleList(term.loss for term in terms)
    # Running statistics, counters and random draws are not a step's.
    with undisturbed(losses, evaluate=False):
        found = _found(student, terms, pairs, targets, task)
    shared = [index for index, row in enumerate(zip(*found.values(), strict=True)) if _all(row)]
    if not shared:
        raise ArgumentError(
            f"no parameter of the student gets a gradient from all of {list(found)}, so their "
            "norms cannot be compared; choose points that share parameters of the student"
        )
    norms = {name: _norm([row[index] for index in shared]) for name, row in found.items()}
    for term, pair in zip(terms, pairs, strict=True):
        norms[f"{term.name}.weighted"] = norms[term.name] * float(pair.weight)
    return norms


def _found(
    student: nn.Module,
    terms: Sequence[Term],
    pairs: Sequence[Pair],
    targets: Tensor | None,
    task: Tensor | None,
) -> dict[str, list[Tensor | None]]:
    """Squared gradient norms of each term, and of the task, by parameter."""
    values = {
        term.name: term.value(pair.student, pair.teacher, targets, pair.templates)
        for term, pair in zip(terms, pairs, strict=True)
    }
    for term in terms:
        if not values[term.name].requires_grad:
            raise term.without_gradient()
    if task is not None:
        _check_task(task, values)
        values[TASK] = task
    parameters = [p for p in student.parameters() if p.requires_grad]
    return {name: _squares(value, parameters) for name, value in values.items()}


def _check_task(task: Tensor, values: dict[str, Tensor]) -> None:
    if not isinstance(task, Tensor) or task.dim() or not task.requires_grad:
        raise ArgumentTypeError(
            "task= must be the value of your own loss, such as F.cross_entropy(student(x), y): a "
            "scalar tensor that requires grad"
        )
    if TASK in values:
        raise ArgumentError(
            f"a loss is called {TASK!r}, which is the key of the task's norm; give it another name"
        )


def _squares(value: Tensor, parameters: Sequence[nn.Parameter]) -> list[Tensor | None]:
    """Squared gradient norm of each parameter; None if ``value`` does not depend on it.

    Under autocast with float16 small gradients inside the student would become 0, so the value is
    scaled as a gradient scaler does. A power of two changes no digit of other dtypes.
    """
    squares: list[Tensor | None] = []
    for scale in SCALES:
        start = torch.full_like(value, scale)
        grads = torch.autograd.grad(value, parameters, start, retain_graph=True, allow_unused=True)
        squares = [_square(g, scale) if isinstance(g, Tensor) else None for g in grads]
        if all(square is None or square.isfinite() for square in squares):
            break
    if any(square for square in squares if square is not None):
        # A compiled graph gives zeros, not None, to parameters that the value does not reach.
        return [square if square is not None and square else None for square in squares]
    return squares


def _square(grad: Tensor, scale: float) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(grad, dtype=work_dtype(grad))
    return (norm / scale).square()


def _all(row: Sequence[Tensor | None]) -> bool:
    return all(square is not None for square in row)


def _norm(squares: Sequence[Tensor | None]) -> float:
    known = [square for square in squares if square is not None]
    return float(torch.stack([square.to(known[0]) for square in known]).sum().sqrt())
