"""Runs the python blocks of a Markdown page, in order, with the names a user would have."""

import re

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

from kdlayers import CodebookTargets

CLASSES = 62


class SmallNet(nn.Module):
    """Stages and blocks named as in torchvision's ResNets, on 16x16 images."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stem = block(3, 8, stride=2)
        self.layer3 = nn.Sequential(block(8, width), block(width, width))
        self.layer4 = nn.Sequential(block(width, width), block(width, width))
        self.fc = nn.Linear(width, CLASSES)

    def forward(self, x):
        return self.fc(self.layer4(self.layer3(self.stem(x))).mean((2, 3)))


class Mirrored(TensorDataset):
    """Images and labels, every image mirrored half of the time."""

    def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
        image, label = super().__getitem__(index)
        return (image.flip(-1) if torch.rand(()) < 0.5 else image), label


def block(channels: int, width: int, stride: int = 1) -> nn.Module:
    """A convolution with its norm and activation."""
    conv = nn.Conv2d(channels, width, 3, stride, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(width), nn.ReLU())


def python_blocks(text: str) -> list[tuple[int, str]]:
    """Line number and code of every python block."""
    found = re.finditer(r"^```python\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [(text[: m.start(1)].count("\n"), m.group(1)) for m in found]


def names_of_a_user() -> dict[str, object]:
    """Two models, two loaders, an optimiser, and the latest batch: what a training script has."""
    images, labels = torch.randn(80, 3, 16, 16), torch.arange(80) % CLASSES
    plain_loader = [(images[:40], labels[:40]), (images[40:], labels[40:])]
    student = SmallNet(8)
    return {
        "torch": torch,
        "nn": nn,
        "F": F,
        "student": student,
        "make_student": lambda: SmallNet(8),
        "teacher": SmallNet(64),
        "plain_loader": plain_loader,
        "loader": plain_loader,
        "dataset": Mirrored(images, labels),
        "x": plain_loader[0][0],
        "y": plain_loader[0][1],
        "optimizer": torch.optim.SGD(student.parameters(), lr=0.01),
    }


def small_codebooks(monkeypatch, number=64) -> None:
    """Pages use the default of 4096 centres, which takes a minute to fit; replace it by 64."""
    assert CodebookTargets().num_templates == 4096
    monkeypatch.setattr(CodebookTargets.__init__, "__defaults__", (number,))


def run_page(text: str, title: str) -> int:
    """Run all blocks of a page in one namespace; the number of blocks."""
    names = names_of_a_user()
    blocks = python_blocks(text)
    for line, code in blocks:
        exec(compile("\n" * line + code, title, "exec"), names)
    return len(blocks)
