import pytest
import timm
import torch
from torch import nn
from torchvision import models

from kdlayers import CodebookTargets, FeatureLoss, KDPoint, attach_kd, find_points
from kdlayers.errors import ArgumentError, AttachError, LayoutError
from tests.nets import Awkward, Net

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


def test_norms_are_not_listed_and_unrolled_tokens_are_errors():
    assert names(timm.create_model("mnasnet_small"))[-1] == "blocks"
    model = timm.create_model("hiera_tiny_224")
    found = find_points(model)
    assert "tokens" not in {point.layout for point in found}
    assert found.left_out["blocks.9"].startswith("the tokens of this module are not in raster")
    assert "not listed, patch_embed, ..., blocks.11: the tokens of this module" in repr(found)
    assert "Hiera unrolls its windows" in repr(found)
    student = timm.create_model("resnet10t")
    with pytest.raises(LayoutError, match="not in raster order: Hiera unrolls its windows"):
        attach_kd(student, model, {"layer4": "blocks.9"}, example=torch.zeros(2, 3, 224, 224))


def test_prints_as_a_table():
    text = repr(find_points(models.resnet18(), IMAGES))
    assert text.splitlines()[0].split() == ["name", "shape", "layout"]
    assert text.splitlines()[-1].split() == ["layer4", "2x512x2x2", "NCHW"]


def test_a_point_that_the_head_ignores_is_listed_and_is_an_error():
    model = timm.create_model("pit_ti_224", num_classes=3)
    found = {point.name: point for point in find_points(model)}
    ignored = [name for name, point in found.items() if "does not depend on" in point.remark]
    assert ignored == ["transformers.2", "transformers"]
    assert "transformers.2, transformers: the model's output does not depend" in repr(
        find_points(model)
    )
    example = torch.zeros(2, 3, 224, 224)
    with pytest.raises(AttachError, match="does not reach the model's output"):
        attach_kd(model, at=[KDPoint("transformers.2", num_templates=4)], example=example)
    attach_kd(model, at=[KDPoint("transformers.2.blocks.3", num_templates=4)], example=example)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_point_that_is_changed_in_place_is_listed(frozen):
    found = find_points(models.densenet121().requires_grad_(not frozen), IMAGES)
    changed = {point.name for point in found if "changes the features in place" in point.remark}
    assert changed == {"features"}
    assert "\nfeatures: a later module changes the features in place" in repr(found)
    assert found.left_out == {}


def test_the_remarks_column_appears_only_when_needed():
    for make in (models.resnet18, lambda: models.vit_b_16(image_size=64)):
        found = find_points(make(), IMAGES)
        assert {point.remark for point in found} == {""}
        assert len(repr(found).splitlines()) == len(found) + 2


def test_modules_that_cannot_be_points_are_named_with_the_reason():
    found = find_points(Awkward(), torch.zeros(2, 3, 8, 8))
    assert found.left_out == {
        "idle": "it did not run, or its output is not a floating-point tensor",
        "again": "it runs 2 times in one forward",
        "wide": "the output of this module has shape (4, 5, 8, 4), but the batch has 2 images: its "
        "first axis is not the batch",
    }
    ignored = {point.name for point in found if "does not depend on" in point.remark}
    assert ignored == {"side"}
    assert "not listed, wide: the output of this module has shape" in repr(found)


def test_leaves_the_model_and_the_random_state_alone():
    model = models.mobilenet_v3_small()
    model.features.eval()
    flags = [m.training for m in model.modules()]
    buffers = {k: v.clone() for k, v in model.state_dict().items()}
    state = torch.get_rng_state()
    find_points(model, IMAGES)
    assert all(p.grad is None for p in model.parameters())
    assert flags == [m.training for m in model.modules()]
    assert all(torch.equal(v, buffers[k]) for k, v in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())
    assert not any(m._forward_hooks for m in model.modules())


def test_an_example_that_does_not_fit_is_named():
    with pytest.raises(
        ArgumentError, match=r"could not run on an example of shape \[\(2, 1, 64, 64\)\]"
    ):
        find_points(Net(), IMAGES[:, :1])


class Attends(torch.nn.Module):
    """Returns the tokens and its attention weights, which have more numbers."""

    def __init__(self):
        super().__init__()
        self.query = torch.nn.Linear(16, 16)

    def forward(self, x):
        weights = (self.query(x) @ x.transpose(1, 2)).softmax(-1)
        return x + weights @ x, weights


