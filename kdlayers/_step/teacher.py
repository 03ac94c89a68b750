"""Runs a teacher on the student's batch, and leaves it as it was found."""

from collections.abc import Callable, Collection, Generator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from math import inf
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from kdlayers._models.layouts import Size
from kdlayers._models.outputs import main_output, why_unclear
from kdlayers._models.trace import Trace, fresh, image_size, placement, to_model, trace
from kdlayers._models.wrappers import check_pair, unwrap
from kdlayers._step.hooks import Capture, Tape
from kdlayers._step.normalisation import automatic, warn_of_difference
from kdlayers._step.sites import hook_site
from kdlayers._utils.tree import leaves
from kdlayers.errors import ArgumentError, CaptureError, KDLayersError

Transform: TypeAlias = Callable[[Tensor], Tensor]
Taught: TypeAlias = tuple[Tensor | None, dict[str, Tensor]]
"""A teacher's logits, None where nothing asked for them, and its taps."""


class Teacher:
    """A frozen model with taps. A plain object: never part of the student or its state."""

    def __init__(
        self,
        model: nn.Module,
        traced: Trace,
        called: nn.Module,
        weight: float = 1.0,
        transform: Transform | None = None,
    ) -> None:
        self.model = model
        self.traced = traced
        self.called = called
        """What is called for a forward: the model, or its compiled form."""
        self.weight = weight
        """Its share in the mean of several teachers' logits."""
        self.transform = transform
        """What the images go through before it sees them."""
        self.eval_mode = True
        """False for the peer of mutual learning, which runs in the mode it is in."""

    def run(
        self,
        args: Sequence[Any],
        kwargs: dict[str, Any],
        names: Collection[str],
        autocast: torch.dtype | None = None,
        *,
        logits: bool = True,
    ) -> Taught:
        """Logits, and the features of the modules ``names``, for the student's inputs.

        Runs in eval mode without gradients, with the inputs on the teacher's device and in its
        dtype; ``autocast`` is the dtype of an autocast that the student ran under and that has
        ended since. If no ``logits`` are asked for, the forward ends after the last tap.

        Raises:
            CaptureError: if the teacher cannot run on the inputs, or a tapped module did not run.
        """
        tape = Tape()
        tape.active = True
        with ExitStack() as stack:
            stack.enter_context(torch.no_grad())
            if self.eval_mode:
                stack.enter_context(_eval_mode(self.model))
            stack.enter_context(_autocast(self.model, autocast))
            for name in names:
                call = self.traced.call(name)
                tap = Capture(name, call.path, tape, clone=call.changed)
                hook = hook_site(self.model, name).register_forward_hook(tap)
                stack.callback(hook.remove)
                if not logits and self._stoppable():
                    stop = hook_site(self.model, name).register_forward_hook(_Stop(names, tape))
                    stack.callback(stop.remove)
            args = to_model(transformed(tuple(args), self.transform), self.model)
            # A teacher that works in place on its inputs gets copies of the student's batch.
            args = fresh(args) if self.traced.changes_input else args
            image = image_size((args, kwargs))
            try:
                output = self.called(*args, **kwargs)
            except _Enough:
                return None, self._on_grids(tape.features, image)
            except (KDLayersError, torch.OutOfMemoryError):
                raise
            except Exception as error:
                raise _failed(self.model, args, error) from error
        missing = [name for name in names if name not in tape.features]
        if missing:
            raise CaptureError(
                f"the teacher's modules {missing} did not run in its forward, though they did at "
                "attach; a teacher compiled and called before attach_kd skips new hooks: pass the "
                "teacher uncompiled, or attach before its first call"
            )
        if logits and (unclear := why_unclear(output)) is not None:
            raise CaptureError(f"a loss reads the teacher's logits, but {unclear}")
        found = main_output(output)
        if found is None and logits:
            raise CaptureError("the teacher returned no tensor, though it did at attach")
        return found, self._on_grids(tape.features, image)

    def _on_grids(self, taps: dict[str, Tensor], image: Size | None) -> dict[str, Tensor]:
        """The taps, with tokens on the grid that they form for images of this size."""
        return {name: self.traced.layout(name).on_grid(t, image) for name, t in taps.items()}

    def _stoppable(self) -> bool:
        """Whether a forward may be left early: not a graph's, a peer's, or with parts gathered."""
        plain = self.called is self.model and self.eval_mode
        return plain and not any(hasattr(p, "placements") for p in self.model.parameters())


