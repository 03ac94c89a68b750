import pytest
import torch

from kdlayers.errors import ShapeError
from kdlayers.losses import FitNetLoss

from . import naive
from .loss_tester import LossTester


def reference(loss, student, teacher, targets):
    weight = loss.regressor.weight[:, :, 0, 0].tolist()
    bias = loss.regressor.bias.tolist()
    ours, theirs = (maps.movedim(1, -1).flatten(0, 2).tolist() for maps in (student, teacher))
    return naive.mean(
        (sum(w * f for w, f in zip(line, position, strict=True)) + b - wanted) ** 2
        for position, goal in zip(ours, theirs, strict=True)
        for line, b, wanted in zip(weight, bias, goal, strict=True)
    )


class TestFitNet(LossTester):
    make = FitNetLoss
    reference = staticmethod(reference)
    kind = "maps"
    shift_invariant = False


def test_the_larger_grid_is_average_pooled():
    loss = FitNetLoss()
    student, teacher = torch.rand(2, 3, 4, 2), torch.rand(2, 5, 2, 4)
    value = loss(student, teacher)
    small = student.reshape(2, 3, 2, 2, 2).mean(3), teacher.reshape(2, 5, 2, 2, 2).mean(4)
    torch.testing.assert_close(value, loss(*small))


def test_a_loss_cannot_be_used_at_two_points():
    loss = FitNetLoss()
    loss(torch.rand(2, 3, 2, 2), torch.rand(2, 5, 2, 2))
    with pytest.raises(ShapeError, match=r"maps 3 to 5 channels, got \[2, 4, 2, 2\] and"):
        loss(torch.rand(2, 4, 2, 2), torch.rand(2, 5, 2, 2))


def test_tokens_are_errors_that_name_an_alternative():
    with pytest.raises(ShapeError, match=r"student must be feature maps .* got \[2, 16, 8\]; att"):
        FitNetLoss()(torch.rand(2, 16, 8), torch.rand(2, 8, 4, 4))
