"""Residual networks for small images, as used on CIFAR in papers on distillation.

``resnet8`` to ``resnet110`` (K. He et al., CVPR 2016) with 1x1 convolutions where a shortcut
changes the shape, ``resnet8x4`` and ``resnet32x4`` (four times as wide), and wide ones such as
``wrn_40_2`` (S. Zagoruyko, N. Komodakis, BMVC 2016). All have three stages ``layer1`` to ``layer3``
at full, half and quarter resolution, so ``layer3.0`` is the first block of the last stage. ``last``
returns the last feature map before pooling: that of ``layer3``, in wide networks after a batch norm
and a ReLU. If stages have only one block (``resnet8``, ``resnet8x4``), nothing lies between the
points ``layer3.0`` and ``last``.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_eval


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut; ReLU after the sum."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = conv3x3(inputs, outputs, stride)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = conv3x3(outputs, outputs)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = nn.Sequential()
        if stride != 1 or inputs != outputs:
            projection = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Features of the next block."""
        y = F.relu(self.bn1(self.conv1(x)), inplace=True)
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x), inplace=True)


class PreActivationBlock(nn.Module):
    """Batch norm and ReLU come before each convolution; nothing after the sum."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = conv3x3(inputs, outputs, stride)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = conv3x3(outputs, outputs)
        self.shortcut = None
        if inputs != outputs:
            self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Features of the next block."""
        active = F.relu(self.bn1(x))
        y = F.relu(self.bn2(self.conv1(active)), inplace=True)
        # A projection shortcut uses the normalised input; an identity shortcut the block's input.
        return self.conv2(y) + (x if self.shortcut is None else self.shortcut(active))


class CifarNet(nn.Module):
    """Stem, three stages, pooling and a linear classifier.

    Args:
        block: creates a block from input channels, output channels and stride.
        blocks: number of blocks per stage.
        widths: channels of the stem and of the three stages.
        num_classes: outputs of the classifier.
        in_channels: channels of the images, 1 for grey ones.
    """

    def __init__(
        self,
        block: Callable[[int, int, int], nn.Module],
        blocks: int,
        widths: Sequence[int],
        *,
        num_classes: int = 100,
        in_channels: int = 3,
    ) -> None:
        super().__init__()
        stem, *stages = widths
        wide = block is PreActivationBlock
        self.conv1 = conv3x3(in_channels, stem)
        self.bn1 = nn.Identity() if wide else nn.BatchNorm2d(stem)
        self.relu = nn.Identity() if wide else nn.ReLU(inplace=True)
        strides = (1, 2, 2)
        inputs = [stem, *stages[:-1]]
        self.layer1, self.layer2, self.layer3 = (
            stage(block, blocks, *sizes) for sizes in zip(inputs, stages, strides, strict=True)
        )
        self.last = nn.Sequential(nn.BatchNorm2d(stages[-1]), nn.ReLU()) if wide else nn.Identity()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(stages[-1], num_classes)
        self.apply(initialise)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of images ``[B, C, H, W]``."""
        x = self.relu(self.bn1(self.conv1(x)))
        x = self.last(self.layer3(self.layer2(self.layer1(x))))
        return self.fc(self.pool(x).flatten(1))


def conv3x3(inputs: int, outputs: int, stride: int = 1) -> nn.Conv2d:
    """A 3x3 convolution that keeps the size, or halves it if the stride is 2."""
    return nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)


def stage(
    block: Callable[[int, int, int], nn.Module], blocks: int, inputs: int, outputs: int, stride: int
) -> nn.Sequential:
    """``blocks`` blocks; the first one changes channels and size."""
    first = block(inputs, outputs, stride)
    return nn.Sequential(first, *(block(outputs, outputs, 1) for _ in range(blocks - 1)))


def fold_batch_norm(model: CifarNet) -> CifarNet:
    """A copy for inference: folds the batch norms of basic blocks and stem into convolutions.

    Features and logits stay the same up to rounding. The names of the blocks do not change. Wide
    networks are not folded, because their batch norms come before the convolutions.
    """
    model = copy.deepcopy(model).eval()
    for block in (model, *model.layer1, *model.layer2, *model.layer3):
        if isinstance(block.bn1, nn.BatchNorm2d) and not isinstance(block, PreActivationBlock):
            block.conv1, block.bn1 = fuse_conv_bn_eval(block.conv1, block.bn1), nn.Identity()
        if isinstance(block, BasicBlock):
            block.conv2, block.bn2 = fuse_conv_bn_eval(block.conv2, block.bn2), nn.Identity()
            if len(block.shortcut):
                block.shortcut = nn.Sequential(fuse_conv_bn_eval(*block.shortcut))
    return model


def initialise(module: nn.Module) -> None:
    """He initialisation for convolutions; PyTorch's default for batch norms and classifier."""
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def resnet(
    depth: int,
    *,
    num_classes: int = 100,
    in_channels: int = 3,
    width: float = 16,
    stem: int | None = None,
) -> CifarNet:
    """A residual network of 6n + 2 layers with stages of 1, 2 and 4 times ``width`` channels.

    Args:
        depth: 8, 14, 20, 32, 44, 56, 110: 6n + 2 for n blocks per stage.
        num_classes: outputs of the classifier.
        in_channels: channels of the images.
        width: channels of the first stage, 16 in the papers. It may be fractional, to reach a given
            number of parameters: the channels of each stage are rounded.
        stem: channels of the first convolution; default: those of the first stage.
    """
    blocks, rest = divmod(depth - 2, 6)
    if rest or blocks < 1:
        raise ValueError(f"depth must be 6n + 2, such as 8, 14, 20, 32, 56 or 110, got {depth}")
    stages = [round(width * factor) for factor in (1, 2, 4)]
    widths = [stages[0] if stem is None else stem, *stages]
    return CifarNet(BasicBlock, blocks, widths, num_classes=num_classes, in_channels=in_channels)


def wide_resnet(
    depth: int, width: float, *, num_classes: int = 100, in_channels: int = 3
) -> CifarNet:
    """A wide residual network, WRN-``depth``-``width``; its first stage has 16 ``width`` channels.

    Args:
        depth: 10, 16, 22, 28, 40: 6n + 4 for n blocks per stage.
        width: widening factor.
        num_classes: outputs of the classifier.
        in_channels: channels of the images.
    """
    blocks, rest = divmod(depth - 4, 6)
    if rest or blocks < 1:
        raise ValueError(f"depth must be 6n + 4, such as 10, 16, 28 or 40, got {depth}")
    widths = [16, *(round(16 * width * factor) for factor in (1, 2, 4))]
    return CifarNet(
        PreActivationBlock, blocks, widths, num_classes=num_classes, in_channels=in_channels
    )


def make(name: str, **options: float) -> CifarNet:
    """The network with a name such as ``resnet20``, ``resnet8x4`` or ``wrn_16_2``."""
    kind, _, numbers = name.partition("_")
    try:
        if kind == "wrn":
            depth, width = (int(number) for number in numbers.split("_"))
            return wide_resnet(depth, width, **options)
        depth, _, times = name.removeprefix("resnet").partition("x")
        if times:  # stages of 16 times as many channels, on a stem half as wide as one expects
            options = {"width": 16 * int(times), "stem": 8 * int(times)} | options
        return resnet(int(depth), **options)
    except ValueError as error:
        hint = "names are resnet8 ... resnet110, resnet8x4, resnet32x4, wrn_16_2, wrn_40_1 ..."
        raise ValueError(f"there is no network {name!r}: {error}; {hint}") from None
