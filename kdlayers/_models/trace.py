"""Dry runs: record what every module returns, without changing the model."""

from collections import Counter
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from kdlayers._models.examples import fresh, has_volumes, image_size, run_example, to_model
from kdlayers._models.layouts import (
    Kind,
    Layout,
    Size,
    find_layout,
    measured_kind,
    stated_kind,
)
from kdlayers._models.names import match
from kdlayers._models.outputs import is_detections, main_output, why_unclear
from kdlayers._models.probe import Growth, Shape, are_fixed_tokens, growth
from kdlayers._models.undisturbed import undisturbed
from kdlayers._models.wrappers import innermost, plainly_named
from kdlayers._utils.torch_internals import child_table, is_batch_norm, runs_forward_of
from kdlayers._utils.tree import Path, leaves, main_tensor
from kdlayers.errors import ArgumentError, AttachError, LayoutError, NoMatchError, RecordError


@dataclass
class Call:
    """The call of one module in a dry run: the place and the shape of its features."""

    name: str
    path: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    order: int
    calls: int = 1
    shared: int = 1
    """How often the module ran that gets the hook, which is the last child of a Sequential."""
    changed: bool = False
    """Whether a later module changed the features in place."""
    stated: Kind | None = None
    """Layout declared by a convolution or norm that produced or consumed the features."""

    @property
    def ending(self) -> str:
        """What makes a Sequential unusable whose last module is shared."""
        return f"ends with a module that runs {self.shared} times in one forward"


