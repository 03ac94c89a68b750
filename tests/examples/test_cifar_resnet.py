"""The benchmark's networks: published sizes, points, folding."""

import pytest
import torch
from models.cifar_resnet import (
    fold_batch_norm,
    make,
    resnet,
    wide_resnet,
)
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from kdlayers import find_points

# Parameters for 100 classes, and multiply-adds in millions for 32x32 pixels, as published.
PUBLISHED = {
    "resnet20": (278_324, 40.82),
    "resnet32": (472_756, 69.13),
    "wrn_16_2": (703_284, 101.1),
    "wrn_40_1": (569_780, 83.29),
    "resnet8x4": (1_233_540, 177.1),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name):
    parameters, millions = PUBLISHED[name]
    model = make(name).eval()
    assert sum(p.numel() for p in model.parameters()) == parameters
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, 3, 32, 32))
    assert counter.get_total_flops() / 2e6 == pytest.approx(millions, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "layers"),
    [(f"resnet{depth}", depth) for depth in (8, 14, 20, 32, 44, 56, 110)]
    + [("resnet8x4", 8), ("resnet32x4", 32), ("wrn_16_2", 16), ("wrn_40_1", 40), ("wrn_40_2", 40)],
)
def test_depth_counts_layers(name, layers):
    """Convolutions and the classifier, without those of shortcuts, whose kernels are 1x1."""
    modules = list(make(name).modules())
    convolutions = [m for m in modules if isinstance(m, nn.Conv2d) and m.kernel_size == (3, 3)]
    linear = [m for m in modules if isinstance(m, nn.Linear)]
    # The depth of a wide network, 6n + 4, counts two of its shortcuts as well.
    shortcuts = 2 if name.startswith("wrn") else 0
    expected = len(convolutions) + len(linear) + shortcuts
    assert expected == layers


@pytest.mark.parametrize("name", ["resnet8", "resnet14", "resnet8x4", "wrn_16_1"])
def test_stages_halve_the_resolution_and_are_points(name):
    model = make(name, num_classes=7, in_channels=1)
    points = {point.name: point.shape for point in find_points(model, torch.zeros(2, 1, 28, 28))}
    assert points["layer1"][2:] == (28, 28)
    assert points["layer2"][2:] == (14, 14)
    assert points["layer3.0"] == points["layer3"]
    assert points["layer3"][2:] == (7, 7)
    assert model(torch.zeros(2, 1, 28, 28)).shape == (2, 7)


@pytest.mark.parametrize("name", ["resnet14", "wrn_16_1"])
def test_last_is_what_the_classifier_sees(name):
    model = make(name, num_classes=5).eval()
    seen = {}
    model.last.register_forward_hook(lambda _, __, output: seen.update(last=output))
    logits = model(torch.randn(2, 3, 32, 32))
    assert seen["last"].min() >= 0
    torch.testing.assert_close(model.fc(seen["last"].mean((2, 3))), logits)


def test_width_scales_all_stages():
    model = resnet(8, width=9.5, num_classes=10)
    stages = [getattr(model, f"layer{i}")[0].conv2.out_channels for i in (1, 2, 3)]
    assert stages == [round(9.5), 19, 38]
    assert wide_resnet(16, 1.5).fc.in_features == 96


@pytest.mark.parametrize("name", ["resnet14", "resnet8x4", "wrn_16_1"])
def test_folding_keeps_values_and_points(name):
    torch.manual_seed(0)
    model = make(name, num_classes=5)
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2)
            nn.init.uniform_(module.weight, 0.5, 2)
            nn.init.normal_(module.bias)
    images = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    model = model.double().eval()
    folded = fold_batch_norm(model)
    torch.testing.assert_close(folded(images), model(images))
    left = [m for m in folded.modules() if isinstance(m, nn.BatchNorm2d)]
    assert bool(left) == name.startswith("wrn")
    assert any(isinstance(m, nn.BatchNorm2d) for m in model.modules())


@pytest.mark.parametrize("name", ["resnet21", "resnet2", "wrn_15_1", "vgg8", "wrn_16"])
def test_unknown_names_say_which_there_are(name):
    with pytest.raises(ValueError, match=r"there is no network .*resnet8 \.\.\. resnet110"):
        make(name)
