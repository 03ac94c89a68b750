"""The grids of the student's maps for images of any size, for what runs without the student."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import torch
from torch import nn

from kdlayers._models.examples import fresh, to_model
from kdlayers._models.layouts import Size
from kdlayers._models.undisturbed import undisturbed
from kdlayers._models.wrappers import sharded
from kdlayers._step.tape import Forward, Tape
from kdlayers._step.terms import Shapes, Term, shapes_of
from kdlayers._utils.tree import leaves, mapped
from kdlayers._utils.warn import warn

_Sizes: TypeAlias = dict[tuple[str | None, bool], Size | None]


class StudentGrids:
    """Rows and columns of the student's maps, by the shapes of its inputs.

    `KDHandle.fit` and `KDHandle.record` pool the teacher to the grid that a training step compares.
    For other images than the example, how the student's grid rounds is found by running it once.
    """

    def __init__(self, student: nn.Module, tape: Tape, terms: Sequence[Term]) -> None:
        self._student, self._tape, self._terms = student, tape, list(terms)
        self._known: dict[Shapes, _Sizes] = {}
        for term in terms:
            if term.on_grid:
                self._known.setdefault(term.example, {})[_place(term)] = term.example_grid

    def of(self, terms: Sequence[Term], args: tuple[Any, ...]) -> list[Size | None]:
        """The student's grid for each term and these inputs.

        None for a term that compares no maps, and where `_found` cannot find the grid.
        """
        if not any(term.on_grid for term in terms):
            return [None] * len(terms)
        shapes = shapes_of(args)
        if shapes not in self._known:
            self._known[shapes] = self._found(args)
        sizes = self._known[shapes]
        return [sizes.get(_place(term)) if term.on_grid else None for term in terms]

    def _found(self, args: tuple[Any, ...]) -> _Sizes:
        """What a forward of the student tells; nothing, with a warning, where it cannot run."""
        # All ranks would have to run a sharded student, but not all may have new shapes.
        if sharded(self._student):
            self._warn(args, "its parameters are sharded over the ranks")
            return {}
        try:
            forward = self._run(args)
            compared = [term for term in self._terms if term.on_grid]
            return {_place(term): term.student_grid(forward) for term in compared}
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            self._warn(args, f"it raised {type(error).__name__}: {error}")
            return {}

    def _warn(self, args: tuple[Any, ...], why: str) -> None:
        shapes = ", ".join(str(tuple(tensor.shape)) for _, tensor in leaves(args))
        warn(
            f"the student did not run on images of shape {shapes}, because {why}; the grid of its "
            "maps is estimated from the example's and may differ by a row or a column; pass images "
            "of the example's size, or attach_kd(..., example=...) images of this size"
        )

    def _run(self, args: tuple[Any, ...]) -> Forward:
        """What the handle's hooks record in a forward of the first image, in eval mode."""
        tape, student = self._tape, self._student
        before = tape.forward, tape.manual, tape.active
        with torch.inference_mode(False), torch.no_grad(), undisturbed(student):
            first = mapped(args, lambda tensor: tensor[:1] if tensor.dim() else tensor)
            first = fresh(to_model(first, student))
            tape.forward, tape.manual, tape.active = Forward(first, {}), True, True
            try:
                student(*first)
                return tape.forward
            finally:
                tape.forward, tape.manual, tape.active = before


def _place(term: Term) -> tuple[str | None, bool]:
    return term.point, term.scores
