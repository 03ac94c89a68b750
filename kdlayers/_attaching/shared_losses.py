"""Warns of a loss with parameters that two handles would train together."""

from collections.abc import Sequence
from itertools import chain
from weakref import WeakKeyDictionary, ref

from kdlayers._step.tape import Tape
from kdlayers._step.terms import Term
from kdlayers._utils.warn import warn
from kdlayers.losses import DistillLoss

_TAPES: "WeakKeyDictionary[DistillLoss, ref[Tape]]" = WeakKeyDictionary()
"""The tape of the last handle that each loss was given to."""


def warn_of_shared_losses(terms: Sequence[Term], tape: Tape) -> None:
    """Warn of losses whose parameters or buffers belong to another handle that is still in use."""
    shared = []
    for term in terms:
        before = _TAPES.get(term.loss, lambda: None)()
        held = any(True for _ in chain(term.loss.parameters(), term.loss.buffers()))
        if held and before is not None and before is not tape and before.armed:
            shared.append(term.name)
        _TAPES[term.loss] = ref(tape)
    if shared:
        warn(
            f"the losses {shared} were already given to another attach_kd, so both handles train "
            "the same projectors and statistics: give each call losses of its own, or call "
            "kd.detach() or kd.remove() on the other handle first"
        )
