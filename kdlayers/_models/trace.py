"""Dry runs: what every module of a model returns, without leaving a trace in the model."""

import sys
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kdlayers._models.layouts import Layout, find_layout
from kdlayers._utils.tree import Path, first_tensor, leaves, main_tensor, pick
from kdlayers.errors import ArgumentError, AttachError, LayoutError


@dataclass
class Call:
    """One module's part in a dry run: where its features are in its output, and of what shape."""

    name: str
    path: Path
    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device
    order: int
    calls: int = 1
    changed: bool = False
    """Whether a later module changed the features in place."""


@dataclass
class Trace:
    """A dry run of a model: the calls in forward order, and the first tensor of the output."""

    model: nn.Module
    calls: dict[str, Call]
    logits: Tensor
    image: tuple[int, int]
    label: str

    @property
    def names(self) -> list[str]:
        """Names of the modules that gave features; the model itself is not among them."""
        return [name for name in self.calls if name]

    def call(self, name: str) -> Call:
        """The call of module ``name``, checked to be one that features can be taken from.

        Raises:
            AttachError: if the module did not run, ran more than once, or gave no features.
        """
        call = self.calls.get(name)
        if call is None:
            raise AttachError(
                f"module {name!r} of the {self.label} gave no features in a dry run: it is not "
                "called, or its output is no floating-point tensor; find_points(model) lists "
                "usable points"
            )
        if call.calls > 1:
            raise AttachError(
                f"module {name!r} of the {self.label} runs {call.calls} times in one forward, so "
                "its features are ambiguous; choose a module that runs once, find_points(model) "
                "lists them"
            )
        return call

    def layout(self, name: str) -> Layout:
        """Layout of the features of module ``name``."""
        shape = self.call(name).shape
        if shape[0] != self.logits.shape[0]:
            raise LayoutError(
                f"the output of {name!r} has shape {shape}, but the batch has "
                f"{self.logits.shape[0]} images: its first axis is not the batch; "
                "find_points(model) lists usable points"
            )
        return find_layout(name, self.model.get_submodule(name), self.model, shape, self.image)


def trace(model: nn.Module, example: tuple[Any, ...], label: str) -> Trace:
    """Run ``model`` once on ``example``, in eval mode, and note what every module returns."""
    example = to_model(example, model)
    calls: dict[str, Call] = {}
    tensors: dict[str, tuple[Tensor, int]] = {}

    def note(name: str, output: Any) -> None:
        found = main_tensor(output)
        if name in calls:
            calls[name].calls += 1
        elif found is not None:
            path, tensor = found
            shape = tuple(tensor.shape)
            calls[name] = Call(name, path, shape, tensor.dtype, tensor.device, len(calls))
            tensors[name] = (tensor, tensor._version)

    with ExitStack() as stack:
        stack.enter_context(undisturbed(model))
        stack.enter_context(torch.no_grad())
        for name, module in model.named_modules():
            hook = module.register_forward_hook(lambda _m, _a, out, name=name: note(name, out))
            stack.callback(hook.remove)
        logits = first_tensor(run_example(model, example, label))
    if logits is None:
        raise AttachError(
            f"the {label} returns no tensor; kdlayers needs a model that returns logits"
        )
    for name, (tensor, version) in tensors.items():
        calls[name].changed = tensor._version != version
    return Trace(model, calls, logits, image_size(example), label)


def ignored(traced: Trace, example: tuple[Any, ...], names: Sequence[str]) -> set[str]:
    """Those of the modules ``names`` whose features the model's output does not depend on."""
    model, features = traced.model, dict[str, Tensor]()

    def keep(name: str, output: Any) -> None:
        features[name] = pick(output, traced.calls[name].path)

    with ExitStack() as stack:
        stack.enter_context(undisturbed(model))
        stack.enter_context(torch.enable_grad())
        for name in names:
            module = model.get_submodule(name)
            hook = module.register_forward_hook(lambda _m, _a, out, name=name: keep(name, out))
            stack.callback(hook.remove)
        args = tuple(_differentiable(arg) for arg in to_model(example, model))
        outputs = [tensor for _, tensor in leaves(run_example(model, args, traced.label))]
    asked = [name for name, tensor in features.items() if tensor.requires_grad]
    reached = depend(outputs, [features[name] for name in asked])
    return {name for name, yes in zip(asked, reached, strict=True) if not yes}


def depend(outputs: Sequence[Tensor], inputs: Sequence[Tensor]) -> list[bool]:
    """For each of ``inputs``, whether one of ``outputs`` depends on it; their graph is freed."""
    outputs = [output for output in outputs if output.requires_grad]
    if not outputs or not inputs:
        return [False] * len(inputs)
    with torch.enable_grad():
        total = torch.stack([output.float().sum() for output in outputs]).sum()
    grads = torch.autograd.grad(total, inputs, allow_unused=True)
    return [isinstance(grad, Tensor) for grad in grads]  # None where nothing depends on it


