"""Remembers which teacher targets and losses were fitted to, as they may be used again."""

from collections.abc import Sequence
from weakref import WeakKeyDictionary, ref

from torch import nn

from kdlayers._step.teacher import Teacher
from kdlayers._step.terms import Term
from kdlayers._utils.warn import warn
from kdlayers.losses import TemplateLoss

_SOURCES: WeakKeyDictionary[nn.Module, tuple[ref[nn.Module], str | None]] = WeakKeyDictionary()
"""The teacher and its point that `KDHandle.fit` has fitted a module to, beside its state."""


def remember(terms: Sequence[Term], teachers: Sequence[Teacher]) -> None:
    """Note that ``kd.fit`` has just fitted these terms to the teachers."""
    for term in terms:
        _SOURCES[_learner(term)] = (ref(_teacher(term, teachers)), term.tap)


def warn_of_others(terms: Sequence[Term], teachers: Sequence[Teacher]) -> None:
    """Say of terms that ``kd.fit`` will leave as they are, but that know something else.

    What was fitted by hand or loaded is what the user wants.
    """
    for term in terms:
        model, tap = _SOURCES.get(_learner(term), (None, None))
        if model is None or not term.loss.fitted:
            continue
        same = model() is _teacher(term, teachers)
        if not same or tap != term.tap:
            source = f"{tap!r} of this teacher" if same else f"{tap!r} of another teacher"
            warn(
                f"{term.name} keeps what it learnt from {source} in an earlier kd.fit, because "
                "kd.fit(loader) only learns what is missing: make new targets for this attach_kd, "
                "or call kd.fit(loader, refit=True)"
            )


def _learner(term: Term) -> nn.Module:
    """What learns and may be passed to another `attach_kd`: the point's targets, or the loss."""
    targets = term.loss.template_targets if isinstance(term.loss, TemplateLoss) else None
    return term.loss if targets is None else targets


def _teacher(term: Term, teachers: Sequence[Teacher]) -> nn.Module:
    return teachers[term.teacher_index or 0].model
