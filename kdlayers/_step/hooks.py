"""Hooks that put a KD layer into a model and record what the losses need.

A batch takes this way through them: `OpenForward` (before the student's forward) clears the tape
and decides whether to record; `InsertLayer` (after a tapped module) sends the features through the
KD layer and lays the scores on the tape; `Capture` lays plain features there; `CloseForward` (after
the student's forward) keeps the logits. `KDHandle.loss` then reads the tape.

The hook objects hold names, not modules, and find the layer from the module they are called with:
a deep copy, an unpickled model or a replica then runs its own layer, not the original's. Copies get
an empty tape that never records.
"""

import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.jit import is_tracing  # type: ignore[attr-defined]

from kdlayers._layer.layer import KDLayer
from kdlayers._step.plain_state import may_keep_values
from kdlayers._utils.torch_internals import in_backward
from kdlayers._utils.tree import Path, first_tensor, pick, put

SLOT = "kd"
# Before about torch 2.13, is_exporting() says True inside every graph that torch.compile traces.
_CONFUSES_EXPORT = tuple(int(part) for part in torch.__version__.split(".")[:2]) < (2, 13)


class Slot(KDLayer):
    """A KD layer stored inside a model: it acts when its hook calls it, and only then.

    Called as a module it returns its input, so a parent that runs all its children is undisturbed.
    """

    def forward(self, x: Any, *_: Any, insert: bool = False, **__: Any) -> Any:
        """``x`` unchanged; with ``insert``, what `KDLayer.enhance` gives."""
        return self.enhance(x) if insert else x

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        # A checkpoint of the plain student has no keys of any KD layer: it loads strictly, and the
        # layers keep their values. load_state_dict works on its own copy of the dict.
        own = self.state_dict()
        if may_keep_values(state_dict, prefix, list(own), missing_keys):
            state_dict.update({prefix + key: value for key, value in own.items()})
        reports = missing_keys, unexpected_keys, error_msgs
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, *reports)


@dataclass
class Ahead:
    """What ``kd.teach`` learnt before the student ran, and of which inputs."""

    args: tuple[Any, ...]
    version: int | None
    taught: list[tuple[Tensor | None, dict[str, Tensor]]]


