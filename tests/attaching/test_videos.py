"""Models of videos: logits and vectors are compared, and maps and tokens are refused."""

import pytest
import torch
from torch import nn

from kdlayers import CodebookTargets, FeatureLoss, KDLoss, KDPoint, attach_kd, find_points
from kdlayers.errors import ArgumentError, LayoutError
from kdlayers.functional import kd as kd_of

VIDEOS, LABELS = torch.randn(4, 3, 4, 16, 16), torch.tensor([0, 1, 2, 0])


class Videos(nn.Module):
    """Tokens of 4 x 4 x 4 positions, which could be taken for a grid of 8 x 8."""

    def __init__(self, channels):
        super().__init__()
        self.cut = nn.Conv3d(3, channels, (1, 4, 4), (1, 4, 4))
        self.blocks = nn.Sequential(nn.Linear(channels, channels), nn.ReLU())
        self.norm = nn.LayerNorm(channels)
        self.head = nn.Linear(channels, 3)

    def forward(self, x):
        return self.head(self.norm(self.blocks(self.cut(x).flatten(2).mT).mean(1)))


@pytest.mark.parametrize(("point", "shape"), [("blocks", "4, 64, 6"), ("cut", "4, 6, 4, 4, 4")])
def test_maps_and_tokens_are_refused(point, shape):
    for at, losses in (([KDPoint(point, targets=CodebookTargets(4))], []), ([], [point])):
        losses = [FeatureLoss(at=name) for name in losses]
        with pytest.raises(LayoutError, match=rf"\({shape}\).* use losses on the logits") as error:
            attach_kd(Videos(6), Videos(8), at, losses=losses, example=VIDEOS)
        assert "find_points" not in str(error.value)  # which lists none
    found = find_points(Videos(6), VIDEOS)
    assert not found
    assert set(found.left_out) <= {"cut", "blocks"}


def test_logits_and_vectors_are_compared():
    student, teacher = Videos(6), Videos(8)
    losses = [KDLoss(), FeatureLoss(at="norm")]
    kd = attach_kd(student, teacher, losses=losses, example=VIDEOS)
    logits = student(VIDEOS)
    kd.loss(LABELS).backward()
    expected = kd_of(logits, teacher(VIDEOS)).detach()
    torch.testing.assert_close(kd.terms["KDLoss"], expected)
    assert student.cut.weight.grad.any()


def test_the_example_is_asked_for():
    with pytest.raises(ArgumentError, match="no convolution of images"):
        attach_kd(Videos(6), Videos(8), losses=[KDLoss()])
