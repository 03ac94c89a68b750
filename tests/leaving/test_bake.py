"""Baked and folded students whose forward reads attributes of a point, or passes keywords."""

import copy
import io
from functools import partial

import pytest
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from kdlayers import KDLayer, KDPoint, attach_kd, bake, fold
from tests.nets import Net

IMAGES = torch.randn(2, 3, 16, 16)


class Reads(nn.Module):
    """Reads the stride and the weight of its point, and calls it with or without a keyword."""

    def __init__(self, keyword, point):
        super().__init__()
        self.keyword = keyword
        self.conv = point
        self.head = nn.Conv2d(4, 3, 1)

    def forward(self, x):
        scale = self.conv.stride[0] * self.conv.weight.std()
        x = self.conv(**{self.keyword: x}) if self.keyword else self.conv(x)
        return self.head(x * scale).mean((2, 3))


class OneInput(nn.Conv2d):
    def forward(self, image):
        return super().forward(image)


class AnyInputs(nn.Conv2d):
    def forward(self, *given):
        return super().forward(given[0]) * given[-1].mean()


class Listed(nn.Module):
    """Keeps its convolutions in plain lists as well, and calls them from there."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
        self.stages = {"early": [self.first], "late": (self.second, nn.Identity())}
        self.head = nn.Conv2d(4, 3, 1)

    def forward(self, x):
        x = self.stages["early"][0](x)
        return self.head(self.stages["late"][0](x)).mean((2, 3))


class Bound(nn.Module):
    """Calls its convolutions through a partial function and through a bound method."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 3)
        self.third = nn.Conv2d(4, 4, 1)
        self.steps = [partial(self.first), self.second.__call__]
        self.last = partial(torch.utils.checkpoint.checkpoint, self.third, use_reentrant=False)
        self.head = nn.Conv2d(4, 3, 1)

    def forward(self, x):
        for step in (*self.steps, self.last):
            x = step(x)
        return self.head(x).mean((2, 3))


class Encoder(nn.Module):
    """torch's encoder layer, which in eval mode does not call its children if none has a hook."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 4, 4)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        return self.head(self.layer(self.embed(x).flatten(2).mT).mean(1))


def vit():
    """Reads the grid of its patch embedding."""
    return VisionTransformer(
        16, 4, num_classes=3, embed_dim=8, depth=1, num_heads=2, dynamic_img_size=True
    )


MODELS = {
    "attributes": (lambda: Reads(None, nn.Conv2d(3, 4, 3, 2)), "conv"),
    "torch's keyword": (lambda: Reads("input", nn.Conv2d(3, 4, 3, 2)), "conv"),
    "own keyword": (lambda: Reads("image", OneInput(3, 4, 3, 2)), "conv"),
    "any inputs": (lambda: Reads(None, AnyInputs(3, 4, 3, 2)), "conv"),
    "vit": (vit, "patch_embed"),
    "ends with a norm": (lambda: Net(4), "stem"),
    "plain list": (Listed, "first"),
    "plain tuple": (Listed, "second"),
    "partial": (Bound, "first"),
    "bound method": (Bound, "second"),
    "argument of a partial": (Bound, "third"),
    "torch's encoder": (Encoder, "layer.linear2"),
    "torch's attention": (Encoder, "layer.self_attn"),
}


def attached(name):
    make, point = MODELS[name]
    student = make()
    attach_kd(student, at=[KDPoint(point, num_templates=4)], example=IMAGES)
    student.train()(IMAGES)
    return student.eval()


@pytest.mark.parametrize("make", [bake, fold])
@pytest.mark.parametrize("name", MODELS)
def test_the_parent_may_use_a_point_as_before(name, make):
    student = attached(name)
    model = make(student)
    for gradients in (True, False):
        with torch.set_grad_enabled(gradients):
            torch.testing.assert_close(model(IMAGES), student(IMAGES))
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for again in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert torch.equal(again(IMAGES), model(IMAGES))
        assert list(again.state_dict()) == list(model.state_dict())


@pytest.mark.parametrize("make", [bake, fold])
@pytest.mark.parametrize("name", ["attributes", "own keyword"])
def test_they_can_be_exported_and_traced(name, make):
    student = attached(name)
    model, expected = make(student), student(IMAGES)
    exported = torch.export.export(model, (IMAGES,)).module()
    for found in (exported, torch.fx.symbolic_trace(model)):
        torch.testing.assert_close(found(IMAGES), expected)


class Copied(nn.Module):
    """Has its own way to be copied and pickled, which must not stand for the point's."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)

    def forward(self, x):
        return F.relu(self.conv(x))

    def __deepcopy__(self, memo):
        other = Copied()
        other.__dict__.update(copy.deepcopy(vars(self), memo))
        return other

    def __len__(self):
        return 7


def test_special_methods_are_those_of_the_point():
    student = nn.Sequential(Copied(), nn.Flatten(), nn.Linear(4 * 14 * 14, 3))
    attach_kd(student, at=[KDPoint("0", num_templates=4)], example=IMAGES)
    model = bake(student.eval())
    again = copy.deepcopy(model)
    assert torch.equal(again(IMAGES), student(IMAGES))
    with pytest.raises(AttributeError, match="missing"):
        _ = model[0].missing


@pytest.mark.parametrize("make", [bake, fold])
def test_hooks_of_a_point_keep_their_places(make):
    student = Net(4)
    student.last[-1].register_forward_hook(lambda module, args, output: output - 0.1)
    attach_kd(student, at=[KDPoint("last", num_templates=4)], example=IMAGES).detach()
    student.last[-1].register_forward_hook(
        lambda module, args, kwargs, output: output * 2, with_kwargs=True
    )
    student.last[-1].register_forward_hook(
        lambda module, args, output: output.clamp(max=1.0), always_call=True
    )
    before = student.last[-1].register_forward_hook(
        lambda module, args, output: output.relu() + 0.2, prepend=True
    )
    student.train()(IMAGES)
    student.eval()
    torch.testing.assert_close(make(student)(IMAGES), student(IMAGES))
    assert before.id in student.last[-1]._forward_hooks


def test_a_baked_layer_is_a_plain_one_with_the_state_of_the_students():
    student = Net(4).to(torch.bfloat16)
    kd = attach_kd(student, at=[KDPoint("last", num_templates=4)])
    layer = kd.layers["last"]
    layer.alpha, layer.memory, layer.norm.eps = 0.25, "low", 1e-3
    layer.head.weight.requires_grad_(False)
    layer.norm.eval()
    found = bake(student).last[1][1]
    assert type(found) is KDLayer
    assert (found.alpha, found.memory, found.norm.eps) == (0.25, "low", 1e-3)
    assert found.training
    assert not found.norm.training
    assert not found.head.weight.requires_grad
    assert found.value.weight.requires_grad
    for (name, mine), theirs in zip(
        found.state_dict().items(), layer.state_dict().values(), strict=True
    ):
        assert mine.dtype == theirs.dtype, name
        assert torch.equal(mine, theirs), name
    found.alpha = 0.5
    assert layer.alpha == 0.25
    assert not bake(student.eval()).last[1][1].training