class Tape:
    """What one training forward of the student left for the losses."""

    def __init__(self, armed: bool = True) -> None:
        self.armed = armed
        self.manual = False
        self.active = False
        self.done = 0
        self.generation = 0
        self.ahead: Ahead | None = None
        self.clear()

    def clear(self) -> None:
        """Forget the recorded forward."""
        self.features: dict[str, Tensor] = {}
        self.repeated: str | None = None
        self.inputs: tuple[tuple[Any, ...], dict[str, Any]] | None = None
        self.version: int | None = None
        self.output: Any = None
        self.token: object = None

    def consume(self) -> None:
        """Forget everything, also the count of forwards that no loss has read."""
        self.clear()
        self.done = 0
        self.generation += 1

    def fail(self) -> None:
        """Let go of what a forward that ended in an exception has left, and of its teacher's."""
        self.active = False
        self.ahead = None
        self.clear()

    def open(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Start recording a forward of these inputs."""
        self.clear()
        self.inputs = (args, kwargs)
        self.version = version_of(args)

    def record(self, name: str, tensor: Tensor) -> None:
        """Keep ``tensor`` if a forward is being recorded."""
        if self.active:
            if name in self.features:
                self.repeated = name
            self.features[name] = tensor

    def __deepcopy__(self, memo: dict[int, Any]) -> "Tape":
        """Copies of the student record nothing, and take no tensors with them."""
        return Tape(armed=False)

    def __reduce__(self) -> tuple[type["Tape"], tuple[bool]]:
        """Pickles like a copy: empty and disarmed."""
        return (Tape, (False,))


class InsertLayer:
    """Forward hook that sends a module's output through the KD layer stored below it."""

    def __init__(self, name: str, store: tuple[str, ...], path: Path, tape: Tape) -> None:
        self.name = name
        self.store = store
        self.path = path
        self.tape = tape

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Unpickled or copied students are compiled too."""
        self.__dict__.update(state)
        guard_hooks()

    def slot(self, module: nn.Module) -> Slot:
        """The layer that belongs to ``module``."""
        return descend(module, self.store)._modules[SLOT]  # type: ignore[return-value]

    def __call__(self, module: nn.Module, _args: Any, output: Any) -> Any:
        """The output with the layer's features in the place of the module's."""
        # Through __call__, not a method: FSDP gathers the layer's parameters in its own hooks.
        features, scores, templates = self.slot(module)(pick(output, self.path), insert=True)
        self.tape.record(score_key(self.name), scores)
        if templates is not None:
            self.tape.record(templates_of(score_key(self.name)), templates)
        return put(output, self.path, features)


class Capture:
    """Forward hook that records a module's output as the next module gets it."""

    def __init__(self, name: str, path: Path, tape: Tape, clone: bool) -> None:
        self.name = name
        self.path = path
        self.tape = tape
        self.clone = clone

    def __call__(self, _module: nn.Module, _args: Any, output: Any) -> None:
        """Keep the tensor on the tape; a copy of it where a later module works in place."""
        features = pick(output, self.path)
        self.tape.record(self.name, features.clone() if self.clone else features)


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
            recording = not in_backward() and not is_tracing()
        # Assigned each time: a forward that ended in an exception cannot leave it set.
        tape.active = recording
        if recording:
            tape.open(args, kwargs)


class CloseForward:
    """Forward hook of the whole student: keeps the logits and counts completed forwards."""

    def __init__(self, tape: Tape) -> None:
        self.tape = tape

    def __call__(self, _module: nn.Module, _args: Any, output: Any) -> None:
        """End the recording that `OpenForward` began; with no output the forward has failed."""
        tape = self.tape
        if tape.active and not tape.manual:
            if output is None:
                tape.fail()
                return
            tape.active = False
            tape.output = output
            tape.done += 1
            if not torch.compiler.is_compiling():
                watch_backward(tape, output)


def watch_backward(tape: Tape, output: Any) -> None:
    """Let a backward pass through ``output`` close its forward: its step asked for no KD loss."""
    logits = first_tensor(output)
    if logits is None or not logits.requires_grad:
        return
    token = tape.token = object()
    generation, fired = tape.generation, False

    def close(_: Tensor) -> None:
        nonlocal fired
        if fired or tape.generation != generation:
            return
        fired = True  # a second backward through a retained graph closes nothing more
        tape.done -= 1
        if tape.token is token:
            tape.clear()

    logits.register_hook(close)


def guard_hooks(*, reset: bool = False) -> None:
    """Make torch.compile look whether modules have hooks before it reuses a graph.

    Models of one class share their graphs, and by default hooks are not compared: with a plain
    instance compiled first, one with KD layers would run without them. ``reset`` also drops the
    graphs made so far.
    """
    if reset or "torch._dynamo" in sys.modules:
        from torch import _dynamo

        _dynamo.config.skip_nnmodule_hook_guards = False
        if reset:
            _dynamo.reset()


def score_key(name: str) -> str:
    """Key of a KD layer's scores on the tape, apart from the features of the same module."""
    return f"scores of {name}"


def templates_of(key: str) -> str:
    """Key of the templates, where ``key`` holds unit features in the place of scores."""
    return f"templates for {key}"


def descend(module: nn.Module, store: tuple[str, ...]) -> nn.Module:
    """The descendant of ``module`` that the child names lead to."""
    for name in store:
        module = module._modules[name]  # type: ignore[assignment]
    return module


def version_of(args: tuple[Any, ...]) -> int | None:
    """In-place counter of the first tensor among ``args``, to notice later changes."""
    tensor = first_tensor(args)
    if tensor is None or (not torch.compiler.is_compiling() and tensor.is_inference()):
        return None
    return tensor._version


def _is_exporting() -> bool:
    if _CONFUSES_EXPORT and torch.compiler.is_dynamo_compiling():
        return False
    return torch.compiler.is_exporting()
