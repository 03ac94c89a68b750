"""Runs a teacher on the student's batch, and restores its state afterwards."""

import copy
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from math import inf
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from kdlayers._models.detectors import inside
from kdlayers._models.examples import OFFLOAD_HOOK, image_size, placement
from kdlayers._models.layouts import Layout
from kdlayers._models.outputs import features_of, main_output, why_unclear
from kdlayers._models.trace import Call, Trace, trace
from kdlayers._models.vectors import class_key
from kdlayers._models.wrappers import check_pair, sharded, unwrap
from kdlayers._step.call import Transform, for_teacher, transformed
from kdlayers._step.normalisation import automatic, warn_of_difference
from kdlayers._step.recorded_teacher import RecordedTeacher, traces_of
from kdlayers._step.sites import hook_site
from kdlayers._step.tape import version_of
from kdlayers._utils.locks import lock_of
from kdlayers._utils.torch_internals import buffer_table, parameter_table, plain
from kdlayers._utils.tree import leaves, mapped
from kdlayers.errors import ArgumentError, CaptureError, KDLayersError

Taught: TypeAlias = tuple[Tensor | None, dict[str, Tensor]]
"""A teacher's logits, or None if no loss reads them, and its taps."""


class Teacher:
    """A frozen model with taps. A plain object: never part of the student or its state."""

    def __init__(
        self,
        model: nn.Module,
        traced: Trace,
        called: nn.Module,
        weight: float = 1.0,
        transform: Transform | None = None,
        eval_mode: bool = True,
    ) -> None:
        self.model = model
        self.traced = traced
        self.called = called
        """What is called for a forward: the model, or its compiled form."""
        self.weight = weight
        """Its share in the mean of several teachers' logits."""
        self.transform = transform
        """Converts the images for this teacher."""
        self.eval_mode = eval_mode
        """False for the peer of mutual learning, which runs in the mode it is in."""
        self.lock = lock_of(model)
        """One thread at a time runs the model: its mode and its hooks belong to that thread."""
        self._points: dict[str, _Point] = {}
        self._place: tuple[Mapping[str, Tensor | None], str] | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles include the model; the copy of the model has its own lock."""
        fields = (self.model, self.traced, self.called, self.weight, self.transform, self.eval_mode)
        return Teacher, fields

    def __deepcopy__(self, memo: dict[int, Any]) -> "Teacher":
        """A deep copy runs the same frozen model, unless that was copied before, or is a peer.

        Moving averages and trainers deep-copy objects that hold a handle; a copy of the teacher
        would only take memory. A pickle includes the model.
        """
        make, fields = self.__reduce__()
        if not self.eval_mode or id(self.model) in memo:
            fields = copy.deepcopy(fields, memo)
        copied: Teacher = make(*fields)
        return copied

    def run(
        self,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        names: Sequence[str],
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
        if kwargs:
            args, kwargs = for_teacher(self.model, args, kwargs)
        if self.transform is not None:
            args, kwargs = transformed(args, kwargs, self.transform)
        first = self._first()
        # The whole model is searched only if its weights are loaded by hooks.
        if first is None or first.is_meta or OFFLOAD_HOOK in vars(self.model):
            place = placement(self.model)
        else:
            place = first.device, first.dtype
        args = tuple(_moved(value, *place) for value in args)
        kwargs = {key: _moved(value, *place) for key, value in kwargs.items()}
        device = place[0].type
        outside = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if outside else autocast
        # Autocast reuses the weights that it has cast. On older versions of torch, such as 2.9,
        # a peer's own forward would reuse those cast under no_grad here, and have no gradient.
        precision = (
            nullcontext()
            if dtype is None or (outside and self.eval_mode)
            else torch.autocast(device, dtype=dtype, cache_enabled=self.eval_mode)
        )
        with self.lock, torch.no_grad(), precision:
            output, features = self._forward(args, kwargs, names, logits)
        for key, tensor in features.items():
            if tensor.is_inference():
                features[key] = _ordinary(tensor)
        found = output if isinstance(output, Tensor) else None
        if found is None and logits:
            unclear = why_unclear(output)
            if unclear is not None:
                raise CaptureError(f"a loss reads the teacher's logits, but {unclear}")
            found = main_output(output)
            if found is None:
                raise CaptureError("the teacher returned no tensor, though it did at attach")
        if found is not None and found.is_inference():
            found = _ordinary(found)
        return found, features

    def _first(self) -> Tensor | None:
        """The first floating-point parameter or buffer."""
        if self._place is not None:
            table, key = self._place  # without get(): the tables of TorchScript modules lack it
            tensor = table[key] if key in table else None  # noqa: SIM401
            if tensor is not None and tensor.is_floating_point():
                return tensor
        for module in self.model.modules():
            for tables in (parameter_table(module), buffer_table(module)):
                for key, tensor in tables.items():
                    if tensor is not None and tensor.is_floating_point():
                        self._place = (tables, key)
                        return tensor
        return None

    def _forward(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], names: Sequence[str], logits: bool
    ) -> tuple[Any, dict[str, Tensor]]:
        """The output, or None if the forward ended early, and the taps."""
        ends, missing = not logits and self._stoppable(), set(names)
        given = mapped((args, kwargs), torch.clone) if self.traced.changes_input else (args, kwargs)
        taps, hooks, training = [], [], []
        for name in names:
            point = self._point(name)
            # A peer in training mode may change features that an eval-mode forward leaves alone.
            copies = point.call.changed or not self.eval_mode
            taps.append(_Tap(point, copies, missing, ends))
            hooks.append(point.site.register_forward_hook(taps[-1]))
        for module in self.model.modules() if self.eval_mode else ():
            if module.training:
                training.append(module)
                module.training = False
        try:
            output = self.called(*given[0], **given[1])
        except _Enough:
            output = None
        except (KDLayersError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise _failed(self.model, given, error) from error
        finally:
            for hook in hooks:
                hook.remove()
            for module in training:
                module.training = True
        if missing:
            raise CaptureError(
                f"the teacher's modules {sorted(missing)} did not run in its forward, though they "
                "did at attach; a teacher compiled and called before attach_kd skips new hooks: "
                "pass the teacher uncompiled, or attach before its first call"
            )
        features: dict[str, Tensor] = {}
        for tap in taps:
            point = tap.point
            if version_of(tap.features) != tap.version:
                point.call.changed = True  # a later module works in place: copies from now on
                return self._forward(args, kwargs, names, logits)
            features[point.call.name] = tap.features
            if point.layout.kind == "tokens":
                features[point.call.name] = point.layout.on_grid(tap.features, image_size(given))
                features[class_key(point.call.name)] = tap.features[:, 0]
        return output, features

    def _point(self, name: str) -> "_Point":
        """The point of this name; found again if its module was replaced in the meantime."""
        found = self._points.get(name)
        if found is None or found.module is not self.model.get_submodule(name):
            module, site = self.model.get_submodule(name), hook_site(self.model, name)
            found = _Point(module, site, self.traced.call(name), self.traced.layout(name))
            self._points[name] = found
        return found

    def _stoppable(self) -> bool:
        """Whether a forward may end early: not of a compiled model, a peer or a sharded model."""
        plain = self.called is self.model and self.eval_mode
        return plain and not sharded(self.model)


@dataclass
class _Point:
    """A module of the teacher, where its hook goes, and how to read its output."""

    module: nn.Module
    site: nn.Module
    call: Call
    layout: Layout


class _Enough(BaseException):
    """Ends a teacher's forward. Not an Exception, so that models do not catch it as an error."""


