"""Networks for 32x32 images with other blocks than `cifar_resnet`.

``resnet50`` (K. He et al., CVPR 2016), ``shufflenet_v1`` (X. Zhang et al., CVPR 2018),
``shufflenet_v2`` (N. Ma et al., ECCV 2018) and ``mobilenet_v2_half`` (M. Sandler et al., CVPR
2018, half as wide), in the forms in which papers on distillation compare them on CIFAR-100: stems
and strides for small images, three groups in ShuffleNet V1, six-fold expansion in MobileNet V2.
``last`` is the last feature map before pooling.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Classifier(nn.Module):
    """Stem, stages one after the other, pooling and a linear classifier.

    Args:
        stem: from images to the first feature map.
        stages: the stages by name, in order; they become attributes.
        features: channels of the last stage.
        num_classes: outputs of the classifier.
    """

    def __init__(
        self, stem: nn.Module, stages: dict[str, nn.Module], features: int, num_classes: int
    ) -> None:
        super().__init__()
        self.stem = stem
        self.order = tuple(stages)
        for name, module in stages.items():
            self.add_module(name, module)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(features, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of images ``[B, 3, H, W]``."""
        x = self.stem(x)
        for name in self.order:
            x = getattr(self, name)(x)
        return self.fc(self.pool(x).flatten(1))


def conv_bn(
    inputs: int, outputs: int, kernel: int = 1, stride: int = 1, groups: int = 1, *, relu: bool
) -> nn.Sequential:
    """A padded convolution, a batch norm, and optionally a ReLU."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    parts = [conv, nn.BatchNorm2d(outputs), *([nn.ReLU()] if relu else [])]
    return nn.Sequential(*parts)


# ------------------------------------------------------------------ ResNet-50


class Bottleneck(nn.Module):
    """A bottleneck of 1x1, 3x3 and 1x1 convolutions, and a shortcut; ReLU after the sum."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = 4 * width
        self.conv1, self.bn1 = nn.Conv2d(inputs, width, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, stride, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3, self.bn3 = nn.Conv2d(width, outputs, 1, bias=False), nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.shortcut = conv_bn(inputs, outputs, stride=stride, relu=False)

    def forward(self, x: Tensor) -> Tensor:
        """Features of the next block."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = F.relu(self.bn2(self.conv2(y)))
        return F.relu(self.bn3(self.conv3(y)) + self.shortcut(x))


def resnet50(num_classes: int = 100) -> Classifier:
    """ResNet-50 with a 3x3 stem: ``layer1`` to ``layer4``, 2048 channels at an eighth."""
    stages, inputs = {}, 64
    for index, (blocks, width, stride) in enumerate(
        [(3, 64, 1), (4, 128, 2), (6, 256, 2), (3, 512, 2)], 1
    ):
        first = Bottleneck(inputs, width, stride)
        inputs = 4 * width
        rest = (Bottleneck(inputs, width, 1) for _ in range(blocks - 1))
        stages[f"layer{index}"] = nn.Sequential(first, *rest)
    stages["last"] = nn.Identity()
    model = Classifier(conv_bn(3, 64, 3, relu=True), stages, inputs, num_classes)
    return fan_out(model)


# ------------------------------------------------------------------ ShuffleNet


def shuffle(x: Tensor, groups: int) -> Tensor:
    """Interleave the channels of all groups."""
    return x.unflatten(1, (groups, -1)).transpose(1, 2).flatten(1, 2)


class GroupedUnit(nn.Module):
    """ShuffleNet V1's block: grouped 1x1, shuffle, depthwise 3x3, grouped 1x1.

    With stride 2, the pooled input is concatenated with the result instead of added.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, groups: int) -> None:
        super().__init__()
        made = outputs - inputs if stride == 2 else outputs
        middle = made // 4
        self.stride = stride
        self.groups = 1 if inputs == 24 else groups  # the stem has too few channels to group
        self.squeeze = conv_bn(inputs, middle, groups=self.groups, relu=True)
        self.depthwise = conv_bn(middle, middle, 3, stride, middle, relu=True)
        self.expand = conv_bn(middle, made, groups=groups, relu=False)

    def forward(self, x: Tensor) -> Tensor:
        """Features of the next block."""
        y = self.expand(self.depthwise(shuffle(self.squeeze(x), self.groups)))
        if self.stride == 1:
            return F.relu(x + y)
        return F.relu(torch.cat([y, F.avg_pool2d(x, 3, 2, padding=1)], dim=1))


