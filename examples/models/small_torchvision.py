"""torchvision's MobileNetV2 and VGG for small images: fewer strides, any number of channels."""

from __future__ import annotations

from torch import nn
from torchvision.models import VGG
from torchvision.models import mobilenet_v2 as full_size
from torchvision.models.vgg import make_layers

FIRST_CHANNELS = 32  # of the stem at width 1
UNIT_STRIDES = ("features.0.0", "features.7.conv.1.0", "features.14.conv.1.0")


def mobilenet_v2(num_classes: int = 10, in_channels: int = 3, width: float = 32.0) -> nn.Module:
    """MobileNetV2 of torchvision with smaller strides: the last features have 1/4 resolution.

    Three of its five strides become 1, so 28x28 images give last features of 7x7 positions. It has
    no dropout, so training draws no random numbers.

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


def vgg(num_classes: int = 10, in_channels: int = 3, width: float = 16.0) -> VGG:
    """VGG of torchvision with batch norm and three stages of two convolutions.

    For 28x28 images, the last features, ``features.19``, have 7x7 positions. They are averaged and
    classified by one linear layer. Like `mobilenet_v2` above, it has no dropout.

    Args:
        num_classes: K, number of classes.
        in_channels: 1 for grey images, 3 for colours.
        width: channels of the first stage; the others have twice and four times as many.
    """
    first, second, third = (round(width * factor) for factor in (1, 2, 4))
    stages: list[str | int] = [first, first, "M", second, second, "M", third, third]
    model = VGG(make_layers(stages, batch_norm=True), num_classes, init_weights=False)
    model.features[0] = nn.Conv2d(in_channels, first, 3, padding=1)
    model.avgpool = nn.AdaptiveAvgPool2d(1)
    model.classifier = nn.Linear(third, num_classes)
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(module.bias)
    return model