@dataclass(eq=False)
class _Tap:
    """Forward hook that records features, and may end the forward once nothing is missing."""

    point: _Point
    copies: bool
    missing: set[str]
    ends: bool
    features: Tensor = field(init=False)
    version: int | None = field(init=False)

    def __call__(self, _module: nn.Module, _args: Any, output: Any) -> None:
        """Record the features, or a copy if a later module changes them in place."""
        call = self.point.call
        usual = isinstance(output, Tensor) and not call.path
        features = output if usual else features_of(output, call.path, call.name)
        # Without a counter (under inference_mode) nothing would show a later in-place change.
        copies = self.copies or features.is_inference()
        self.features = features.clone() if copies else features
        self.version = version_of(self.features)
        self.missing.discard(self.point.call.name)
        if self.ends and not self.missing:
            raise _Enough


def _ordinary(tensor: Tensor) -> Tensor:
    """A copy of a tensor from torch.inference_mode(), which autograd would refuse."""
    with torch.inference_mode(False), torch.no_grad():
        return tensor.clone()


def _moved(value: Any, device: torch.device, dtype: torch.dtype) -> Any:
    """Tensors in ``value``, as plain ones, on this device; floating-point ones in this dtype."""
    if isinstance(value, Tensor):
        value = value if type(value) is Tensor else plain(value)
        return value.to(device, dtype if value.is_floating_point() else None)
    return mapped(value, lambda tensor: _moved(tensor, device, dtype))


