"""Small networks for tests that look inside."""

import torch
from torch import Tensor, nn


class Net(nn.Module):
    """stem -> first -> last -> pool -> head, each a module that can be tapped."""

    def __init__(self, channels: int = 4, classes: int = 3, stride: int = 1) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, channels, 3, stride, 1), nn.BatchNorm2d(channels))
        self.first = nn.Sequential(nn.ReLU(), nn.Conv2d(channels, channels, 3, 2, 1), nn.ReLU())
        self.last = nn.Sequential(nn.Conv2d(channels, channels + 1, 3, 1, 1), nn.ReLU())
        self.head = nn.Linear(channels + 1, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.last(self.first(self.stem(x))).mean((2, 3)))


def batch(size: int = 6, classes: int = 3, pixels: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images and labels in which every class occurs."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(size, 3, pixels, pixels, generator=generator)
    return images, torch.arange(size) % classes
