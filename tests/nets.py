"""Small networks for tests that look inside."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


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


class Awkward(Net):
    """``again`` runs twice, ``side`` is off the path, ``idle`` never runs, ``norm`` is a norm."""

    checkpointed = None

    def __init__(self):
        super().__init__(4)
        self.again = nn.Sequential(nn.Conv2d(5, 5, 1), nn.ReLU())
        self.side = nn.Sequential(nn.Conv2d(3, 5, 1), nn.ReLU())
        self.idle = nn.Sequential(nn.Conv2d(3, 5, 1), nn.ReLU())
        self.norm = nn.BatchNorm2d(5)
        self.wide = Windows()

    def forward(self, x):
        self.side(x)
        self.wide(x)
        x = self.first(self.stem(x))
        x = checkpoint(self.last, x, use_reentrant=True) if self.checkpointed else self.last(x)
        return self.head(self.norm(self.again(self.again(x))).mean((2, 3)))


class Windows(nn.Module):
    """Its output has more rows than the batch has images, as inside windowed attention."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Sequential(nn.Conv2d(3, 5, 1))

    def forward(self, x):
        return self.conv(torch.cat([x[..., :4], x[..., 4:]]))


def batch(size: int = 6, classes: int = 3, pixels: int = 8, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Images and labels in which every class occurs."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(size, 3, pixels, pixels, generator=generator)
    return images, torch.arange(size) % classes


def losses_of_steps(student, kd, images: Tensor, labels: Tensor, steps: int) -> list[float]:
    """Train the student for some steps on one batch, and return the loss of each."""
    optimiser = torch.optim.SGD([*student.parameters(), *kd.parameters()], lr=0.05)
    found = []
    for _ in range(steps):
        optimiser.zero_grad()
        loss = F.cross_entropy(student(images), labels) + kd.loss(labels)
        loss.backward()
        optimiser.step()
        found.append(loss.item())
    return found