@dataclass
class Trace:
    """A dry run of a model: the calls in forward order, and the logits."""

    model: nn.Module
    calls: dict[str, Call]
    logits: Tensor
    image: Size
    label: str
    unclear: str | None = None
    """Why the choice of the logits among the outputs is ambiguous; None if it is not."""
    detections: bool = False
    """Whether the model returns boxes rather than logits."""
    volumes: bool = False
    """Whether the inputs are volumes or videos rather than images."""
    changes_input: bool = False
    """Whether the forward changes its inputs in place."""
    changed_buffers: list[str] = field(default_factory=list)
    """Buffers that a forward in eval mode changes, such as those of quantisation observers."""
    example: tuple[Any, ...] | None = None
    """The inputs, until `release`."""
    record: str | None = None
    """The folder of the record that replaces the model."""
    _growth: dict[str, Growth] | None = None
    _layouts: dict[str, Layout] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        """Names of the modules that returned features, without the model itself."""
        return [name for name in self.calls if name]

    def find(self, pattern: str, advice: str = "") -> list[str]:
        """The names that match ``pattern``, a name or a glob; ``advice`` ends the message.

        Raises:
            NoMatchError: if there is none.
            RecordError: if there is none in a record.
        """
        try:
            return match(pattern, self.names, self.model, self.label, advice)
        except NoMatchError:
            if self.record is None:
                raise
        held = ", ".join(map(repr, self.names)) or "no features, only logits"
        raise RecordError(
            f"the record {self.record} does not hold {pattern!r} of the teacher (it has {held}); "
            "record again with the losses and points that you train with"
        )

    def call(self, name: str) -> Call:
        """The call of module ``name``, after a check that its features can be used.

        Raises:
            AttachError: if the module did not run, ran more than once, or returned no features.
        """
        call = self.calls.get(name)
        if call is None:
            raise AttachError(
                f"module {name!r} of the {self.label} returned no features in a dry run: it was "
                "not called, or its output is not a floating-point tensor; find_points(model) "
                "lists usable points"
            )
        if call.calls > 1:
            raise AttachError(
                f"module {name!r} of the {self.label} runs {call.calls} times in one forward, so "
                "its features are ambiguous; choose a module that runs once, find_points(model) "
                "lists them"
            )
        if call.shared > 1:
            raise AttachError(
                f"module {name!r} of the {self.label} {call.ending}: a hook there would also see "
                f"other features; end {name!r} with a separate module, such as a copy.deepcopy "
                "of it, or choose another point, find_points(model) lists them"
            )
        return call

    def layout(self, name: str) -> Layout:
        """Layout of the features of module ``name``.

        Raises:
            LayoutError: if the channel axis is ambiguous, or the first axis is not the batch.
        """
        if name not in self._layouts:
            self._layouts[name] = self._layout(name)
        return self._layouts[name]

    def _layout(self, name: str) -> Layout:
        call = self.call(name)
        if self.detections:
            raise LayoutError(self.detector_advice)
        if self.volumes and len(call.shape) > 2:
            raise LayoutError(
                f"the output of {name!r} has shape {call.shape}, and the {self.label} takes inputs "
                "of five axes, such as volumes: kdlayers compares the positions of images only; "
                "use losses on the logits, losses=[KDLoss()], or a point that returns vectors [B, "
                "C], such as a pooling layer"
            )
        if call.shape[:1] != self.logits.shape[:1]:
            raise LayoutError(
                f"the output of {name!r} has shape {call.shape}, but the batch has "
                f"{self.logits.shape[0]} images: its first axis is not the batch; "
                "find_points(model) lists usable points"
            )
        module = innermost(self.model.get_submodule(name))
        found = self._grown().get(name) if len(call.shape) in (3, 4) else None
        if found is not None and 0 in (found.height, found.width):
            raise LayoutError(
                f"the output of {name!r} has shape {call.shape}, and its first axis grows with the "
                "images: it holds positions, not the batch, as in nn.TransformerEncoder without "
                "batch_first=True; find_points(model) lists usable points"
            )
        if found is not None and are_fixed_tokens(call.shape, found, self._grown_maps()):
            raise LayoutError(
                f"the output of {name!r} has shape {call.shape}, and larger images give as many "
                "tokens: these are not positions of the image but, for example, the queries of a "
                "detector, which student and teacher order differently; choose an earlier point, "
                "such as one in the backbone or the encoder, find_points(model) lists them"
            )
        evidence: dict[str, Any] = {"growth": found, "stated": call.stated}
        evidence["grids"] = self._grids() if len(call.shape) in (3, 4) else ()
        return find_layout(name, module, self.model, call.shape, self.image, **evidence)

    def _grown_maps(self) -> list[tuple[Shape, Growth]]:
        """Shape and growth of everything with four axes."""
        named = ((self.calls[name].shape, found) for name, found in self._grown().items())
        return [(shape, found) for shape, found in named if len(shape) == 4]

    def _grids(self) -> list[Size]:
        """Rows and columns of all maps whose layout is certain, in forward order."""
        found: dict[Size, None] = {}
        for name, call in self.calls.items():
            if len(call.shape) == 4:
                kind = measured_kind(self._grown().get(name)) or call.stated
                if kind is not None:
                    found[call.shape[2:] if kind == "NCHW" else call.shape[1:3]] = None
        return list(found)

    def _grown(self) -> dict[str, Growth]:
        if self._growth is None:
            paths = {name: call.path for name, call in self.calls.items() if call.calls == 1}
            self._growth = growth(self.model, self.example, paths) if self.example else {}
        return self._growth

    @property
    def detector_advice(self) -> str:
        """What to do with a model that returns boxes."""
        return (
            f"the {self.label} ({type(self.model).__name__}) is a detector: it returns boxes, not "
            "logits, and its inner modules see other batches than the images; attach to its "
            "backbone, attach_kd(student.backbone, teacher.backbone, at=[...]), and train the "
            "detector as a whole"
        )

    def need_logits(self, reader: str) -> None:
        """Check that the model has unambiguous logits, which ``reader`` needs.

        Raises:
            ArgumentError: if it does not.
        """
        if self.detections:
            raise ArgumentError(f"{reader} reads logits, but {self.detector_advice}")
        if self.unclear is not None:
            raise ArgumentError(
                f"{reader} reads the logits of the {self.label} ({type(self.model).__name__}), "
                f"but {self.unclear}"
            )

    def release(self) -> None:
        """Release the example; layouts that were already computed stay available."""
        self.example = None


