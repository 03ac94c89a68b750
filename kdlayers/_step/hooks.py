"""Hooks that put a KD layer into a model and record what the losses need.

The hooks of one batch run in this order. `OpenForward` runs before the student's forward and
decides whether to record. `InsertLayer` runs after the module at a KD point, applies the KD layer
to the features and records the scores. `Capture` records plain features. `CloseForward` runs after
the student's forward and records the logits. `KDHandle.loss` then reads the tape.

Hook objects hold names instead of modules, and find the layer from the module that calls them. So
a deep copy, an unpickled model or a replica runs its own layer, not the original's. Copies get an
empty tape that never records.
"""

import sys
from typing import Any
from weakref import WeakSet, ref

import torch
from torch import Tensor, nn
from torch.jit import is_tracing  # type: ignore[attr-defined]

from kdlayers._models.outputs import features_of, main_output
from kdlayers._models.wrappers import CHECKPOINTED, innermost
from kdlayers._step.slot import SLOT, Slot
from kdlayers._step.tape import Forward, Tape, version_of
from kdlayers._utils.torch_internals import (
    BIASED,
    current_backward,
    drop_hooks,
    missing_in_ddp,
    reserve_hook_key,
)
from kdlayers._utils.tree import Path, put
from kdlayers.errors import AttachError

# Before about torch 2.13, is_exporting() says True inside every graph that torch.compile traces.
_CONFUSES_EXPORT = tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 13)


_LIVE: "WeakSet[InsertLayer]" = WeakSet()
"""All hooks of KD layers in this process, including those of copies."""
_FOUND: list[bool] = []
"""The setting of torch.compile before the first hook was made."""


class _Hook:
    """A hook of a module, which keeps its place there when both are unpickled."""

    key = -1
    """The key of the hook in its module; set where it is registered."""

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        reserve_hook_key(self.key)


class _FeatureHook(_Hook):
    """A hook of the module ``name``, whose output has the features at ``path``."""

    name: str
    path: Path

    def features(self, output: Any) -> Any:
        """The features in the module's output; the output itself, if that is a tensor."""
        usual = isinstance(output, Tensor) and not self.path
        return output if usual else features_of(output, self.path, self.name)


