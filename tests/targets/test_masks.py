"""Segmentation: masks of the images' size as labels, and positions to be ignored."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kdlayers import CodebookTargets, DecisionTargets, KDPoint, attach_kd
from kdlayers.errors import ArgumentTypeError, FitError, ShapeError
from tests import reference


def data(ignored=True):
    torch.manual_seed(0)
    masks = torch.randint(3, (6, 16, 16))
    small = F.interpolate(masks[:, None].float(), (4, 8), mode="nearest")[:, 0].long()
    features = torch.randn(3, 5, dtype=torch.float64)[small] * 2
    features = features + torch.randn(6, 4, 8, 5, dtype=torch.float64)
    if ignored:
        masks[:, :5] = 255
    return features, masks, F.interpolate(masks[:, None].float(), (4, 8))[:, 0].long()


def test_masks_are_brought_to_the_grid_by_the_nearest_pixel():
    features, masks, small = data(ignored=False)
    one = DecisionTargets(2, components=2).fit([(features, masks)])
    two = DecisionTargets(2, components=2).fit([(features, small)])
    assert all(torch.equal(v, two.state_dict()[k]) for k, v in one.state_dict().items())
    assert torch.equal(one.soft_assignment(features, masks), two.soft_assignment(features, small))
    channel = DecisionTargets(2, components=2).fit([(features, masks[:, None])])
    assert all(torch.equal(v, channel.state_dict()[k]) for k, v in one.state_dict().items())
    both = (one.soft_assignment(features, given) for given in (masks, masks[:, None]))
    assert torch.equal(*both)
    with pytest.raises(ShapeError, match=r"must be \[6\] or \[6, 4, 8\], got"):
        one.soft_assignment(features, masks[:3])


@pytest.mark.parametrize("label", [-1, 255])
def test_a_label_for_no_class_is_an_error_that_names_it(label):
    features, masks, _ = data()
    masks[masks == 255] = label
    message = rf"if {label} marks positions without a label, pass .*ignore_index={label}\)"
    with pytest.raises(FitError, match=message):
        DecisionTargets(2, components=2, num_classes=3).fit([(features, masks)])


@pytest.mark.parametrize("templates", [False, True])
def test_ignored_positions_take_no_part(templates):
    features, masks, small = data()
    kept = small != 255
    assert 0 < kept.sum() < kept.numel()
    one = DecisionTargets(2, components=2, ignore_index=255).fit([(features, masks)])
    two = DecisionTargets(2, components=2).fit([(features[kept], small[kept])])
    assert all(torch.equal(v, two.state_dict()[k]) for k, v in one.state_dict().items())
    wanted = two.soft_assignment(features[kept], small[kept])
    found = one.soft_assignment(features, masks)
    assert torch.equal(found[kept], wanted)
    assert not found[~kept].any()
    units = torch.randn(6, 4, 8, 4, dtype=torch.float64, requires_grad=True)
    matrix = torch.randn(6, 4, dtype=torch.float64)
    scores = units @ matrix.T
    value = (
        one.divergence(units, features, masks, templates=matrix)
        if templates
        else one.divergence(scores, features, masks)
    )
    torch.testing.assert_close(value, reference.template_kl(scores[kept], wanted))
    (grad,) = torch.autograd.grad(value, units)
    assert not grad[~kept].any()
    assert grad[kept].any()


def test_a_batch_of_ignored_positions_only_is_zero_with_a_gradient():
    features, masks, _ = data()
    targets = DecisionTargets(2, components=2, ignore_index=255).fit([(features, masks)])
    scores = torch.randn(6, 4, 8, 6, dtype=torch.float64, requires_grad=True)
    value = targets.divergence(scores, features, torch.full_like(masks, 255))
    value.backward()
    assert value == 0
    assert not scores.grad.any()
    with pytest.raises(ArgumentTypeError, match="ignore_index must be an integer"):
        DecisionTargets(ignore_index="255")


class Dense(nn.Module):
    """A segmentation model: a class score for every pixel, in a dict as in torchvision."""

    def __init__(self, width):
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, width, 3, 4, 1), nn.BatchNorm2d(width), nn.ReLU())
        self.deep = nn.Sequential(nn.Conv2d(width, width, 3, 1, 1), nn.ReLU())
        self.head = nn.Conv2d(width, 3, 1)

    def forward(self, x):
        return {"out": F.interpolate(self.head(self.deep(self.body(x))), x.shape[-2:])}


def test_a_step_of_segmentation_with_masks():
    images, masks = torch.randn(6, 3, 16, 16), torch.randint(3, (6, 16, 16))
    masks[:, :5] = 255
    student = Dense(5)
    points = [
        KDPoint("body", targets=DecisionTargets(2, num_classes=3, ignore_index=255)),
        KDPoint("deep", targets=CodebookTargets(4)),
    ]
    kd = attach_kd(student, Dense(8), points, example=images)
    kd.fit([(images, masks)], progress=False)
    logits = student.train()(images)["out"]
    loss = F.cross_entropy(logits, masks, ignore_index=255) + kd.loss(masks)
    loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in student.parameters())


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_batch_without_any_label_adds_exactly_nothing(dtype):
    features, masks, _ = data()
    targets = DecisionTargets(2, components=2, ignore_index=255).fit([(features, masks)])
    scores = torch.full((6, 4, 8, 6), 500.0, dtype=dtype).requires_grad_()  # their sum overflows
    value = targets.divergence(scores, features, torch.full_like(masks, 255))
    value.backward()
    assert value == 0
    assert (scores.grad == 0).all()
