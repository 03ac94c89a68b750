import pytest
import timm
import torch
from torchvision import models

from kdlayers import attach_kd, find_points
from kdlayers.errors import ArgumentError, LayoutError
from tests.nets import Net

IMAGES = torch.zeros(2, 3, 64, 64)


def names(model, example=IMAGES):
    return [point.name for point in find_points(model, example)]


def test_resnet_stages_and_blocks_in_forward_order():
    found = names(models.resnet18())
    assert found == [
        name
        for stage in range(1, 5)
        for name in (f"layer{stage}.0", f"layer{stage}.1", f"layer{stage}")
    ]


@pytest.mark.parametrize(
    ("model", "wanted", "layout"),
    [
        (lambda: models.vit_b_16(image_size=64), "encoder.layers.encoder_layer_11", "tokens+1"),
        (models.swin_t, "features.7", "NHWC"),
        (models.densenet121, "features", "NCHW"),
        (models.mobilenet_v3_small, "features.12", "NCHW"),
        (lambda: timm.create_model("deit_tiny_distilled_patch16_224"), "blocks.11", "tokens+2"),
        (lambda: timm.create_model("resnet10t"), "layer4", "NCHW"),
    ],
)
def test_other_architectures(model, wanted, layout):
    model = model()
    example = None if hasattr(model, "pretrained_cfg") else IMAGES
    found = {point.name: point for point in find_points(model, example)}
    assert found[wanted].layout == layout
    assert not any("downsample" in name or name.endswith(".attn") for name in found)


def test_norms_are_no_candidates_and_unrolled_tokens_are_refused():
    assert names(timm.create_model("mnasnet_small"))[-1] == "blocks"
    model = timm.create_model("hiera_tiny_224")
    assert "tokens" not in {point.layout for point in find_points(model)}
    student = timm.create_model("resnet10t")
    with pytest.raises(LayoutError, match="not in raster order: Hiera unrolls its windows"):
        attach_kd(student, model, {"layer4": "blocks.9"}, example=torch.zeros(2, 3, 224, 224))


def test_prints_as_a_table():
    text = repr(find_points(models.resnet18(), IMAGES))
    assert text.splitlines()[0].split() == ["name", "shape", "layout"]
    assert text.splitlines()[-1].split() == ["layer4", "2x512x2x2", "NCHW"]


def test_leaves_the_model_and_the_random_state_alone():
    model = models.mobilenet_v3_small()
    model.features.eval()
    flags = [m.training for m in model.modules()]
    buffers = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    find_points(model, IMAGES)
    assert flags == [m.training for m in model.modules()]
    assert all(torch.equal(v, buffers[k]) for k, v in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    assert not any(m._forward_hooks for m in model.modules())


def test_an_example_that_does_not_fit_is_named():
    with pytest.raises(
        ArgumentError, match=r"could not run on an example of shape \[\(2, 1, 64, 64\)\]"
    ):
        find_points(Net(), IMAGES[:, :1])
