"""The input of a dry run, and a forward on it.

The input is the user's example, or images for the model's configuration.
"""

from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from kdlayers._models.detectors import Pictures, is_detector, is_list_of_pictures
from kdlayers._models.layouts import Size
from kdlayers._utils.torch_internals import plain
from kdlayers._utils.tree import leaves, mapped
from kdlayers.errors import ArgumentError


def example_for(model: nn.Module, example: Any = None) -> tuple[Any, ...]:
    """The arguments of a dry run: the user's ``example``, or two zero images that suit the model.

    The size comes from timm's ``pretrained_cfg`` or the model's ``image_size``, else it is 224; the
    channels come from the first convolution.

    Raises:
        ArgumentError: if ``example`` is not a tensor or tuple, or no first convolution is found.
    """
    if is_detector(model):
        return (_of_detector(model, example),)
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
            f"no input can be made for {type(model).__name__}, which has no convolution of images "
            "(nn.Conv2d); pass example= with a small batch of your images"
        )
    return (torch.zeros(2, channels, *_stated_size(model), device="cpu"),)


def _of_detector(model: nn.Module, example: Any) -> Tensor:
    """The backbone's input: from a list of pictures, from a batch, or from zero images."""
    if isinstance(example, tuple) and len(example) == 1:
        example = example[0]
    if isinstance(example, Tensor):
        return example
    if is_list_of_pictures(example):
        return Pictures(model)(example)
    if example is not None:
        raise ArgumentError(
            "example of a detector must be a list of images [C, H, W], or a batch as its backbone "
            f"takes it, got {type(example).__name__}"
        )
    size = getattr(model.transform, "fixed_size", None) or (224, 224)
    return torch.zeros(2, _stated_channels(model) or 3, size[1], size[0], device="cpu")


def _config(model: nn.Module) -> dict[str, Any]:
    """The description by timm of the model and its pretrained weights; empty for other models."""
    return getattr(model, "pretrained_cfg", None) or getattr(model, "default_cfg", None) or {}


def _stated_channels(model: nn.Module) -> int | None:
    """Channels of the images: of timm's first convolution, as timm states, or of any first one."""
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


def run_example(model: nn.Module, example: tuple[Any, ...], label: str) -> Any:
    """Output of ``model``, or an error that asks for ``example=``."""
    try:
        return model(*example)
    except Exception as error:
        shapes = [tuple(tensor.shape) for _, tensor in leaves(example)]
        raise ArgumentError(
            f"the {label} ({type(model).__name__}) could not run on an example of shape {shapes}: "
            f"{error}; pass example= with a small batch of your images"
            f"{_OF_TEACHERS if label == 'teacher' else ''}"
            f"{_OF_PARTS if label == 'teacher' and len(shapes) > 1 else ''}"
        ) from error


_OF_TEACHERS = (
    "; the teacher gets the student's images: if it needs others, convert them with "
    "teacher_transform="
)
_OF_PARTS = (
    "; if only the student takes more than the images, such as a text, attach to its part that "
    "takes images, such as student.visual, and train the student as a whole"
)


def to_model(example: tuple[Any, ...], model: nn.Module) -> tuple[Any, ...]:
    """``example`` as plain tensors on the model's device; floating-point ones in its dtype."""
    device, dtype = placement(model)

    def move(tensor: Tensor) -> Tensor:
        return plain(tensor).to(device, dtype if tensor.is_floating_point() else None)

    moved: tuple[Any, ...] = mapped(example, move)
    return moved


def placement(model: nn.Module) -> tuple[torch.device, torch.dtype]:
    """Device and floating dtype of the model's inputs: those of its first parameter or buffer.

    Weights that are offloaded are on the meta device between forwards. They are loaded by hooks,
    which state the device on which they run the model.
    """
    tensors = [*model.parameters(), *model.buffers()]
    first = next((tensor for tensor in tensors if tensor.is_floating_point()), None)
    if first is None:
        return torch.device("cpu"), torch.get_default_dtype()
    if not first.is_meta and OFFLOAD_HOOK not in vars(model):
        return first.device, first.dtype
    stated = (_execution_device(vars(module).get(OFFLOAD_HOOK)) for module in model.modules())
    real = (tensor.device for tensor in tensors if not tensor.is_meta)
    found = next((device for device in chain(stated, real) if device is not None), first.device)
    return torch.device(found), first.dtype


OFFLOAD_HOOK = "_hf_hook"
"""Attribute with the hook that loads weights, as Hugging Face's libraries set it."""


def _execution_device(hook: Any) -> torch.device | str | int | None:
    """The device that such a hook, or the first that has one of a chain of hooks, states."""
    chained = map(_execution_device, getattr(hook, "hooks", ()))
    stated = chain([getattr(hook, "execution_device", None)], chained)
    return next((device for device in stated if device is not None), None)


def fresh(example: tuple[Any, ...]) -> tuple[Any, ...]:
    """The arguments with copies of all tensors, for a model that may change them in place."""
    copies: tuple[Any, ...] = mapped(example, lambda tensor: tensor.clone())
    return copies


def has_volumes(inputs: Any) -> bool:
    """Whether ``inputs`` are volumes or videos, of five axes, with no image among them."""
    return image_size(inputs) is None and any(t.dim() == 5 for _, t in leaves(inputs))


def image_size(inputs: Any) -> Size | None:
    """Height and width of the first images in ``inputs``; None if there are none."""
    image = next((tensor for _, tensor in leaves(inputs) if tensor.dim() == 4), None)
    return None if image is None else (image.shape[2], image.shape[3])
