"""The KD layer in graphs of torch.fx: two functions, with the batch norm as a module between them.

As a module, the batch norm follows `train()` and `eval()` of the graph, as in the student itself.
"""

import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from kdlayers._utils.norms import cosines

# Single nodes in the graphs. Tools for quantisation leave them in float: eight bits are too few for
# the norms.
torch.fx.wrap("template_scores")
torch.fx.wrap("add_value")


def enhanced(
    x: Tensor,
    head: tuple[Tensor, Tensor],
    norm: nn.Module,
    value: tuple[Tensor, Tensor],
    alpha: float,
    channel_dim: int,
) -> Tensor:
    """The new features, by plain operations, from ``(weight, scale)`` of both products."""
    normed = norm(template_scores(x, *head, channel_dim))
    return add_value(x, normed, *value, alpha, channel_dim)


def template_scores(x: Tensor, weight: Tensor, scale: Tensor, channel_dim: int) -> Tensor:
    """Scores of the positions of all images, ``[positions, K]``."""
    return cosines(x.movedim(channel_dim, -1), weight, scale).flatten(0, -2)


def add_value(
    x: Tensor, normed: Tensor, weight: Tensor, scale: Tensor, alpha: float, channel_dim: int
) -> Tensor:
    """``x`` and the value of its normed scores ``[positions, K]``."""
    positions = x.movedim(channel_dim, -1).shape[:-1]
    value: Tensor = cosines(F.relu(normed), weight, scale).unflatten(0, positions)
    return x + (alpha * value.movedim(-1, channel_dim)).to(x.dtype)
