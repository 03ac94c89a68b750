"""Standardises a teacher's features with statistics over all batches so far."""

import torch
from torch import Tensor, nn

from kdlayers._utils.distributed import all_sum, world_size
from kdlayers.functional._checks import work_dtype

_EPS = 1e-6


class TeacherNorm(nn.Module):
    """Mean 0 and variance 1 for every channel, over the batches seen in train mode.

    The statistics are plain averages over all batches with equal weights, so they converge in
    training of any length. Under ``torch.distributed`` they cover all ranks.
    """

    mean: Tensor
    var: Tensor
    count: Tensor

    def __init__(self, channels: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels, dtype=dtype, device=device))
        self.register_buffer("var", torch.ones(channels, dtype=dtype, device=device))
        self.register_buffer("count", torch.zeros((), dtype=torch.long, device=device))

    @torch.no_grad()
    def forward(self, features: Tensor, channel_dim: int) -> Tensor:
        """``features``, standardised, of the same shape."""
        rows = features.movedim(channel_dim, -1)
        if self.training:
            self._update(rows.flatten(0, -2))
        return ((rows - self.mean) * (self.var + _EPS).rsqrt()).movedim(-1, channel_dim)

    def _update(self, rows: Tensor) -> None:
        var, mean = torch.var_mean(rows.to(self.mean.dtype), dim=0, correction=0)
        if world_size() > 1:  # the variance of equal parts: their mean plus that of the means
            mean_of_all = all_sum(mean) / world_size()
            var = all_sum(var + (mean - mean_of_all).square()) / world_size()
            mean = mean_of_all
        self.count.add_(1)
        share = self.count.to(mean.dtype).reciprocal()
        shift = mean - self.mean
        self.mean.add_(shift * share)
        self.var.add_((var - self.var) * share + shift.square() * share * (1 - share))


def norm_for(features: Tensor, channel_dim: int) -> TeacherNorm:
    """A norm for features like these."""
    return TeacherNorm(features.shape[channel_dim], work_dtype(features), features.device)


def norm_like(state: dict[str, Tensor], name: str) -> TeacherNorm | None:
    """A norm like the one that a state dict holds under ``name``; None if it holds none."""
    mean = state.get(f"{name}.mean")
    return None if mean is None else TeacherNorm(len(mean), mean.dtype, mean.device)
