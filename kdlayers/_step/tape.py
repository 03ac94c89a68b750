"""The tape: the tensors that one training forward of the student records for the losses."""

from dataclasses import dataclass
from typing import Any, Protocol, TypeAlias

import torch
from torch import Tensor, nn

from kdlayers._models.outputs import main_output, why_unclear
from kdlayers._utils.torch_internals import plain
from kdlayers._utils.tree import leaves, mapped
from kdlayers.errors import (
    ArgumentTypeError,
    AttachError,
    CaptureError,
    ShapeError,
    StaleCaptureError,
)
from kdlayers.functional._checks import NARROW

Scores: TypeAlias = tuple[Tensor, Tensor | None]
"""Scores of a KD layer, or unit vectors and the templates to multiply them with."""


@dataclass(frozen=True)
class Wanted:
    """What the losses read from a forward: points with scores, points with features, logits."""

    scores: tuple[str, ...] = ()
    features: tuple[str, ...] = ()
    logits: bool = False


class Recorder(Protocol):
    """A hook that records features, or a copy of them if a later module changes them."""

    name: str
    copies: bool | None


class Forward:
    """One forward of the student: its inputs, its output, and the recorded tensors."""

    def __init__(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], *, copies: bool = False
    ) -> None:
        self.given = (args, kwargs)
        """The inputs of the student."""
        self.copied = copies
        if copies:
            args, kwargs = mapped(self.given, lambda tensor: tensor.clone())
        self.args = args
        self.kwargs = kwargs
        self.versions = versions_of(args, kwargs)
        self.scores: dict[str, Scores] = {}
        self.features: dict[str, Tensor] = {}
        self.watched: list[tuple[Recorder, Tensor, int]] = []
        """Features that a module returned, with their in-place counters at that time."""
        self.repeated: str | None = None
        self.output: Any = None
        self.logits: Tensor | None = None
        self.version: int | None = None
        """The in-place counter of the logits at the end of the forward."""
        self.compiled = False
        """Whether torch.compile traced the end of the forward; counters may then start at 0."""
        self.on_all_ranks = False
        """Whether DDP or FSDP runs this forward on all ranks together."""
        self.outputs: list[Any] = []
        """The outputs of the student's whole forwards inside `KDHandle.batch`."""

    def record_scores(self, name: str, scores: Scores) -> None:
        """Record the scores of the KD layer at the point ``name``."""
        if name in self.scores:
            self.repeated = name
        self.scores[name] = scores

    def record_features(self, name: str, features: Tensor) -> None:
        """Record the features at the point ``name``."""
        if name in self.features:
            self.repeated = name
        self.features[name] = features

    def any_recorded(self) -> Tensor:
        """A recorded tensor, which has one entry per image and the student's device."""
        return next(iter((*self.features.values(), *(score for score, _ in self.scores.values()))))

    def autocast_dtype(self, student: nn.Module, logits: Tensor) -> torch.dtype | None:
        """The autocast dtype of the forward, as far as it can be inferred from its tensors."""
        tensors = [*self.features.values(), logits]
        for scores, _ in self.scores.values():
            tensors.insert(0, scores)
        for tensor in tensors:
            if tensor.dtype in NARROW:
                half = any(p.dtype in NARROW for p in student.parameters())
                return None if half else tensor.dtype
        return None


@dataclass
class Ahead:
    """The result of ``kd.teach``, which runs before the student, and its inputs."""

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    versions: list[int | None]
    taught: list[Any]