class InsertLayer(_FeatureHook):
    """Forward hook that applies a KD layer to a module's output; the module holds the layer."""

    def __init__(
        self, name: str, store: tuple[str, ...], path: Path, tape: Tape, biased: bool
    ) -> None:
        self.name = name
        self.store = store
        self.path = path
        self.tape = tape
        self.biased = biased
        """Whether the module is a convolution or a linear layer with a bias."""
        _LIVE.add(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Register the hook of an unpickled or copied student, which may be compiled too."""
        super().__setstate__(state)
        _LIVE.add(self)
        guard_hooks()

    def slot(self, module: nn.Module) -> Slot:
        """The KD layer of ``module``.

        Raises:
            AttachError: if another tool has moved the hook to a module that has no KD layer, or
                has fused the module with a batch norm, which gives it a bias.
        """
        layer = descend(module, self.store)._modules.get(SLOT)  # pyright: ignore[reportPrivateUsage]
        if layer is None:
            raise AttachError(
                f"the KD layer at {self.name!r} is missing: its module was replaced by a "
                f"{type(module).__name__}, for example by fuse_modules; fuse before attach_kd, or "
                "fuse bake(student), a copy whose KD layers are plain submodules"
            )
        if has_bias(module) != self.biased:
            raise AttachError(
                f"the module at {self.name!r} has been fused with a batch norm, so its KD layer "
                "would get other features; fuse before attach_kd, or fuse bake(student), a copy "
                "whose KD layers are plain submodules"
            )
        return layer  # type: ignore[return-value]

    def __call__(self, module: nn.Module, _args: Any, output: Any) -> Any:
        """Replace the module's features in the output by those of the KD layer."""
        path, tape = self.path, self.tape
        features = self.features(output)
        # Through __call__, not a method: FSDP gathers the layer's parameters in its own hooks.
        features, scores, templates = self.slot(module)(features, insert=True)
        if tape.active and tape.forward is not None:
            tape.forward.record_scores(self.name, (scores, templates))
        elif tape.armed and module.training and _may_recompute():
            # A recomputation in backward needs the graph of the forward, which returns the scores.
            tape.spare = scores, templates
        return put(output, path, features) if path else features


class Capture(_FeatureHook):
    """Forward hook that records a module's output as the next module receives it.

    A later module may change the features in place, sometimes in training only, such as
    ``nn.Dropout(inplace=True)``. So the first forward also records a copy, which the losses read if
    the features were changed. Later forwards record a copy only if an earlier one showed such a
    change, or under torch.compile, which hides in-place changes.
    """

    def __init__(self, name: str, path: Path, tape: Tape, copies: bool | None) -> None:
        self.name = name
        self.path = path
        self.tape = tape
        self.copies = copies
        """Whether a later module changes the features in place; None if not known yet."""

    def __call__(self, _module: nn.Module, _args: Any, output: Any) -> None:
        """Record the features."""
        forward = self.tape.forward
        if not self.tape.active or forward is None:
            return
        features = self.features(output)
        if torch.compiler.is_compiling():
            forward.record_features(self.name, features.clone())
            return
        forward.watched.append((self, features, features._version))
        copies = self.copies is not False
        forward.record_features(self.name, features.clone() if copies else features)


class OpenForward(_Hook):
    """Forward pre-hook of the whole student: decides whether this forward is recorded."""

    wrapper_checked = False

    def __init__(self, tape: Tape) -> None:
        self.tape = tape

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Record training forwards with gradients, but not exports, traces or recomputations."""
        tape = self.tape
        if tape.manual:
            return
        recording = tape.armed and module.training and torch.is_grad_enabled()
        recording = recording and not _is_exporting()
        if recording and not torch.compiler.is_compiling():
            # Reentrant checkpointing and checkpoint(student) run the forward again inside backward.
            # Versions of torch that do not report this count such forwards, and loss() raises.
            recording = current_backward() == -1 and not is_tracing()
            if recording and not self.wrapper_checked:
                _check_wrapper(module)
                self.wrapper_checked = True
        # Set in every forward, so that a forward that raised cannot leave it on.
        tape.active = recording
        if recording:
            tape.forward = Forward(args, kwargs, copies=tape.copies)
            if tape.ranks is not None and not torch.compiler.is_compiling():
                tape.forward.on_all_ranks = tape.ranks.forward(module)


class CloseForward(_Hook):
    """Forward hook of the whole student: keeps the logits and counts completed forwards."""

    def __init__(self, tape: Tape) -> None:
        self.tape = tape

    def __call__(self, module: nn.Module, _args: Any, output: Any) -> None:
        """End the recording that `OpenForward` began. No output means that the forward failed."""
        tape = self.tape
        forward = tape.forward
        if not tape.active or forward is None:
            return
        if tape.manual:
            trains = module.training and torch.is_grad_enabled() and output is not None
            if trains and not torch.compiler.is_compiling():
                forward.outputs.append(output)
            return
        if output is None:
            tape.fail()
            return
        tape.active = False
        tape.done += 1
        forward.output, forward.compiled = output, torch.compiler.is_compiling()
        if not isinstance(output, Tensor) and forward.compiled:
            return  # the logits are searched outside of the graph
        logits = output if isinstance(output, Tensor) else main_output(output)
        if logits is None:
            return
        forward.logits, forward.version = logits, version_of(logits)
        if logits.requires_grad and not forward.compiled:
            watch_backward(tape, forward, logits)
            if forward.on_all_ranks and tape.ranks is not None:
                tape.ranks.average_after(logits)


def _check_wrapper(student: nn.Module) -> None:
    """Raise AttachError if DistributedDataParallel wrapped the student before attach_kd."""
    layers = (module for module in student.modules() if isinstance(module, Slot))
    if missing_in_ddp(parameter for layer in layers for parameter in layer.parameters()):
        raise AttachError(
            "DistributedDataParallel does not hold the parameters of the student's KD layers, so "
            "it would not synchronise them: call attach_kd(student, ...) first, then wrap the "
            "student"
        )


def watch_backward(tape: Tape, forward: Forward, logits: Tensor) -> None:
    """Let a backward pass through the logits discard their forward, which needed no KD loss."""
    generation, token, fired = tape.generation, ref(forward), False

    def close(_: Tensor) -> None:
        nonlocal fired
        if fired or tape.generation != generation:
            return
        fired = True  # a second backward through a retained graph closes nothing more
        tape.done -= 1
        if tape.forward is token():
            tape.forward = None

    logits.register_hook(close)


def end_recording(student: nn.Module, tape: Tape) -> None:
    """End the recording for good; called by `detach`, and when the handle is garbage."""
    tape.fail()
    tape.consume()
    tape.armed, tape.ranks = False, None
    drop_recording(student, tape)


def drop_recording(student: nn.Module, tape: Tape) -> None:
    """Remove the hooks that only record on this tape; KD layers stay."""
    for module in student.modules():
        drop_hooks(module, lambda hook: is_recording(hook) and getattr(hook, "tape", None) is tape)


def is_recording(hook: Any) -> bool:
    """Whether this hook only records."""
    return isinstance(hook, (OpenForward, CloseForward, Capture))


def guard_hooks(*, reset: bool = False) -> None:
    """Make torch.compile check the hooks of modules before it reuses a graph.

    Models of one class share graphs, and by default torch.compile does not compare hooks. If a
    plain instance was compiled first, an instance with KD layers would run without them. ``reset``
    also drops all existing graphs.
    """
    if reset or "torch._dynamo" in sys.modules:
        from torch import _dynamo

        if not _FOUND:
            _FOUND.append(_dynamo.config.skip_nnmodule_hook_guards)
        _dynamo.config.skip_nnmodule_hook_guards = False
        if reset:
            _dynamo.reset()


def unguard_hooks() -> None:
    """Restore the setting of torch.compile once no model has a KD layer any more."""
    if _FOUND and not _LIVE:
        from torch import _dynamo

        _dynamo.config.skip_nnmodule_hook_guards = _FOUND.pop()


def has_bias(module: nn.Module) -> bool:
    """Whether this is a convolution or a linear layer with a bias."""
    return isinstance(module, BIASED) and module.bias is not None


def descend(module: nn.Module, store: tuple[str, ...]) -> nn.Module:
    """The descendant of ``module`` at a path of child names.

    Modules on the path may be in a checkpoint_wrapper, before or after attach_kd.
    """
    for name in ("", *store):
        child = module._modules.get(name)  # pyright: ignore[reportPrivateUsage]
        module = module if child is None else child
        # Looked up here, because every forward comes this way and wrappers are rare.
        if CHECKPOINTED in module._modules:  # pyright: ignore[reportPrivateUsage]
            module = innermost(module)
    return module


def _may_recompute() -> bool:
    """Whether torch.compile traces code that gradient checkpointing may run again."""
    return torch.compiler.is_compiling() and torch.is_grad_enabled() and not _is_exporting()


def _is_exporting() -> bool:
    if _CONFUSES_EXPORT and torch.compiler.is_dynamo_compiling():
        return False
    return torch.compiler.is_exporting()
