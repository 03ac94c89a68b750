"""The teacher-student pairs of letKD's CIFAR-100 table, with published settings and results."""

from __future__ import annotations

from typing import Any

from _methods import Pair, Taps, published
from models import small_images
from models.cifar_resnet import make
from torch import nn

TAPS = {
    "resnet50": Taps("layer4.0", stages=("layer1", "layer2", "layer3", "layer4")),
    "shufflenet_v1": Taps(),
    "shufflenet_v2": Taps(),
    "mobilenet_v2_half": Taps("stage5.0", stages=("stage1", "stage2", "stage4", "stage6")),
}


def network(name: str, num_classes: int = 100) -> nn.Module:
    """A network by its name."""
    if name in TAPS:
        return getattr(small_images, name)(num_classes)
    return make(name, num_classes=num_classes)


def _pair(
    teacher: str, student: str, lr: float, beta: float, *numbers: float | None, **more: Any
) -> Pair:
    taps = TAPS.get(student, Taps()), TAPS.get(teacher, Taps())
    return Pair(teacher, student, taps, lr, beta, published=published(*numbers), **more)


# beta is the DKD authors' value; resnet110-resnet20 uses that of resnet110-resnet32.
# Published: teacher, labels, KD, FitNet, AT, DKD, QuEST, letKD-1, letKD-2.
# fmt: off
_ALL = (
    _pair("wrn_40_2", "wrn_16_2", 0.05, 6.0,
          75.61, 73.26, 74.92, 73.58, 74.08, 76.24, 76.10, 76.29, 76.56),
    _pair("wrn_40_2", "wrn_40_1", 0.05, 6.0,
          75.61, 71.98, 73.54, 72.24, 72.77, 74.81, 74.58, 75.01, 75.19),
    _pair("resnet56", "resnet20", 0.05, 2.0,
          72.34, 69.06, 70.66, 69.21, 70.55, 71.97, 71.84, 72.44, 73.27),
    _pair("resnet110", "resnet20", 0.05, 2.0,
          74.31, 69.06, 70.67, 68.99, 70.22, None, 71.89, 72.68, 73.38),
    _pair("resnet110", "resnet32", 0.05, 2.0,
          74.31, 71.14, 73.08, 71.06, 72.31, 74.11, 74.08, 74.40, 74.62),
    _pair("resnet32x4", "resnet8x4", 0.05, 8.0,
          79.42, 72.50, 73.33, 73.50, 73.44, 76.32, 75.88, 76.70, 77.09),
    _pair("wrn_40_2", "shufflenet_v1", 0.01, 8.0,
          75.61, 70.50, 74.83, 73.73, 73.32, 76.70, 76.75, 76.93, 77.08),
    _pair("resnet32x4", "shufflenet_v1", 0.01, 8.0,
          79.42, 70.50, 74.07, 73.59, 71.73, 76.45, 76.28, 76.65, 77.30),
    _pair("resnet32x4", "shufflenet_v2", 0.01, 8.0,
          79.42, 71.82, 74.45, 73.54, 72.73, 77.07, 77.09, 77.75, 77.95),
    _pair("resnet50", "mobilenet_v2_half", 0.01, 8.0,
          79.34, 64.60, 67.35, 63.16, 58.58, 70.35, 69.81, 69.97, 70.39, alphas=(0.2, 0.1)),
)
# fmt: on
PAIRS = {f"{pair.teacher}-{pair.student}": pair for pair in _ALL}