def shufflenet_v1(num_classes: int = 100) -> Classifier:
    """ShuffleNet V1 of three groups: ``layer1`` to ``layer3``, 960 channels at an eighth."""
    stages, inputs = {}, 24
    for index, (blocks, outputs) in enumerate([(4, 240), (8, 480), (4, 960)], 1):
        first = GroupedUnit(inputs, outputs, 2, groups=3)
        rest = (GroupedUnit(outputs, outputs, 1, groups=3) for _ in range(blocks - 1))
        stages[f"layer{index}"], inputs = nn.Sequential(first, *rest), outputs
    stages["last"] = nn.Identity()
    return Classifier(conv_bn(3, 24, relu=True), stages, inputs, num_classes)


class SplitUnit(nn.Module):
    """ShuffleNet V2's block: convolves half of the channels and keeps the other half."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        half = channels // 2
        self.branch = nn.Sequential(
            conv_bn(half, half, relu=True),
            conv_bn(half, half, 3, groups=half, relu=False),
            conv_bn(half, half, relu=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Features of the next block."""
        kept, used = x.chunk(2, dim=1)
        return shuffle(torch.cat([kept, self.branch(used)], dim=1), 2)


class DownUnit(nn.Module):
    """ShuffleNet V2's downsampling block: computes both halves from all channels."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        half = outputs // 2
        self.left = nn.Sequential(
            conv_bn(inputs, inputs, 3, 2, inputs, relu=False), conv_bn(inputs, half, relu=True)
        )
        self.right = nn.Sequential(
            conv_bn(inputs, half, relu=True),
            conv_bn(half, half, 3, 2, half, relu=False),
            conv_bn(half, half, relu=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Features of the next block, at half the size."""
        return shuffle(torch.cat([self.left(x), self.right(x)], dim=1), 2)


def shufflenet_v2(num_classes: int = 100) -> Classifier:
    """ShuffleNet V2 of width 1: ``layer1`` to ``layer3`` (464 channels), ``last`` with 1024."""
    stages, inputs = {}, 24
    for index, (blocks, outputs) in enumerate([(4, 116), (8, 232), (4, 464)], 1):
        rest = (SplitUnit(outputs) for _ in range(blocks - 1))
        stages[f"layer{index}"] = nn.Sequential(DownUnit(inputs, outputs), *rest)
        inputs = outputs
    stages["last"] = conv_bn(inputs, 1024, relu=True)
    return Classifier(conv_bn(3, 24, relu=True), stages, 1024, num_classes)


# ------------------------------------------------------------------ MobileNet V2


class InvertedResidual(nn.Module):
    """An inverted residual: 1x1 expansion, depthwise 3x3, linear 1x1 projection."""

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        wide = inputs * expansion
        self.adds = stride == 1 and inputs == outputs
        self.conv = nn.Sequential(
            conv_bn(inputs, wide, relu=True),
            conv_bn(wide, wide, 3, stride, wide, relu=True),
            conv_bn(wide, outputs, relu=False),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Features of the next block."""
        return x + self.conv(x) if self.adds else self.conv(x)


def mobilenet_v2_half(num_classes: int = 100) -> Classifier:
    """MobileNet V2 of width 0.5: ``stage0`` to ``stage6``, ``last`` with 1280 channels at 2x2."""
    settings = [  # expansion, channels at full width, blocks, stride
        (1, 16, 1, 1),
        (6, 24, 2, 1),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    ]
    stages, inputs = {}, 16
    for index, (expansion, channels, blocks, stride) in enumerate(settings):
        outputs = channels // 2
        first = InvertedResidual(inputs, outputs, stride, expansion)
        rest = (InvertedResidual(outputs, outputs, 1, expansion) for _ in range(blocks - 1))
        stages[f"stage{index}"], inputs = nn.Sequential(first, *rest), outputs
    stages["last"] = conv_bn(inputs, 1280, relu=True)
    model = fan_out(Classifier(conv_bn(3, 16, 3, 2, relu=True), stages, 1280, num_classes))
    nn.init.normal_(model.fc.weight, std=0.01)
    nn.init.zeros_(model.fc.bias)
    return model


def fan_out(model: Classifier) -> Classifier:
    """He initialisation by fan-out; for depthwise kernels it counts all output channels."""
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            outputs = module.out_channels * math.prod(module.kernel_size)
            nn.init.normal_(module.weight, std=math.sqrt(2 / outputs))
    return model
