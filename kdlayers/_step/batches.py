"""Checks the batches of a data loader: images and labels."""

from collections.abc import Mapping
from types import NoneType
from typing import Any

from torch import Tensor, nn

from kdlayers._models.detectors import Pictures, is_list_of_pictures
from kdlayers._utils.torch_internals import plain
from kdlayers.errors import ArgumentError, ArgumentTypeError
from kdlayers.functional._checks import is_iterable

_HF = ("pixel_values", "labels")


FIT = "kd.fit"


def check_loader(loader: object, function: str = FIT) -> None:
    """Raise ArgumentTypeError unless ``loader`` is something to take batches from."""
    if is_iterable(loader) and not isinstance(loader, (nn.Module, Tensor, str, Mapping)):
        return
    models = "; the models are those of attach_kd" if function == FIT else ""
    raise ArgumentTypeError(
        f"{function}(loader) takes the training images in batches (images, labels), as a "
        f"DataLoader or a list yields them, got {type(loader).__name__}{models}"
    )


def as_batch(batch: Any, pictures: Pictures) -> Any:
    """A detector's batch, a list of images with or without targets, as its backbone takes it.

    The targets, one dict per image, are left out: nothing that is fitted reads boxes.
    """
    if is_list_of_pictures(batch):
        return pictures(batch)
    if isinstance(batch, (tuple, list)) and batch and is_list_of_pictures(batch[0]):
        return pictures(batch[0]), None
    return batch


def split_batch(batch: Any, function: str = FIT) -> tuple[Any, Tensor | None]:
    """Images and labels of a loader's batch: a pair, or images alone.

    A model with several inputs gets a tuple or list of tensors instead of the images, ``((a, b),
    labels)``, as the default collation makes them; they are returned as a tuple. Dicts must have
    the keys of Hugging Face's image models, ``pixel_values`` and ``labels``; a detector's boxes
    there are left out, as if there were no labels. Errors say that ``function`` got the batch.

    Raises:
        ArgumentError: if the batch is neither.
    """
    if isinstance(batch, Tensor):
        return batch, None
    if isinstance(batch, Mapping) and isinstance(batch.get(_HF[0]), Tensor):
        batch = tuple(batch.get(key) for key in _HF)
        if _are_boxes(batch[1]):
            batch = (batch[0], None)
    if isinstance(batch, (tuple, list)):
        images, labels = (*batch, None, None)[:2]
        sample = isinstance(labels, int) or (isinstance(labels, Tensor) and labels.dim() == 0)
        shape = list(labels.shape) if isinstance(labels, Tensor) else []
        second = len(shape) > 2 and isinstance(labels, Tensor) and labels.is_floating_point()
        if isinstance(images, (tuple, list)) and images:
            images = tuple(images) if all(isinstance(i, Tensor) for i in images) else None
        given = isinstance(images, (Tensor, tuple))
        if given and isinstance(labels, (Tensor, NoneType)) and not (sample or second):
            return images, None if labels is None else plain(labels)
        kinds = ", ".join(type(item).__name__ for item in batch)
        found = f"a {type(batch).__name__} ({kinds})"
        if sample:
            found += ", one sample of a data set: pass DataLoader(dataset, batch_size=64)"
        elif _are_boxes(labels):
            found += ", as a detector's loader gives: attach to the detector as a whole, "
            found += 'attach_kd(detector, teacher, at=["backbone...."]), or pass '
            found += (
                "kd.fit(loader, prepare=...), a function that makes (images, labels) of a batch"
            )
        elif second:
            found += f", of which the second has shape {shape}, like images: for a "
            found += "model with two inputs pass batches ((first, second), labels), and masks of "
            found += "classes as integers: kd.fit(loader, prepare=lambda batch: (batch[0], "
            found += "batch[1].long()))"
    elif isinstance(batch, Mapping):
        found = (
            f"a {type(batch).__name__} with the keys {list(batch)}; {_pairs_of(batch, function)}"
        )
    else:
        found = type(batch).__name__
    name = function.removeprefix("kd.")
    raise ArgumentError(f"{name}() expects batches (images, labels) of tensors, got {found}")


def _are_boxes(labels: Any) -> bool:
    """Whether this is a detector's list of dicts, one for each image; nothing fitted reads them."""
    return isinstance(labels, (tuple, list)) and any(isinstance(i, Mapping) for i in labels)


def _pairs_of(batch: Mapping[Any, Any], function: str) -> str:
    """What makes pairs of such batches."""
    tensors = {key: value for key, value in batch.items() if isinstance(value, Tensor)}
    images = next((key for key, value in tensors.items() if value.dim() >= 3), "images")
    if function != FIT:
        return f"pass the images alone: [batch[{images!r}] for batch in loader]"
    count = len(tensors[images]) if images in tensors else 0
    # A detector's batch has one label for each box, and no label for each image.
    each = [key for key, v in tensors.items() if key != images and v.dim() and len(v) == count]
    labels = next((key for key in each if not tensors[key].is_floating_point()), None)
    second = "None" if labels is None else f"batch[{labels!r}]"
    return (
        "pass a function that returns a pair: kd.fit(loader, prepare=lambda batch: "
        f"(batch[{images!r}], {second}))"
    )
