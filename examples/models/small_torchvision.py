"""torchvision's MobileNetV2 for small images: fewer strides, any number of input channels."""

from __future__ import annotations

from torch import nn
from torchvision.models import mobilenet_v2 as full_size

FIRST_CHANNELS = 32  # of the stem at width 1
UNIT_STRIDES = ("features.0.0", "features.7.conv.1.0", "features.14.conv.1.0")


def mobilenet_v2(num_classes: int = 10, in_channels: int = 3, width: float = 32.0) -> nn.Module:
    """The network of torchvision with strides such that a quarter of the resolution is left.

    Three of its five strides become 1: of 28x28 images the last features have 7x7 positions. It has
    no dropout, so that it trains without random numbers.

    Args:
        num_classes: K, number of classes.
        in_channels: 1 for grey images, 3 for colours.
        width: channels of the stem; the others follow, as multiples of 8.
    """
    model = full_size(num_classes=num_classes, width_mult=width / FIRST_CHANNELS, dropout=0.0)
    for name in UNIT_STRIDES:
        model.get_submodule(name).stride = (1, 1)
    stem = model.features[0][0]
    if in_channels != stem.in_channels:
        model.features[0][0] = nn.Conv2d(in_channels, stem.out_channels, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(model.features[0][0].weight, mode="fan_out")
    return model
