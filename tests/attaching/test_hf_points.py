"""Hugging Face's image classifiers: their blocks are listed, and listed points take a layer."""

import pytest
import torch

from kdlayers import KDPoint, attach_kd, find_points
from kdlayers.errors import LayoutError

transformers = pytest.importorskip("transformers")

MODELS = {
    "ResNet": (
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 2], "layer_type": "basic"},
        ["resnet.encoder.stages.0", "resnet.encoder.stages.1.layers.1"],
    ),
    "ConvNext": (
        {"hidden_sizes": [8, 16], "depths": [1, 2], "num_stages": 2},
        ["convnext.encoder.stages.0", "convnext.encoder.stages.1"],
    ),
    "Swin": (
        {"embed_dim": 8, "depths": [2, 2], "num_heads": [2, 2], "window_size": 4},
        ["swin.encoder.layers.0.blocks.1", "swin.encoder.layers.1"],
    ),
    "Dinov2": (
        {"patch_size": 16, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2},
        ["dinov2.encoder.layer.0", "dinov2.encoder.layer.2"],
    ),
    "RegNet": (
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 2], "groups_width": 8},
        ["regnet.encoder.stages.0.layers.0", "regnet.encoder.stages.1"],
    ),
    "ViT": (
        {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2},
        ["vit.layers.0", "vit.layers.2"],
    ),
}


@pytest.mark.parametrize("family", MODELS)
def test_blocks_are_listed_and_take_a_layer(family):
    options, wanted = MODELS[family]
    config = getattr(transformers, f"{family}Config")(**options, image_size=64, num_labels=3)
    model = getattr(transformers, f"{family}ForImageClassification")(config)
    images = torch.randn(2, 3, 64, 64)
    points = find_points(model, images)
    assert set(wanted) <= {point.name for point in points}
    for point in points:
        if "does not depend" not in point.remark:
            kd = attach_kd(model, at=[KDPoint(point.name, num_templates=2)], example=images)
            assert list(kd.layers) == [point.name]
            kd.remove()


def test_tokens_that_hiera_unrolls_are_refused():
    options = {"image_size": [64, 64], "depths": [1, 1], "num_heads": [1, 2], "embed_dim": 16}
    options |= {"masked_unit_size": [4, 4], "num_query_pool": 1}
    model = transformers.HieraModel(transformers.HieraConfig(**options))
    images = torch.randn(2, 3, 64, 64)
    found = find_points(model, images)
    assert not found
    assert found.left_out["encoder.stages.0"].startswith("the tokens of this module are not in")
    point = KDPoint("encoder.stages.0", num_templates=2)
    with pytest.raises(LayoutError, match="not in raster order: HieraModel unrolls its windows"):
        attach_kd(model, at=[point], example=images)
