"""Networks of the accuracy benchmark: made, trained with a one-cycle rate, and counted."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import torch
from _accuracy_data import Splits
from common.training import Recipe, Training, device_of
from models.cifar_resnet import make
from models.small_torchvision import mobilenet_v2, vgg
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.flop_counter import FlopCounterMode

from kdlayers import KDHandle

SMALL_TORCHVISION: dict[str, Callable[..., nn.Module]] = {"mobilenet_v2": mobilenet_v2, "vgg": vgg}


def digest(recipe: Recipe) -> str:
    """A hash of a recipe, twelve hexadecimal digits. It does not depend on the order of keys."""
    text = json.dumps(recipe, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def new_model(name: str, splits: Splits, seed: int, **options: float) -> nn.Module:
    """A network for these images, with the initial weights of ``seed``."""
    torch.manual_seed(seed)
    if name in SMALL_TORCHVISION:
        small = SMALL_TORCHVISION[name]
        model: nn.Module = small(splits.classes, in_channels=splits.channels, **options)
    else:
        model = make(name, num_classes=splits.classes, in_channels=splits.channels, **options)
    return model.to(memory_format=torch.channels_last)


def one_cycle(
    model: nn.Module,
    kd: KDHandle | None,
    recipe: Recipe,
    steps: int,
    checkpoint: Path | None = None,
) -> Training:
    """A training with a one-cycle learning rate.

    Args:
        model: the network.
        kd: the handle, if the method has a teacher.
        recipe: epochs, lr, weight_decay, precision and, if it is not 1, ce_weight.
        steps: number of batches in an epoch.
        checkpoint: the checkpoint to resume from and to write.
    """

    def schedule(optimizer: Optimizer) -> OneCycleLR:
        total = recipe["epochs"] * steps
        return OneCycleLR(
            optimizer, recipe["lr"], total_steps=total, pct_start=0.1, cycle_momentum=False
        )

    how = {"ce_weight": recipe.get("ce_weight", 1.0)}
    how["bfloat16"] = recipe["precision"] == "bfloat16"
    return Training(model, kd, recipe, schedule, checkpoint, **how)


@torch.no_grad()
def macs(model: nn.Module, splits: Splits) -> int:
    """Multiply-adds of convolutions and matrix products for one image, with the KD layers."""
    image = splits.test.normalised(splits.test.pixels[:1]).to(device_of(model))
    with FlopCounterMode(display=False) as counter:
        model.eval()(image)
    return counter.get_total_flops() // 2


def matching_width(
    name: str, splits: Splits, target: int, count: Callable[[nn.Module], int]
) -> float:
    """The width for which ``count(model)`` is nearest to ``target``."""
    widths = [4 + step / 4 for step in range(4 * 60)]
    counts = {}
    for width in widths:
        counts[width] = count(new_model(name, splits, 0, width=width))
        if counts[width] > target:
            break
    return min(counts, key=lambda width: abs(counts[width] - target))
