import pytest
import torch

from kdlayers.errors import ShapeError
from kdlayers.losses import AttentionTransferLoss

from . import naive
from .loss_tester import LossTester


def reference(loss, student, teacher, targets):
    return naive.mean(
        (a - b) ** 2
        for ours, theirs in zip(naive.energy(student), naive.energy(teacher), strict=True)
        for a, b in zip(naive.unit(ours), naive.unit(theirs), strict=True)
    )


class TestAttentionTransfer(LossTester):
    make = AttentionTransferLoss
    reference = staticmethod(reference)
    kind = "maps"
    shift_invariant = False


def test_channels_may_differ_and_the_scale_does_not_matter():
    draw = torch.Generator().manual_seed(0)
    student = torch.randn(2, 3, 4, 4, generator=draw)
    teacher = torch.randn(2, 7, 4, 4, generator=draw)
    loss = AttentionTransferLoss()
    torch.testing.assert_close(loss(5 * student, teacher), loss(student, teacher))
    assert loss(student, student.repeat(1, 2, 1, 1)) < 1e-12
    assert loss.weight_at(0) == 1000.0


@pytest.mark.parametrize(("ours", "theirs"), [(1, 1), (4, 1), (1, 4)])
def test_maps_of_one_position_are_refused_because_every_unit_map_is_the_same(ours, theirs):
    student, teacher = torch.rand(2, 3, ours, ours), torch.rand(2, 5, theirs, theirs)
    loss = AttentionTransferLoss()
    for call in (loss, loss.build):
        with pytest.raises(ShapeError, match=r"2 positions on one grid, got .* AttentionTransferL"):
            call(student, teacher)


def test_all_zero_maps_have_a_finite_gradient():
    student = torch.zeros(2, 3, 4, 4, requires_grad=True)
    AttentionTransferLoss()(student, torch.rand(2, 3, 4, 4)).backward()
    assert student.grad.isfinite().all()