class _Enough(BaseException):
    """Ends a teacher's forward; no Exception, so that no model takes it for an error."""


class _Stop:
    """Forward hook that ends the forward once all taps have been recorded."""

    def __init__(self, names: Collection[str], tape: Tape) -> None:
        self.names = names
        self.tape = tape

    def __call__(self, *_: Any) -> None:
        """Raise when nothing is missing any more."""
        if all(name in self.tape.features for name in self.names):
            raise _Enough


def _failed(model: nn.Module, args: tuple[Any, ...], error: Exception) -> CaptureError:
    inputs = [f"{tensor.dtype} {list(tensor.shape)}" for _, tensor in leaves(args)]
    return CaptureError(
        f"the teacher ({type(model).__name__}) could not run on a batch of {', '.join(inputs)}: "
        f"{error}; it gets the student's images: if it needs others, say how they are made from "
        "these by attach_kd(..., teacher_transform=...)"
    )


def transformed(args: tuple[Any, ...], transform: Transform | None) -> tuple[Any, ...]:
    """The arguments of a forward, the first of them, the images, sent through ``transform``."""
    return args if transform is None else (transform(args[0]), *args[1:])


def mean_logits(teachers: Sequence[Teacher], taught: Sequence[Taught]) -> Tensor:
    """The weighted mean of the teachers' logits; those of one teacher as they are."""
    logits = [logits_of(each) for each in taught]
    if len(logits) == 1:
        return logits[0]
    device = logits[0].device
    parts = [t.weight * each.to(device) for t, each in zip(teachers, logits, strict=True)]
    return torch.stack(parts).sum(0)


def logits_of(taught: Taught) -> Tensor:
    """A teacher's logits.

    Raises:
        CaptureError: if its forward ended before.
    """
    if taught[0] is None:
        raise CaptureError("the teacher's forward ended before its logits, which a loss reads")
    return taught[0]


def make_teachers(
    student: nn.Module,
    given: nn.Module | Sequence[nn.Module] | None,
    example: tuple[Any, ...],
    weights: Sequence[float] | None,
    transform: Transform | Literal["auto"] | None,
) -> list[Teacher]:
    """Check and dry-run the teachers that the user gave.

    Raises:
        AttachError: if one is the student, or shares parameters with it.
        ArgumentError: if the weights, or the teachers' classes, do not fit together.
    """
    models: list[nn.Module] = []
    if given is not None:
        models = [given] if isinstance(given, nn.Module) else list(given)
    weights = [1.0] * len(models) if weights is None else list(weights)
    if len(weights) != len(models) or any(not 0 < w < inf for w in weights):
        raise ArgumentError(
            f"teacher_weights needs a positive number for each of the {len(models)} teachers, got "
            f"{weights}"
        )
    teachers = []
    for model, weight in zip(models, weights, strict=True):
        inner, called = unwrap(model, "teacher")
        check_pair(student, inner)
        own = _transform_for(student, inner, transform)
        traced = trace(inner, transformed(example, own), "teacher")
        teachers.append(Teacher(inner, traced, called, weight / sum(weights), own))
    classes = {tuple(teacher.traced.logits.shape[1:]) for teacher in teachers}
    if len(classes) > 1:
        raise ArgumentError(
            f"the teachers' logits have shapes {sorted(classes)}: their mean is not defined; pass "
            "teachers of the same classes"
        )
    return teachers


def _transform_for(
    student: nn.Module, teacher: nn.Module, transform: Transform | Literal["auto"] | None
) -> Transform | None:
    if transform is None:
        warn_of_difference(student, teacher)
        return None
    if isinstance(transform, str):
        if transform != "auto":
            raise ArgumentError(
                f'teacher_transform must be a function of the images or "auto", got {transform!r}'
            )
        return automatic(student, teacher)
    return transform


@contextmanager
def _eval_mode(model: nn.Module) -> Generator[None, None, None]:
    """Eval mode; the modules that were training are set back, one by one."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _autocast(model: nn.Module, dtype: torch.dtype | None) -> Any:
    device = placement(model)[0].type
    if dtype is None or torch.is_autocast_enabled(device):
        return nullcontext()
    return torch.autocast(device, dtype=dtype)
