"""Accuracy and size of a model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn


class Accuracy(NamedTuple):
    """Percentages of images whose class has the largest logit, or one of the five largest."""

    top1: float
    top5: float


@torch.no_grad()
def accuracy(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]]) -> Accuracy:
    """Top-1 and top-5 accuracy in %, over the images of all processes, in float32 and eval mode."""
    device = next(model.parameters()).device
    model.eval()
    counts = torch.zeros(3, dtype=torch.float64, device=device)
    for x, y in batches:
        logits, y = model(x.to(device)), y.to(device)
        first = logits.argmax(1) == y
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices == y[:, None]
        seen = torch.tensor(len(y), device=device)
        counts += torch.stack([first.sum(), best.any(1).sum(), seen])
    if dist.is_initialized():
        dist.all_reduce(counts)
    top1, top5, images = counts.tolist()
    return Accuracy(100 * top1 / images, 100 * top5 / images)


def parameters(model: nn.Module) -> int:
    """Number of parameters."""
    return sum(parameter.numel() for parameter in model.parameters())