def _failed(model: nn.Module, inputs: Any, error: Exception) -> CaptureError:
    shapes = [f"{tensor.dtype} {list(tensor.shape)}" for _, tensor in leaves(inputs)]
    more = (
        "; if only the student takes more than the images, such as labels, run it in `with "
        "kd.batch(images):`"
    )
    return CaptureError(
        f"the teacher ({type(model).__name__}) could not run on a batch of {', '.join(shapes)}: "
        f"{error}; it gets the student's images: if it needs others, convert them with "
        f"attach_kd(..., teacher_transform=...){more if len(shapes) > 1 else ''}"
    )


def make_teachers(
    student: nn.Module,
    given: nn.Module | Sequence[nn.Module] | RecordedTeacher | None,
    example: tuple[Any, ...],
    weights: Sequence[float] | None,
    transform: Transform | Literal["auto"] | None,
) -> list[Teacher]:
    """Check and dry-run the teachers that the user gave.

    Raises:
        AttachError: if one is the student, or shares parameters with it.
        ArgumentError: if the weights do not fit the teachers, or a transform has no teacher.
    """
    if isinstance(given, RecordedTeacher):
        batch = next((len(t) for _, t in leaves(example) if t.dim() > 1), 2)
        return _recorded_teachers(given, weights, transform, batch)
    models: list[nn.Module] = []
    if isinstance(given, Iterable) and not isinstance(given, nn.Module):
        models = list(given)
    elif given is not None:
        models = [given]
    if transform is not None and not models:
        raise ArgumentError(
            "teacher_transform was given without a teacher; pass a teacher, or leave it out"
        )
    shares = _shares(weights, len(models))
    teachers = []
    for model, share in zip(models, shares, strict=True):
        whole, called = unwrap(model, "teacher")
        inner = inside(whole)
        called = called if inner is whole else inner
        check_pair(student, inner)
        own = _transform_for(student, inner, transform)
        with lock_of(inner):
            images = example if own is None else transformed(example, {}, own)[0]
            traced = trace(inner, images, "teacher")
        teachers.append(Teacher(inner, traced, called, share, own))
    return teachers


def _shares(weights: Sequence[float] | None, count: int) -> list[float]:
    """Each teacher's share in the mean of their logits; they sum to 1."""
    try:
        given = [1.0] * count if weights is None else [float(weight) for weight in weights]
    except (TypeError, ValueError):
        given = [-1.0]
    if len(given) != count or any(not 0 < weight < inf for weight in given):
        raise ArgumentError(
            f"teacher_weights needs a positive number for each of the {count} teachers, got "
            f"{weights!r}"
        )
    return [weight / sum(given) for weight in given]


def check_mean(reader: str, teachers: Sequence[Teacher]) -> None:
    """Check that the mean of the teachers' logits, which ``reader`` needs, is defined.

    Raises:
        ArgumentError: if they have different classes.
    """
    classes = {tuple(teacher.traced.logits.shape[1:]) for teacher in teachers}
    if len(classes) > 1:
        raise ArgumentError(
            f"{reader} reads the mean of the teachers' logits, but they have shapes "
            f"{sorted(classes)}: pass teachers of the same classes, or select one with "
            "teacher_index="
        )


def _recorded_teachers(
    given: RecordedTeacher,
    weights: Sequence[float] | None,
    transform: Transform | Literal["auto"] | None,
    batch: int,
) -> list[Teacher]:
    if weights is not None or transform is not None:
        raise ArgumentError(
            "teacher_weights and teacher_transform were applied when the teacher was recorded; "
            "leave them out with RecordedTeacher(path)"
        )
    shares = [known["weight"] for known in given.reader.description.about["teachers"]]
    traces = traces_of(given.reader, batch)
    return [Teacher(t.model, t, t.model, w) for t, w in zip(traces, shares, strict=True)]


def _transform_for(
    student: nn.Module, teacher: nn.Module, transform: Transform | Literal["auto"] | None
) -> Transform | None:
    if transform is None:
        warn_of_difference(student, teacher)
        return None
    if transform == "auto":
        return automatic(student, teacher)
    if not callable(transform):
        raise ArgumentError(
            f'teacher_transform must be a function of the images or "auto", got {transform!r}'
        )
    return transform
