"""MobileNet V1 for 224x224 images (A. Howard et al., 2017), which torchvision does not have."""

from __future__ import annotations

from torch import Tensor, nn


class MobileNetV1(nn.Module):
    """Thirteen blocks of a depthwise and a 1x1 convolution, in five stages by resolution.

    ``stage4`` ends with 512 channels at a sixteenth of the size, ``stage5`` with 1024 at a 32nd.
    """

    def __init__(self, num_classes: int = 1000) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(3, 32, 3, 2, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(inplace=True)
        )
        self.stage1 = nn.Sequential(separable(32, 64, 1))
        self.stage2 = nn.Sequential(separable(64, 128, 2), separable(128, 128, 1))
        self.stage3 = nn.Sequential(separable(128, 256, 2), separable(256, 256, 1))
        same = (separable(512, 512, 1) for _ in range(5))
        self.stage4 = nn.Sequential(separable(256, 512, 2), *same)
        self.stage5 = nn.Sequential(separable(512, 1024, 2), separable(1024, 1024, 1))
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(1024, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Logits of images ``[B, 3, H, W]``."""
        x = self.stage3(self.stage2(self.stage1(self.stem(x))))
        return self.fc(self.pool(self.stage5(self.stage4(x))).flatten(1))


def separable(inputs: int, outputs: int, stride: int) -> nn.Sequential:
    """A depthwise 3x3 and a 1x1 convolution, each with batch norm and ReLU."""
    return nn.Sequential(
        nn.Conv2d(inputs, inputs, 3, stride, padding=1, groups=inputs, bias=False),
        nn.BatchNorm2d(inputs),
        nn.ReLU(inplace=True),
        nn.Conv2d(inputs, outputs, 1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(inplace=True),
    )
