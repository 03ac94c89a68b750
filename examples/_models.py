"""Teacher and student of the quickstart: two RegNets of torchvision, made for small images."""

from __future__ import annotations

from torch import nn
from torchvision.models.regnet import BlockParams, RegNet

FIRST = "trunk_output.block3.block3-0"  # first block of the last stage
LAST = "trunk_output.block3"  # last stage: what the classifier sees, before pooling


def make_teacher(classes: int, channels: int, size: int) -> RegNet:
    """The larger network: 5 blocks of 32, 64 and 128 channels."""
    return regnet([1, 2, 2], [32, 64, 128], 32, classes, channels, size)


def make_student(classes: int, channels: int, size: int) -> RegNet:
    """The smaller network: 4 blocks of 16, 32 and 64 channels."""
    return regnet([1, 1, 2], [16, 32, 64], 16, classes, channels, size)


def regnet(
    depths: list[int], widths: list[int], group: int, classes: int, channels: int, size: int
) -> RegNet:
    """A RegNet whose last feature map is 4x4 for 28 or 32 pixels, 14x14 for 224."""
    strides = [2 if size >= 96 else 1, 2, 2]
    params = BlockParams(depths, widths, [group] * 3, [1.0] * 3, strides)
    model = RegNet(params, num_classes=classes, stem_width=widths[0])
    if channels != 3:
        model.stem[0] = nn.Conv2d(channels, widths[0], 3, stride=2, padding=1, bias=False)
    return model
