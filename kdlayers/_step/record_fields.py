"""The fields of a record: which one each term reads, and how its rows are laid out."""

from collections.abc import Mapping, Sequence

from kdlayers._models.layouts import Size
from kdlayers._records.topk import why_unsuited
from kdlayers._step.terms import Term


def names_of(
    terms: Sequence[Term], own: Mapping[str, Sequence[int]], ours: Sequence[Size | None]
) -> list[str]:
    """The field that each term reads; terms that read the same tensor share one.

    The name of a map says its grid, which depends on the teacher's own grid and on the student's.
    So it is the same in every handle, whatever other losses there are.
    """
    names = []
    for term, size in zip(terms, ours, strict=True):
        if term.tap is None:
            who = "all teachers" if term.teacher_index is None else f"teacher {term.teacher_index}"
            names.append(f"logits of {who}")
        elif term.readers is not None:
            token = "class token" if term.readers[1].class_token else "mean"
            names.append(f"{tap_of(term)}, {token}")
        elif term.on_grid and tap_of(term) in own:
            rows, columns = own[tap_of(term)]
            names.append(on_grid(tap_of(term), term.compared((rows, columns), size)))
        else:
            names.append(tap_of(term))
    return names


def tap_of(term: Term) -> str:
    """The start of a field's name: the point and its teacher."""
    return f"{term.tap} of teacher {term.teacher_index or 0}"


def on_grid(tap: str, grid: Sequence[int]) -> str:
    """The field of a map on this grid."""
    return f"{tap}, {grid[0]} x {grid[1]}"


def kind_of(term: Term) -> str | None:
    """The layout of a field's rows; None if they are not pooled."""
    layout = term.teacher_layout
    if layout is None or not term.on_grid:
        return None
    return "NCHW" if layout.kind == "NCHW" else "NHWC"


def why_not_topk(terms: Sequence[Term]) -> str | None:
    """Why a term needs all logits; None if every term that reads logits can do with the largest."""
    for term in terms:
        why = why_unsuited(term.loss) if term.tap is None else None
        if why is not None:
            return f"{term.name} {why}"
    return None