class Tape:
    """Whether to record, and the last forward that was recorded."""

    def __init__(self, armed: bool = True, copies: bool = False) -> None:
        self.armed = armed
        self.manual = False
        self.active = False
        self.done = 0
        """Number of completed forwards that no loss has read."""
        self.generation = 0
        self.forward: Forward | None = None
        self.copies = copies
        """Whether the student changes its inputs in place; the teacher then gets copies."""
        self.ahead: Any = None
        """The result of ``kd.teach``."""
        self.spare: Scores | None = None
        """Scores of a recomputation, which no loss reads."""
        self.ranks: Any = None
        """Keeps train-only parameters equal on all ranks; None if there are none."""

    def consume(self) -> None:
        """Drop everything, including the count of forwards that no loss has read."""
        self.forward = self.spare = None
        self.done = 0
        self.generation += 1

    def fail(self) -> None:
        """Drop the tensors of a forward that raised, and the teacher's tensors for it."""
        self.active = False
        self.ahead = None
        self.forward = self.spare = None

    def read(self, wanted: Wanted, student: nn.Module, logits: Any) -> tuple[Forward, Tensor]:
        """Return the last forward and its logits, once: a second call raises an error.

        If there are no logits, and no loss reads them, any recorded tensor stands for the batch.

        Raises:
            CaptureError: if there is no forward to read, or a KD layer did not run in it.
            StaleCaptureError: if there were several forwards, or a tensor was changed since.
        """
        forward, done = self.forward, self.done
        self.consume()
        if done == 0 or forward is None:
            raise CaptureError(_no_forward(student))
        if done > 1:
            raise StaleCaptureError(
                f"the student ran {done} training forwards since the last kd.loss(), but a loss "
                "reads only one: call kd.loss(y) after each forward, or kd.clear() after a forward "
                "that needs no distillation loss"
            )
        if len(forward.outputs) > 1 and logits is not None:
            _check_one_of_several(forward.outputs, logits)
        if forward.repeated is not None:
            raise AttachError(
                f"the module at {forward.repeated!r} ran more than once in this forward; choose a "
                "point that runs once, find_points(model) lists them"
            )
        _check_recorded(forward, wanted, student)
        _check_unchanged(forward, given=logits is not None)
        output = forward.output if logits is None else logits
        found = output
        if not isinstance(output, Tensor):
            unclear = why_unclear(output) if wanted.logits else None
            if unclear is not None:
                raise CaptureError(f"a loss reads the student's logits, but {unclear}")
            found = main_output(output)
        if found is None and wanted.logits:
            raise CaptureError(
                "kd.batch(x) does not record the logits, which a loss reads: call kd.loss(y, "
                "logits=...)"
            )
        if found is None:
            found = forward.any_recorded()
        if found.dim() and not found.shape[0]:
            raise ShapeError(
                "the student's last batch was empty, so there is nothing to compare: skip the "
                "forward and kd.loss for empty batches"
            )
        if wanted.logits and not found.dim():
            raise CaptureError(
                "the student returned a single number, such as its loss, in this forward, but a "
                "loss reads its logits: return them too, as a dict with the keys 'loss' and "
                "'logits', or pass them as kd.loss(y, logits=...)"
            )
        if wanted.logits and not found.requires_grad:
            raise CaptureError(
                "the logits do not require grad, so a loss on them would train nothing: pass the "
                "student's logits to kd.loss(y, logits=...) without detach()"
            )
        return forward, found

    def __deepcopy__(self, memo: dict[int, Any]) -> "Tape":
        """Copy as an empty tape: copies of the student hold no tensors and record nothing."""
        return Tape(False, self.copies)

    def __reduce__(self) -> tuple[type["Tape"], tuple[bool, bool]]:
        """Pickle as an empty tape that does not record."""
        return (Tape, (False, self.copies))


def versions_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[int | None]:
    """The in-place counters of all input tensors, to detect later changes."""
    versions = []
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            versions.append(version_of(value))
        elif isinstance(value, (tuple, list, dict)):
            for _, tensor in leaves(value):
                versions.append(version_of(tensor))
    return versions


def version_of(tensor: Tensor) -> int | None:
    """The in-place counter of a tensor; None for an inference tensor, which has none."""
    if not torch.compiler.is_compiling() and tensor.is_inference():
        return None
    return tensor._version


def check_labels(targets: Tensor | None, logits: Tensor) -> Tensor | None:
    """The labels on the device of ``logits``, after a check that there is one for each image.

    Raises:
        ArgumentTypeError: if ``targets`` is not a tensor, or requires grad (as logits do).
        StaleCaptureError: if the number of labels differs from the number of images.
    """
    if targets is None:
        return None
    if not isinstance(targets, Tensor):
        raise ArgumentTypeError(
            f"kd.loss(targets) takes the labels as a tensor, got {type(targets).__name__}"
        )
    if targets.requires_grad:
        raise ArgumentTypeError(
            f"kd.loss(targets) takes the labels, got a {targets.dtype} tensor of shape "
            f"{list(targets.shape)} that requires grad (did you pass the logits?); kdlayers "
            "records the logits itself: call kd.loss(y) after student(x)"
        )
    if targets.dim() == 0 or targets.shape[0] != logits.shape[0]:
        raise StaleCaptureError(
            f"got labels of shape {tuple(targets.shape)} for a forward of {logits.shape[0]} "
            "images: they belong to another batch; call kd.loss(y) with the labels of the last "
            "student(x)"
        )
    return (targets if type(targets) is Tensor else plain(targets)).to(logits.device)


def check_taught(forward: Forward, ahead: Any) -> None:
    """Check that the student ran on the inputs of ``kd.teach``.

    Raises:
        StaleCaptureError: if not.
    """
    same = _same(forward.given, (ahead.args, ahead.kwargs))
    changed = versions_of(ahead.args, ahead.kwargs) != ahead.versions and not forward.copied
    if not same or changed:
        raise StaleCaptureError(
            "kd.teach(x) and student(x) got different batches; call kd.teach with the same tensors "
            "as the following student(x), or do not call kd.teach"
        )


