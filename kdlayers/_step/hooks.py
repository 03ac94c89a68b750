"""Hooks that put a KD layer into a model and record what the losses need.

A batch takes this way through them. `OpenForward`, before the student's forward, decides whether to
record. `InsertLayer`, after the module at a KD point, sends the features through the KD layer and
records the scores. `Capture` records plain features. `CloseForward`, after the student's forward,
records the logits. `KDHandle.loss` then reads the tape.

The hook objects hold names, not modules, and find the layer from the module they are called with:
a deep copy, an unpickled model or a replica then runs its own layer, not the original's. Copies get
an empty tape that never records.
"""

import sys
from typing import Any
from weakref import WeakSet, ref

import torch
from torch import Tensor, nn
from torch.jit import is_tracing  # type: ignore[attr-defined]

from kdlayers._models.outputs import main_output
from kdlayers._step.slot import SLOT, Slot
from kdlayers._step.tape import Forward, Tape, version_of
from kdlayers._utils.torch_internals import current_backward, drop_hooks
from kdlayers._utils.tree import Path, pick, put
from kdlayers.errors import AttachError

# Before about torch 2.13, is_exporting() says True inside every graph that torch.compile traces.
_CONFUSES_EXPORT = tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 13)


_LIVE: "WeakSet[InsertLayer]" = WeakSet()
"""Every hook of a KD layer in this process, also those of copies."""
_FOUND: list[bool] = []
"""torch.compile's setting before the first of them."""


