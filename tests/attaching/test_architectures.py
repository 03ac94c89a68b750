"""attach_kd on common architectures, in pairs of very different models.

Large families are tested in a small size, built from their own classes; the zoo has usual sizes.
"""

import pytest
import timm
from torchvision import models
from torchvision.models.convnext import CNBlockConfig

from tests.attach_tester import CLASSES, AttachCase

# Pairs of models that timm states other means and deviations for.
pytestmark = pytest.mark.filterwarnings("ignore:the student .* expects images:UserWarning")


def tv(name, **kwargs):
    return lambda: getattr(models, name)(num_classes=CLASSES, **kwargs)


def tm(name, **kwargs):
    return lambda: timm.create_model(name, num_classes=CLASSES, **kwargs)


def vit():
    return models.VisionTransformer(64, 16, 4, 4, 64, 128, num_classes=CLASSES)


def swin():
    return models.SwinTransformer(
        [4, 4], 24, [1, 1, 2, 2], [1, 2, 2, 2], [7, 7], num_classes=CLASSES
    )


def convnext():
    sizes = [(16, 24, 1), (24, 32, 1), (32, 48, 2), (48, None, 2)]
    return models.ConvNeXt([CNBlockConfig(*size) for size in sizes], num_classes=CLASSES)


def densenet():
    return models.DenseNet(8, (2, 2, 2, 2), 16, num_classes=CLASSES)


CASES = {
    "resnet18": AttachCase(
        tv("resnet18"),
        tv("resnet50", width_per_group=16),
        {"layer4.0": "layer4.0", "layer4": "layer4"},
    ),
    "resnet50": AttachCase(
        tv("resnet50", width_per_group=16),
        tv("resnet18"),
        {"layer4.0": "layer4.0", "layer4": "layer4"},
    ),
    "mobilenet_v3_small": AttachCase(
        tv("mobilenet_v3_small"), tv("resnet18"), {"features.11": "layer3", "features": "layer4"}
    ),
    "shufflenet_v2_x0_5": AttachCase(
        tv("shufflenet_v2_x0_5"), tv("resnet18"), {"stage4.0": "layer4.0", "conv5": "layer4"}
    ),
    "efficientnet_b0": AttachCase(
        tv("efficientnet_b0"),
        convnext,
        {"features.7": "features.6", "features": "features"},
    ),
    "convnext": AttachCase(
        convnext, tv("resnet18"), {"features.7.0": "layer4.0", "features.7": "layer4"}
    ),
    "vit": AttachCase(
        vit,
        tv("resnet18"),
        {"encoder.layers.encoder_layer_2": "layer4.0", "encoder.layers.encoder_layer_3": "layer4"},
    ),
    "swin": AttachCase(
        swin,
        vit,
        {"features.7.0": "encoder.layers.encoder_layer_1", "features.7": "encoder"},
    ),
    "densenet": AttachCase(
        densenet,
        densenet,
        {"features.denseblock4.denselayer1": "features.denseblock3", "features": "features"},
    ),
    "timm resnet10t": AttachCase(
        tm("resnet10t"), tm("mobilenetv4_conv_small"), {"layer3": "blocks.2", "layer4": "blocks.4"}
    ),
    "timm vit_tiny": AttachCase(
        tm("vit_tiny_patch16_224", img_size=64),
        tm("convnext_atto"),
        {"blocks.8": "stages.2", "blocks.11": "stages.3"},
    ),
    "timm mobilenetv4": AttachCase(
        tm("mobilenetv4_conv_small"), tm("resnet10t"), {"blocks.3": "layer3", "blocks.4": "layer4"}
    ),
    "timm convnext_atto": AttachCase(
        tm("convnext_atto"),
        tm("vit_tiny_patch16_224", img_size=64),
        {"stages.3.blocks.0": "blocks.6", "stages.3": "blocks.11"},
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_attach(case, tmp_path):
    case.run(tmp_path)