class Attending(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = torch.nn.Conv2d(3, 16, 8, 8)
        self.block = Attends()
        self.head = torch.nn.Linear(16, 3)

    def forward(self, x):
        return self.head(self.block(self.embed(x).flatten(2).transpose(1, 2))[0].mean(1))


def test_features_with_attention_weights_are_the_features():
    (point,) = [point for point in find_points(Attending(), IMAGES) if point.name == "block"]
    assert (point.shape, point.layout) == ((2, 64, 16), "tokens")
    kd = attach_kd(Attending(), at=[KDPoint("block", num_templates=5)], example=IMAGES)
    assert kd.layers["block"].head.weight.shape == (5, 16)


class Encoder(nn.Module):
    """Returns its images, an empty tensor and two maps, from fine to coarse."""

    def __init__(self):
        super().__init__()
        self.fine, self.coarse = nn.Conv2d(3, 4, 3, 2, 1), nn.Conv2d(4, 5, 3, 2, 1)

    def forward(self, x):
        fine = self.fine(x)
        return [x, x[:, :0], fine, self.coarse(fine)]


class Segmenter(nn.Module):
    """Class maps from all features of an encoder."""

    def __init__(self):
        super().__init__()
        self.encoder, self.head = Encoder(), nn.Conv2d(9, 3, 1)

    def forward(self, x):
        *_, fine, coarse = self.encoder(x)
        return self.head(torch.cat([fine, nn.functional.interpolate(coarse, fine.shape[2:])], 1))


def test_features_are_not_the_images_that_an_encoder_returns_first():
    student, teacher, images = Segmenter(), Segmenter(), torch.randn(2, 3, 8, 8)
    found = {point.name: point.shape for point in find_points(student, images)}
    assert found["encoder"] == (2, 4, 4, 4)
    kd = attach_kd(
        student,
        teacher,
        [KDPoint("encoder", targets=CodebookTargets(4))],
        losses=[FeatureLoss(at=("encoder.coarse", "encoder"), projector=nn.Conv2d(5, 4, 1))],
        example=images,
    )
    kd.fit([images], progress=False)
    student(images)
    kd.loss().backward()
    loss = kd._terms[1].loss
    ours, theirs = student.encoder(images)[3], teacher.encoder(images)[2]
    theirs = nn.functional.adaptive_avg_pool2d(theirs, 2)
    value = 1 - nn.functional.cosine_similarity(loss.projector(ours), theirs, dim=1).mean()
    torch.testing.assert_close(kd.terms["FeatureLoss.encoder.coarse"], value.detach())


class SharedEnd(nn.Module):
    """Two stages that end with one and the same activation."""

    def __init__(self):
        super().__init__()
        activation = nn.ReLU()
        self.first = nn.Sequential(nn.Conv2d(3, 4, 3), activation)
        self.second = nn.Sequential(nn.Conv2d(4, 4, 3), activation)
        self.head = nn.Linear(4, 3)

    def forward(self, x):
        return self.head(self.second(self.first(x)).mean((2, 3)))


def test_a_stage_that_ends_with_a_shared_module_is_refused():
    # The hook of a Sequential is on its last module, so it would see the features of both stages.
    images, own, alike = torch.randn(2, 3, 8, 8), SharedEnd(), SharedEnd()
    own.first[1], own.second[1] = nn.ReLU(), nn.ReLU()
    assert find_points(alike, images).left_out == dict.fromkeys(
        ("first", "second"), "it ends with a module that runs 2 times in one forward"
    )
    with pytest.raises(AttachError, match=r"'first' of the student ends with .*a copy\.deepcopy"):
        attach_kd(alike, at=[KDPoint("first", num_templates=4)], example=images)
    with pytest.raises(AttachError, match="'second' of the teacher ends with a module that runs 2"):
        attach_kd(own, alike, losses=[FeatureLoss(at="second")], example=images)
    attach_kd(own, alike, losses=[FeatureLoss(at=("second", "second.0"))], example=images)


class SequenceFirst(nn.Module):
    """A transformer with torch's default order of axes, ``[tokens, batch, channels]``."""

    def __init__(self):
        super().__init__()
        self.patches = nn.Conv2d(3, 8, 4, 4)
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.encoder(self.patches(x).flatten(2).permute(2, 0, 1)).mean(0))


@pytest.mark.parametrize("images", [2, 16])  # 16 images have 16 tokens each
def test_tokens_before_the_batch_are_refused(images):
    example = torch.zeros(images, 3, 16, 16)
    with pytest.raises(LayoutError, match=r"first axis (is not|grows with the images)"):
        attach_kd(
            SequenceFirst(), at=[KDPoint("encoder.layers.0", num_templates=4)], example=example
        )
    assert not [p for p in find_points(SequenceFirst(), example) if "encoder" in p.name]