def _same(ours: Any, theirs: Any) -> bool:
    """Whether two inputs hold the same tensor objects in the same places, or moved ones."""
    if isinstance(ours, (list, tuple)) and isinstance(theirs, (list, tuple)):
        return len(ours) == len(theirs) and all(map(_same, ours, theirs))
    if isinstance(ours, dict) and isinstance(theirs, dict):
        return _same(list(ours.items()), list(theirs.items()))
    if isinstance(ours, Tensor) and isinstance(theirs, Tensor):
        return ours is theirs or _is_moved(ours, theirs)
    plain = isinstance(ours, (str, int, float, type(None)))
    return ours is theirs or (plain and type(ours) is type(theirs) and ours == theirs)


def _is_moved(ours: Tensor, theirs: Tensor) -> bool:
    """Whether ``ours`` is ``theirs`` on another device or in another dtype, as FSDP converts it."""
    if (ours.device, ours.dtype) == (theirs.device, theirs.dtype) or ours.shape != theirs.shape:
        return False
    return torch.equal(ours, theirs.to(ours))


def _no_forward(student: nn.Module) -> str:
    state = "" if student.training else " (the student is in eval mode now: call student.train())"
    return (
        "kd.loss() found no training forward of the student since the last kd.loss(), "
        f"kd.gradient_norms() or backward(){state}; call student(x), not student.forward(x), in "
        "train mode with gradients, then kd.loss(y), then backward(); if you run it in another "
        "way, use `with kd.batch(x):`"
    )


def _frozen(student: nn.Module, name: str) -> bool:
    """Whether all parameters of the module, including its KD layer, are frozen."""
    parameters = list(student.get_submodule(name).parameters())
    return bool(parameters) and not any(p.requires_grad for p in parameters)


def _check_one_of_several(outputs: list[Any], logits: Any) -> None:
    """Raise if the logits are those of one forward of several, and not of all of them together."""
    if any(logits is output or logits is main_output(output) for output in outputs):
        raise StaleCaptureError(
            f"the student ran {len(outputs)} training forwards inside kd.batch(x), and logits= is "
            "the output of one of them, so it is unclear whether x are its images; use one `with "
            "kd.batch(x):` for each forward, and call kd.loss after it"
        )


def _check_recorded(forward: Forward, wanted: Wanted, student: nn.Module) -> None:
    missing, cut = [], []
    for name in wanted.features:
        if name not in forward.features:
            missing.append(name)
        elif not forward.features[name].requires_grad:
            cut.append(name)
    for name in wanted.scores:
        scores, templates = forward.scores.get(name, (None, None))
        if scores is None:
            missing.append(name)
        elif not (scores.requires_grad or (templates is not None and templates.requires_grad)):
            cut.append(name)
    if missing:
        raise CaptureError(
            f"{', '.join(missing)}: the student ran, but nothing was recorded in this forward, so "
            "its hooks did not run: the model was compiled before attach_kd, or the module was "
            "replaced later (convert_sync_batchnorm, fuse): call attach_kd after such changes; or "
            "the model skipped this module in this forward, as layer drop does: choose a point "
            "that runs in every forward"
        )
    frozen = [name for name in cut if _frozen(student, name)]
    if frozen:
        raise CaptureError(
            f"{', '.join(frozen)}: requires_grad is False for all parameters of the student up to "
            "this point, including its KD layers, so the loss would have no gradient; unfreeze "
            "them, or attach at a later point"
        )
    if cut:
        raise CaptureError(
            f"{', '.join(cut)}: recorded without a gradient, as reentrant gradient checkpointing "
            "does; use checkpoint(..., use_reentrant=False), or check that this part is not under "
            "no_grad"
        )


def _check_unchanged(forward: Forward, *, given: bool) -> None:
    """Raise StaleCaptureError if the inputs, features or logits were changed in place since."""
    if versions_of(forward.args, forward.kwargs) != forward.versions:
        raise StaleCaptureError(
            "the input batch was changed in place after the student's forward, so the teacher "
            "would see different images from the student; change a copy, or call kd.loss(y) first"
        )
    lost = []
    for hook, features, version in forward.watched:
        changed = features._version != version
        if changed and not hook.copies and forward.features[hook.name] is features:
            lost.append(hook.name)
        # Once changed, always copied: a module may change them in some forwards only.
        hook.copies = changed or bool(hook.copies)
        if not changed:
            # A copy would add up the gradients in another order, and a resumed run, whose first
            # forward has a copy, would differ in rounding from one that was not stopped.
            forward.features[hook.name] = features
    if lost:
        raise StaleCaptureError(
            f"{', '.join(lost)}: a later module changed these features in place for the first "
            "time in this forward, so the features that the losses need are lost; run student(x) "
            "again: from now on a copy is recorded"
        )
    logits = None if given else forward.logits
    if logits is not None and forward.version is not None:
        version = logits._version
        if version != forward.version and not (forward.compiled and version == 0):
            raise StaleCaptureError(
                "the student's logits were changed in place after its forward, so the losses would "
                "not compare the logits that the student returned; change a copy (logits / 100, "
                "not logits.div_(100)), or call kd.loss(y) first"
            )
