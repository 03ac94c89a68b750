"""The batch-norm arithmetic of the fused path, and when that path cannot be used."""

import torch
from torch import Tensor, nn

from kdlayers._utils.chunks import DEVICES
from kdlayers._utils.torch_internals import has_hooks
from kdlayers.errors import AttachError


def why_plain(norm: nn.Module, device: torch.device) -> str | None:
    """The reason why a KD layer with this norm must train with plain operations, or None."""
    if device.type not in DEVICES:
        return f"{device.type} device"
    if type(norm) is not nn.BatchNorm1d:
        return type(norm).__name__
    if norm.running_mean is None or norm.momentum is None or not norm.affine:
        return "batch norm without running averages" if norm.affine else "batch norm not affine"
    if has_hooks(norm):
        return "hooks on its batch norm"
    return None


def as_affine(norm: nn.BatchNorm1d) -> tuple[Tensor, Tensor]:
    """Gain and bias of the norm at inference, each ``[K]`` in float64.

    Raises:
        AttachError: if it has no running statistics.
    """
    if norm.running_mean is None or norm.running_var is None:
        raise AttachError(
            "a KD layer's batch norm has no running statistics, so there is nothing to fold; "
            "leave norm.track_running_stats as it is"
        )
    gain = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    return gain, norm.bias.double() - gain * norm.running_mean.double()


@torch.no_grad()
def update_statistics(norm: nn.BatchNorm1d, mean: Tensor, variance: Tensor, count: int) -> None:
    """Update the buffers as a batch norm does in training; ``variance`` is the biased one."""
    averages = ((norm.running_mean, mean), (norm.running_var, variance * (count / (count - 1))))
    for average, value in averages:
        average.lerp_(value.to(average.dtype), norm.momentum)  # type: ignore[union-attr, arg-type]
    norm.num_batches_tracked.add_(1)  # type: ignore[union-attr]
