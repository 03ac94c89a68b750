import torch

from kdlayers.losses import MutualLoss

from . import naive
from .loss_tester import LossTester


class TestMutual(LossTester):
    make = MutualLoss
    reference = staticmethod(lambda loss, *tensors: naive.kd(*tensors, temperature=1.0))


def test_each_network_learns_from_its_own_loss_only():
    draw = torch.Generator().manual_seed(0)
    a, b = (torch.randn(4, 5, generator=draw, requires_grad=True) for _ in "ab")
    MutualLoss()(a, b).backward()
    assert a.grad is not None
    assert b.grad is None