def trace(model: nn.Module, example: tuple[Any, ...], label: str) -> Trace:
    """Run ``model`` once on ``example`` in eval mode, and record what every module returns."""
    if torch.is_inference_mode_enabled():
        raise ArgumentError(
            f"the dry run of the {label} would run under torch.inference_mode(), in which nothing "
            "can be trained later; call attach_kd and find_points outside of it"
        )
    example = to_model(example, model)
    calls: dict[str, Call] = {}
    tensors: dict[str, tuple[Tensor, int | None]] = {}
    runs: Counter[nn.Module] = Counter()
    statements = _Statements()

    def note(name: str, module: nn.Module, args: Any, output: Any) -> None:
        runs[module] += 1
        found = main_tensor(output, batch, args)
        statements.note(innermost(module), args, output)
        if name in calls:
            calls[name].calls += 1
        elif found is not None:
            path, tensor = found
            shape = tuple(tensor.shape)
            calls[name] = Call(name, path, shape, tensor.dtype, tensor.device, len(calls))
            tensors[name] = (tensor, _version(tensor))

    given = fresh(example)
    batch = next((len(tensor) for _, tensor in leaves(given) if tensor.dim() > 3), None)
    versions = [_version(tensor) for _, tensor in leaves(given)]
    with ExitStack() as stack:
        changed_buffers = stack.enter_context(undisturbed(model))
        stack.enter_context(torch.no_grad())
        for name, module in plainly_named(model):
            if isinstance(module, torch.jit.ScriptModule):
                continue  # has no hooks, and calls its children outside Python
            hook = module.register_forward_hook(lambda m, a, out, name=name: note(name, m, a, out))
            stack.callback(hook.remove)
        output = run_example(model, given, label)
    logits = main_output(output)
    if logits is None:
        raise AttachError(
            f"the {label} returns no tensor; kdlayers needs a model that returns logits"
        )
    if logits.dim() == 0:
        raise AttachError(
            f"the {label} returns a single number, such as a loss; kdlayers needs a model that "
            "returns logits"
        )
    for name, (tensor, version) in tensors.items():
        calls[name].changed = version is None or _version(tensor) != version
        calls[name].stated = statements.of(tensor)
        if name:
            last = _last_child(model.get_submodule(name), name)
            calls[name].shared = max(1, runs[model.get_submodule(last)])
    calls |= _iterated(model, calls)
    return Trace(
        model,
        calls,
        logits,
        image_size(example) or (1, 1),
        label,
        unclear=why_unclear(output, image_size(example)),
        detections=is_detections(output),
        volumes=has_volumes(example),
        changes_input=versions != [_version(tensor) for _, tensor in leaves(given)],
        changed_buffers=changed_buffers,
        example=example,
    )


def _version(tensor: Tensor) -> int | None:
    """The in-place counter; None for a tensor of a forward under torch.inference_mode()."""
    return None if tensor.is_inference() else tensor._version


def _iterated(model: nn.Module, calls: Mapping[str, Call]) -> dict[str, Call]:
    """Calls for Sequentials that were not called themselves, but whose children ran one by one.

    Gradient checkpointing is often implemented as such a loop over the children. The output of the
    last child is the output that the Sequential would have returned.
    """
    found: dict[str, Call] = {}
    for name, module in plainly_named(model):
        last = _last_child(module, name)
        if name and name not in calls and last in calls:
            found[name] = replace(calls[last], name=name)
    return found


def _last_child(module: nn.Module, name: str) -> str:
    """Name of the last child of a Sequential, recursively; this child gets the KD layer's hook."""
    while isinstance(module, nn.Sequential) and runs_forward_of(module, nn.Sequential):
        key, last = next(reversed(child_table(module).items()), ("", None))
        if last is None or is_batch_norm(last):
            break
        name, module = f"{name}.{key}", last
    return name


class _Statements:
    """Layouts that convolutions and norms declare for the tensors they produced or consumed."""

    def __init__(self) -> None:
        self.kinds: dict[int, set[Kind]] = {}
        self.kept: list[Tensor] = []  # so that no later tensor has the same id

    def note(self, module: nn.Module, args: Any, output: Any) -> None:
        kind = stated_kind(module)
        for tensor in (output, *args) if kind is not None else ():
            if isinstance(tensor, Tensor) and tensor.dim() == 4 and kind is not None:
                self.kinds.setdefault(id(tensor), set()).add(kind)
                self.kept.append(tensor)

    def of(self, tensor: Tensor) -> Kind | None:
        kinds = self.kinds.get(id(tensor), set())
        return next(iter(kinds)) if len(kinds) == 1 else None