def _differentiable(arg: Any) -> Any:
    """A floating-point tensor that a frozen model's features depend on, and that is no leaf."""
    if not isinstance(arg, Tensor) or not arg.is_floating_point():
        return arg
    return arg.detach().requires_grad_().clone()


def run_example(model: nn.Module, example: tuple[Any, ...], label: str) -> Any:
    """Output of ``model``, or an error that asks for ``example=``."""
    try:
        return model(*example)
    except Exception as error:
        shapes = [tuple(tensor.shape) for _, tensor in leaves(example)]
        raise ArgumentError(
            f"the {label} ({type(model).__name__}) could not run on an example of shape {shapes}: "
            f"{error}; pass example= with a small batch of your images{_ADVICE.get(label, '')}"
        ) from error


_ADVICE = {
    "teacher": "; or, since the teacher gets the student's images, teacher_transform= to fit them"
}


@contextmanager
def undisturbed(model: nn.Module) -> Generator[None, None, None]:
    """Eval mode for a while; every module's own training flag and all random states come back."""
    flags = [(module, module.training) for module in model.modules()]
    with torch.random.fork_rng(devices=cuda_devices(model)), _uncompiled():
        try:
            model.eval()
            yield
        finally:
            for module, flag in flags:
                module.training = flag


def _uncompiled() -> Any:
    """Dry runs of a model that torch.compile holds run plainly: compiling would take long."""
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    return torch.compiler.set_stance("force_eager")


def cuda_devices(model: nn.Module) -> list[int]:
    """Indices of the CUDA devices that hold parts of ``model``."""
    return sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})


def to_model(example: tuple[Any, ...], model: nn.Module) -> tuple[Any, ...]:
    """``example`` on the model's device; floating-point tensors in its dtype."""
    device, dtype = placement(model)

    def move(item: Any) -> Any:
        if not isinstance(item, Tensor):
            return item
        return item.to(device, dtype if item.is_floating_point() else None)

    return tuple(move(item) for item in example)


def placement(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Device and floating dtype of the model's first parameter or buffer."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            return tensor.device, tensor.dtype
    return torch.device("cpu"), torch.get_default_dtype()


def image_size(example: tuple[Any, ...]) -> tuple[int, int]:
    """Height and width of the images in ``example``; (1, 1) if there are none."""
    images = (tensor for _, tensor in leaves(example) if tensor.dim() == 4)
    image = next(images, None)
    return (1, 1) if image is None else (image.shape[2], image.shape[3])


def example_for(model: nn.Module, example: Any = None) -> tuple[Any, ...]:
    """The arguments of a dry run: the user's ``example``, or two zero images that suit the model.

    The size comes from timm's ``pretrained_cfg`` or the model's ``image_size``, else it is 224; the
    channels come from the first convolution.

    Raises:
        ArgumentError: if ``example`` is no tensor or tuple, or no first convolution is found.
    """
    if isinstance(example, Tensor):
        return (example,)
    if isinstance(example, (tuple, list)):
        return tuple(example)
    if example is not None:
        raise ArgumentError(
            f"example must be a tensor or a tuple of arguments, got {type(example).__name__}"
        )
    channels = _stated_channels(model)
    if channels is None:
        raise ArgumentError(
            f"no input can be made for {type(model).__name__}, which has no convolution; pass "
            "example= with a small batch of your images"
        )
    return (torch.zeros(2, channels, *_stated_size(model)),)


def _config(model: nn.Module) -> dict[str, Any]:
    """The description by timm of the model and its pretrained weights; empty for other models."""
    return getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}


def _stated_channels(model: nn.Module) -> int | None:
    """Channels of the images: of the convolution that timm names, as timm states, or the first."""
    config = _config(model)
    modules = dict(model.named_modules())
    named = modules.get(str(config.get("first_conv")))
    if isinstance(named, nn.Conv2d):
        return named.in_channels
    if config.get("input_size"):
        return int(config["input_size"][0])
    first = next((m for m in modules.values() if isinstance(m, nn.Conv2d)), None)
    return None if first is None else first.in_channels


def _stated_size(model: nn.Module) -> tuple[int, int]:
    config = _config(model)
    patches = getattr(getattr(model, "patch_embed", None), "img_size", None)
    for stated in (patches, getattr(model, "image_size", None), config.get("input_size")):
        if isinstance(stated, int):
            return stated, stated
        if isinstance(stated, (tuple, list)) and len(stated) >= 2:
            return stated[-2], stated[-1]
    return 224, 224