class InsertLayer:
    """Forward hook that sends a module's output through the KD layer stored below it."""

    def __init__(self, name: str, store: tuple[str, ...], path: Path, tape: Tape) -> None:
        self.name = name
        self.store = store
        self.path = path
        self.tape = tape
        _LIVE.add(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Unpickled or copied students are compiled too."""
        self.__dict__.update(state)
        _LIVE.add(self)
        guard_hooks()

    def slot(self, module: nn.Module) -> Slot:
        """The layer that belongs to ``module``.

        Raises:
            AttachError: if another tool has moved the hook to a module without the layer.
        """
        layer = descend(module, self.store)._modules.get(SLOT)  # pyright: ignore[reportPrivateUsage]
        if layer is None:
            raise AttachError(
                f"the KD layer at {self.name!r} is gone: its module was replaced by a "
                f"{type(module).__name__}, as fuse_modules does; fuse before attach_kd, or take a "
                "copy with plain submodules, bake(student), and fuse that"
            )
        return layer  # type: ignore[return-value]

    def __call__(self, module: nn.Module, _args: Any, output: Any) -> Any:
        """The output with the layer's features in the place of the module's."""
        path, tape = self.path, self.tape
        features = pick(output, path) if path else output
        # Through __call__, not a method: FSDP gathers the layer's parameters in its own hooks.
        features, scores, templates = self.slot(module)(features, insert=True)
        if tape.active and tape.forward is not None:
            tape.forward.record_scores(self.name, (scores, templates))
        return put(output, path, features) if path else features


class Capture:
    """Forward hook that records a module's output as the next module gets it.

    A later module may change the features in place, and in training only, as
    ``nn.Dropout(inplace=True)`` does. So the first forward records a copy; later ones do so where
    the first one showed a change, and under torch.compile, which hides in-place changes.
    """

    def __init__(self, name: str, path: Path, tape: Tape, copies: bool | None) -> None:
        self.name = name
        self.path = path
        self.tape = tape
        self.copies = copies
        """Whether features are changed in place after this module; None: not known yet."""

    def __call__(self, _module: nn.Module, _args: Any, output: Any) -> None:
        """Record the features."""
        forward = self.tape.forward
        if not self.tape.active or forward is None:
            return
        features = pick(output, self.path)
        if torch.compiler.is_compiling():
            forward.record_features(self.name, features.clone())
            return
        forward.watched.append((self, features, features._version))
        copies = self.copies is not False
        forward.record_features(self.name, features.clone() if copies else features)


class OpenForward:
    """Forward pre-hook of the whole student: decides whether this forward is recorded."""

    def __init__(self, tape: Tape) -> None:
        self.tape = tape

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Record training forwards with gradient; not exports, traces or recomputations."""
        tape = self.tape
        if tape.manual:
            return
        recording = tape.armed and module.training and torch.is_grad_enabled()
        recording = recording and not _is_exporting()
        if recording and not torch.compiler.is_compiling():
            # Reentrant checkpointing and checkpoint(student) run the forward again inside backward.
            # A torch that does not tell counts such forwards, and loss() refuses.
            recording = current_backward() == -1 and not is_tracing()
        # Assigned each time: a forward that ended in an exception cannot leave it set.
        tape.active = recording
        if recording:
            tape.forward = Forward(args, kwargs, copies=tape.copies)
            if tape.ranks is not None and not torch.compiler.is_compiling():
                tape.forward.on_all_ranks = tape.ranks.forward(module)


class CloseForward:
    """Forward hook of the whole student: keeps the logits and counts completed forwards."""

    def __init__(self, tape: Tape) -> None:
        self.tape = tape

    def __call__(self, _module: nn.Module, _args: Any, output: Any) -> None:
        """End the recording that `OpenForward` began; with no output the forward has failed."""
        tape = self.tape
        forward = tape.forward
        if not tape.active or tape.manual or forward is None:
            return
        if output is None:
            tape.fail()
            return
        tape.active = False
        tape.done += 1
        forward.output, forward.compiled = output, torch.compiler.is_compiling()
        if not isinstance(output, Tensor) and forward.compiled:
            return  # the logits are looked for outside of the graph
        logits = output if isinstance(output, Tensor) else main_output(output)
        if logits is None:
            return
        forward.logits, forward.version = logits, version_of(logits)
        if logits.requires_grad and not forward.compiled:
            watch_backward(tape, forward, logits)
            if forward.on_all_ranks and tape.ranks is not None:
                tape.ranks.average_after(logits)


def watch_backward(tape: Tape, forward: Forward, logits: Tensor) -> None:
    """Let a backward pass through the logits close their forward: it asked for no KD loss."""
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
    """Take away the hooks that only record on this tape; KD layers stay."""
    for module in student.modules():
        drop_hooks(module, lambda hook: is_recording(hook) and getattr(hook, "tape", None) is tape)


def is_recording(hook: Any) -> bool:
    """Whether this is a hook that only records."""
    return isinstance(hook, (OpenForward, CloseForward, Capture))


def guard_hooks(*, reset: bool = False) -> None:
    """Make torch.compile look whether modules have hooks before it reuses a graph.

    Models of one class share their graphs, and by default hooks are not compared: with a plain
    instance compiled first, one with KD layers would run without them. ``reset`` also drops the
    graphs made so far.
    """
    if reset or "torch._dynamo" in sys.modules:
        from torch import _dynamo

        if not _FOUND:
            _FOUND.append(_dynamo.config.skip_nnmodule_hook_guards)
        _dynamo.config.skip_nnmodule_hook_guards = False
        if reset:
            _dynamo.reset()


def unguard_hooks() -> None:
    """Give torch.compile's setting back as it was found, once no KD layer is left in any model."""
    if _FOUND and not _LIVE:
        from torch import _dynamo

        _dynamo.config.skip_nnmodule_hook_guards = _FOUND.pop()


def descend(module: nn.Module, store: tuple[str, ...]) -> nn.Module:
    """The descendant of ``module`` that the child names lead to."""
    for name in store:
        module = module._modules.get(name, module)  # type: ignore[assignment]
    return module


def _is_exporting() -> bool:
    if _CONFUSES_EXPORT and torch.compiler.is_dynamo_compiling():
        return False
    return torch.compiler.is_exporting()
