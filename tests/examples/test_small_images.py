"""Networks of the recipes: published sizes, the shapes at the points of every pair."""

import pytest
import torch
from _cifar100 import PAIRS, network
from models.mobilenet_v1 import MobileNetV1
from models.small_images import shuffle
from torch.utils.flop_counter import FlopCounterMode

# Parameters for 100 classes, and multiply-adds in millions for 32x32 pixels, as published.
PUBLISHED = {
    "shufflenet_v1": (949_258, 38.69),
    "shufflenet_v2": (1_355_528, 44.50),
    "mobilenet_v2_half": (812_836, 6.52),
    "resnet8x4": (1_233_540, 177.1),
    "resnet20": (278_324, 40.82),
}

# Channels and side of the maps: the teacher's first and last, the student's first and last.
SHAPES = {
    "wrn_40_2-wrn_16_2": [(128, 8), (128, 8), (128, 8), (128, 8)],
    "wrn_40_2-wrn_40_1": [(128, 8), (128, 8), (64, 8), (64, 8)],
    "resnet56-resnet20": [(64, 8)] * 4,
    "resnet110-resnet20": [(64, 8)] * 4,
    "resnet110-resnet32": [(64, 8)] * 4,
    "resnet32x4-resnet8x4": [(256, 8)] * 4,
    "wrn_40_2-shufflenet_v1": [(128, 8), (128, 8), (960, 4), (960, 4)],
    "resnet32x4-shufflenet_v1": [(256, 8), (256, 8), (960, 4), (960, 4)],
    "resnet32x4-shufflenet_v2": [(256, 8), (256, 8), (464, 4), (1024, 4)],
    "resnet50-mobilenet_v2_half": [(2048, 4), (2048, 4), (80, 2), (1280, 2)],
}


def count(model, size):
    """Parameters, and millions of multiply-adds of one image."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model.eval()(torch.zeros(1, 3, size, size))
    return sum(p.numel() for p in model.parameters()), counter.get_total_flops() / 2e6


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    parameters, millions = count(network(name), 32)
    assert parameters == PUBLISHED[name][0]
    assert millions == pytest.approx(PUBLISHED[name][1], rel=1e-3)


def test_mobilenet_v1_has_its_published_size():
    parameters, millions = count(MobileNetV1(), 224)
    assert parameters == 4_231_976
    assert millions == pytest.approx(569, abs=0.5)


def shapes(model, names):
    """Channels, side and smallest value of the maps at ``names``."""
    found = {}
    for name in names:
        module = model.get_submodule(name)
        module.register_forward_hook(lambda _, __, y, n=name: found.update({n: y.detach()}))
    with torch.no_grad():
        model.eval()(torch.randn(2, 3, 32, 32))
    return [found[name] for name in names]


@pytest.mark.parametrize("name", PAIRS)
def test_points_of_a_pair(name):
    pair, maps = PAIRS[name], []
    for taps, kind in zip(reversed(pair.taps), (pair.teacher, pair.student), strict=True):
        model = network(kind)
        maps += shapes(model, (taps.first, taps.last))
        assert len(shapes(model, taps.stages)) == len(pair.taps[0].stages)
    assert [(m.shape[1], m.shape[2]) for m in maps] == SHAPES[name]
    assert all(m.min() >= 0 for m in maps[1::2])  # what is pooled has been through a ReLU
    signed = [m.min() < 0 for m in maps[::2]]
    assert signed == [kind.startswith(("wrn", "mobile")) for kind in (pair.teacher, pair.student)]


def test_shuffle_deals_the_groups_out():
    channels = torch.arange(6.0).view(1, 6, 1, 1)
    assert shuffle(channels, 3).flatten().tolist() == [0, 2, 4, 1, 3, 5]
