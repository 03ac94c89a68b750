"""The state of a handle. It has a checksum, and loading changes either everything or nothing."""

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kdlayers._layer.layer import LayerParts
from kdlayers._step.fingerprint import fingerprints, warn_of_others
from kdlayers._step.teacher import Teacher
from kdlayers._step.terms import Term
from kdlayers._utils.checksums import checksum
from kdlayers._utils.plain_tensors import finite, why_not_plain
from kdlayers._utils.undo import all_or_nothing
from kdlayers.errors import CheckpointError, KDLayersError
from kdlayers.losses import TemplateLoss

VERSION = 4
"""Version 1 had no checksum, 2 no fingerprints of the teachers, and 3 no points."""


def state_of(terms: Sequence[Term], teachers: Sequence[Teacher], step: int) -> dict[str, Any]:
    """Copies of the losses' states, the step, points, fingerprints of teachers, and a checksum."""
    losses = {term.name: _copied(term.loss.state_dict()) for term in terms}
    points = {term.name: _compared(term) for term in terms}
    known = fingerprints(teachers)
    state: dict[str, Any] = {"version": VERSION, "step": step, "losses": losses, "points": points}
    state["teachers"] = known
    return {**state, "checksum": checksum(state)}


def _compared(term: Term) -> list[Any]:
    """The student's point, the teacher's, and which teacher; both points are None for logits."""
    return [term.point, term.tap, term.teacher_index or 0]


def _copied(state: dict[str, Any]) -> OrderedDict[str, Any]:
    """A copy of the state; training changes the tensors that ``state_dict()`` returns."""
    copied: OrderedDict[str, Any] = OrderedDict()
    for key, value in state.items():
        copied[key] = value.detach().clone() if isinstance(value, Tensor) else value
    versions = getattr(state, "_metadata", None)
    if versions is not None:
        setattr(copied, "_metadata", versions)  # noqa: B010  # where torch keeps it
    return copied


def load_state(
    terms: Sequence[Term],
    teachers: Sequence[Teacher],
    layers: Mapping[str, LayerParts],
    state: object,
) -> int:
    """Load a state of `state_of` into the losses, and return the step.

    Raises:
        CheckpointError: if the state does not fit these losses, layers and teachers, or is
            damaged. The losses then keep their previous state.

    Warns:
        KDLayersWarning: if the teachers' weights are not those of the saved handle.
    """
    losses, step, points, saved, sealed = _parts(state)
    ours, theirs = [term.name for term in terms], list(losses)
    if set(ours) != set(theirs):
        raise CheckpointError(
            f"the state has the losses {theirs}, but this handle has {ours}; attach with the "
            "points and losses of the saved handle"
        )
    for term in terms:
        _check_points(term, points)
        _check(term, losses[term.name], sealed)
    with all_or_nothing(*(term.loss for term in terms)):
        for term in terms:
            _load(term, losses[term.name])
            _check_sizes(term, teachers, layers)
    if saved is not None:
        warn_of_others(teachers, saved)
    return step


def _parts(
    state: object,
) -> tuple[dict[str, Any], int, dict[str, Any], list[object] | None, bool]:
    """The losses' states, the step, points, teachers, and whether a checksum protects them."""
    version = state.get("version") if isinstance(state, dict) else type(state).__name__
    if not isinstance(state, dict) or type(version) is not int or not 1 <= version <= VERSION:
        newer = type(version) is int and version > VERSION
        advice = "install a newer kdlayers" if newer else "pass the result of kd.state_dict()"
        raise CheckpointError(
            f"expected the state of a KDHandle, version 1 to {VERSION}, found {version!r}; {advice}"
        )
    losses, step = state.get("losses"), state.get("step")
    if not isinstance(losses, dict) or type(step) is not int or step < 0:
        raise CheckpointError(
            "the state of a KDHandle is damaged: it has no losses, or no step of 0 or more; pass "
            "the result of kd.state_dict()"
        )
    if version == 1:
        return losses, step, {}, None, False
    content: dict[str, Any] = {"version": version, "step": step, "losses": losses}
    saved, points = state.get("teachers"), state.get("points")
    if version > 2:
        content["teachers"] = saved
    if version > 3:
        content["points"] = points
    if state.get("checksum") != checksum(content):
        raise CheckpointError(
            "the state of a KDHandle is damaged, or was changed after kd.state_dict() returned it: "
            "its checksum is wrong; load it from another copy of the file"
        )
    known = points if version > 3 and isinstance(points, dict) else {}
    return losses, step, known, saved if isinstance(saved, list) else None, True


