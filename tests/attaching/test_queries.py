"""Detectors with queries, as DETR: the encoder has positions of the image, the decoder has none."""

import pytest
import torch
from torch import nn

from kdlayers import CodebookTargets, DKDLoss, FeatureLoss, KDLoss, KDPoint, attach_kd, find_points
from kdlayers.errors import LayoutError, ShapeError

IMAGES = torch.randn(4, 3, 16, 16)


class Read(nn.Module):
    """Queries read the tokens of the image."""

    def __init__(self, channels, queries):
        super().__init__()
        self.query = nn.Parameter(torch.randn(queries, channels))
        self.mix = nn.Linear(channels, channels)

    def forward(self, tokens):
        return self.mix((self.query @ tokens.mT).softmax(2) @ tokens)


class Queries(nn.Module):
    """Nine queries, which could be taken for a grid of 3 x 3."""

    def __init__(self, channels, pooled=False):
        super().__init__()
        self.backbone = nn.Sequential(nn.Conv2d(3, channels, 4, 4), nn.ReLU())
        self.pool = nn.AdaptiveAvgPool2d(3) if pooled else nn.Identity()
        self.encoder = nn.Sequential(nn.Linear(channels, channels), nn.ReLU())
        self.decoder = Read(channels, 9)
        self.classes = nn.Linear(channels, 3)

    def forward(self, x):
        tokens = self.encoder(self.pool(self.backbone(x)).flatten(2).mT)
        return {"logits": self.classes(self.decoder(tokens)), "tokens": tokens}


@pytest.mark.parametrize("point", ["decoder", "classes"])
def test_queries_are_refused(point):
    given = [([KDPoint(point, targets=CodebookTargets(4))], []), ([], [FeatureLoss(at=point)])]
    for at, losses in given:
        with pytest.raises(LayoutError, match=r"larger images give as many tokens: .* the enc"):
            attach_kd(Queries(6), Queries(8), at, losses=losses, example=IMAGES)


def test_positions_are_not():
    assert [point.name for point in find_points(Queries(6), IMAGES)] == ["backbone", "encoder"]
    point = KDPoint("encoder", targets=CodebookTargets(4))
    kd = attach_kd(Queries(6), Queries(8), [point], losses=[FeatureLoss(at="backbone")])
    kd.fit([IMAGES], progress=False)
    kd.student(IMAGES)
    kd.loss().backward()
    assert kd.student.decoder.mix.weight.grad is None
    assert kd.student.backbone[0].weight.grad.any()


def test_tokens_of_a_map_that_is_pooled_to_one_size_have_a_grid():
    model = Queries(6, pooled=True)
    found = {point.name: point.layout for point in find_points(model, IMAGES)}
    assert found["encoder"] == "tokens"


@pytest.mark.parametrize("loss", [KDLoss, DKDLoss])
def test_scores_of_queries_are_no_logits(loss):
    with pytest.raises(ShapeError, match=rf"{loss.__name__} compares .* get \[4, 9, 3\]: scores"):
        attach_kd(Queries(6), Queries(8), losses=[loss()], example=IMAGES)
