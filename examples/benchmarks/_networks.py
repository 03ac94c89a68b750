"""The networks of the benchmarks: student-teacher pairs, and modules that return given features."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[1]))  # the networks of the examples

import torch
from models.cifar_resnet import resnet
from torch import Tensor, nn
from torchvision import models


class GivenFeatures(nn.Module):
    """Passes its input through two points, then through a linear classifier."""

    num_prefix_tokens, output_fmt = 1, "NCHW"

    def __init__(self, channels: int, classes: int) -> None:
        super().__init__()
        self.first, self.last = nn.Identity(), nn.Identity()
        self.fc = nn.Linear(channels, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.last(self.first(x))
        return self.fc(x.mean((2, 3) if x.dim() == 4 else 1))


class GivenTeacher(GivenFeatures):
    """Passes features of its own through the points and ignores its input."""

    def __init__(self, features: Tensor, channels: int, classes: int) -> None:
        super().__init__(channels, classes)
        self.register_buffer("features", features, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.features[: len(x)])


def cifar(classes: int) -> tuple[nn.Module, nn.Module]:
    """ResNet-20 and ResNet-56 for 32x32 pixels."""
    return resnet(20, num_classes=classes), resnet(56, num_classes=classes)


def imagenet(classes: int) -> tuple[nn.Module, nn.Module]:
    """ResNet-18 and ResNet-34 of torchvision."""
    return models.resnet18(num_classes=classes), models.resnet34(num_classes=classes)


def vit(classes: int) -> tuple[nn.Module, nn.Module]:
    """ViT-tiny and ViT-small of timm."""
    import timm

    tiny, small = "vit_tiny_patch16_224", "vit_small_patch16_224"
    return tuple(timm.create_model(name, num_classes=classes) for name in (tiny, small))


NETWORKS = {"cifar": cifar, "resnet": imagenet, "vit": vit}


@torch.no_grad()
def settle(network: nn.Module, images: Tensor) -> None:
    """Set the batch norms' statistics from these images. Without this, logits can be huge."""
    norms = [m for m in network.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.momentum = 1.0
    network.train()(images)
    for norm in norms:
        norm.momentum = 0.1
