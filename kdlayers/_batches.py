"""What comes out of a data loader: images and labels, checked."""

from typing import Any

from torch import Tensor

from kdlayers.errors import ArgumentError, ArgumentTypeError, StaleCaptureError


def labels_for(targets: Tensor | None, logits: Tensor) -> Tensor | None:
    """The labels on the device of ``logits``, checked to be those of the same batch.

    Raises:
        ArgumentTypeError: if they are no tensor.
        StaleCaptureError: if their number is another.
    """
    if targets is None:
        return None
    if not isinstance(targets, Tensor):
        raise ArgumentTypeError(
            f"kd.loss(targets) takes the labels as a tensor, got {type(targets).__name__}"
        )
    if targets.dim() == 0 or targets.shape[0] != logits.shape[0]:
        raise StaleCaptureError(
            f"{tuple(targets.shape)} labels for a forward of {logits.shape[0]} images: these are "
            "the labels of another batch; call kd.loss(y) with the y of the last student(x)"
        )
    return targets.to(logits.device)


def split_batch(batch: Any) -> tuple[Any, Tensor | None]:
    """Images and labels of a loader's batch: a pair, or images alone.

    Raises:
        ArgumentError: if the batch is neither.
    """
    if isinstance(batch, Tensor):
        return batch, None
    if isinstance(batch, (tuple, list)):
        images, labels = (*batch, None, None)[:2]
        if isinstance(images, Tensor) and (labels is None or isinstance(labels, Tensor)):
            return images, labels
    raise ArgumentError(
        f"fit() expects batches (images, labels) of tensors, got {type(batch).__name__}; wrap the "
        "loader: [(b['image'], b['label']) for b in loader] shows the form"
    )