def _check_points(term: Term, points: Mapping[str, Any]) -> None:
    """Raise CheckpointError if the loss was saved for other points, which may have equal sizes."""
    ours, saved = _compared(term), points.get(term.name)
    if saved is not None and saved != ours:
        raise CheckpointError(
            f"the state of {term.name} is for {saved} (the student's point, the teacher's, "
            f"teacher_index), but this handle has {ours}; attach with the points and losses of the "
            "saved handle"
        )


def _check(term: Term, state: object, sealed: bool) -> None:
    """Compare types and values of a loss's state with the loss, before anything is loaded.

    If there is a checksum, buffers may hold infinity, because a user's loss may need it there.
    Parameters must always be finite.
    """
    if not isinstance(state, dict):
        raise CheckpointError(f"the state of {term.name} is a {type(state).__name__}, not a dict")
    held = term.loss.state_dict()
    learnt = dict(term.loss.named_parameters())
    for key, value in state.items():
        ours, why = held.get(key), None
        if isinstance(ours, Tensor) or isinstance(value, Tensor):
            why = why_not_plain(value)
        if why is None and isinstance(ours, Tensor) and _kind(ours) != _kind(value):
            shapes = list(value.shape), list(ours.shape)
            why = f"is {value.dtype} {shapes[0]}, not {ours.dtype} {shapes[1]}"
        if why is None and isinstance(value, Tensor) and not (sealed and key not in learnt):
            why = None if finite(value) else "has NaN or infinite values"
        if why is not None:
            raise CheckpointError(f"the state of {term.name} is damaged: {key!r} {why}")


def _kind(tensor: Tensor) -> tuple[bool, ...]:
    """Properties that torch would convert silently: the kind of number, and scalar or not."""
    kind = tensor.is_floating_point(), tensor.is_complex(), tensor.dtype == torch.bool
    return (*kind, tensor.dim() == 0)


def _load(term: Term, state: dict[str, Any]) -> None:
    try:
        term.loss.load_state_dict(state)
    except KDLayersError:
        raise
    except Exception as error:  # a user's loss may raise any error
        raise CheckpointError(f"the state of {term.name} does not fit: {error}") from error


def _check_sizes(term: Term, teachers: Sequence[Teacher], layers: Mapping[str, nn.Module]) -> None:
    """Check that loaded template targets fit their KD layer and teacher."""
    layer = layers.get(term.point or "")
    if not isinstance(term.loss, TemplateLoss) or not isinstance(layer, LayerParts):
        return
    targets = term.loss.template_targets
    found = getattr(targets, "num_templates", None)
    if found is not None and found != layer.head.num_templates:
        raise CheckpointError(
            f"the state of {term.name} has {found} templates, but the KD layer there has "
            f"{layer.head.num_templates}; attach with the targets of the saved handle"
        )
    width, channels = getattr(targets, "num_features", None), _teacher_channels(term, teachers)
    if width is not None and channels is not None and width != channels:
        raise CheckpointError(
            f"the state of {term.name} is for {width} channels of the teacher, but the teacher has "
            f"{channels} at {term.tap!r}; attach with the teacher and points of the saved handle"
        )


def _teacher_channels(term: Term, teachers: Sequence[Teacher]) -> int | None:
    index = term.teacher_index or 0
    if term.tap is None or term.teacher_layout is None or index >= len(teachers):
        return None
    return teachers[index].traced.call(term.tap).shape[term.teacher_layout.channel_dim]
