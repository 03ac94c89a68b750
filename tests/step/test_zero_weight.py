"""A weight of 0: the value is logged, and adds exactly nothing."""

import pytest
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from kdlayers import AEKTLoss, FitNetLoss, KDLoss, attach_kd
from kdlayers.schedules import LinearWarmup
from tests.nets import Net, batch
from tests.two_ranks import connect, on_two_ranks

IMAGES, LABELS = batch()


class Masked(Net):
    """Its last class has no probability, so that KD is infinite."""

    def forward(self, x):
        return super().forward(x).masked_fill(torch.tensor([False, False, True]), -torch.inf)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
@pytest.mark.parametrize("compiled", [False, True])
def test_an_infinite_value_does_not_reach_the_sum(compiled):
    student = Masked(4).train()
    losses = [FitNetLoss(at="last"), KDLoss(weight=0.0)]
    kd = attach_kd(student, Net(6), losses=losses, example=IMAGES)
    student(IMAGES)
    total = (torch.compile(kd.loss, backend="aot_eager") if compiled else kd.loss)(LABELS)
    total.backward()
    assert kd.terms["KDLoss"] == torch.inf
    assert kd.terms["KDLoss.weighted"] == 0
    assert total == kd.terms["FitNetLoss.last"]
    assert all(p.grad is None or p.grad.isfinite().all() for p in student.parameters())


@pytest.mark.parametrize("weight", [0.0, LinearWarmup(10)])
@pytest.mark.parametrize("precision", [torch.float32, torch.float64])
def test_a_step_in_which_nothing_counts(weight, precision):
    student, teacher = Net(4).to(precision).train(), Net(6).to(precision)
    kd = attach_kd(student, teacher, losses=[AEKTLoss(weight=weight)], example=IMAGES)
    student(IMAGES.to(precision))
    total = kd.loss(LABELS)
    total.backward()
    assert total == 0
    assert total.dtype == precision
    assert all((parameter.grad == 0).all() for parameter in kd.parameters())
    assert all(p.grad is None or (p.grad == 0).all() for p in student.parameters())


def warming_up(rank):
    """Steps without labels, whose only term has a weight of 0 at first."""
    connect(rank)
    torch.manual_seed(0)
    student = Net(4).train()
    losses = [KDLoss(weight=LinearWarmup(2)), FitNetLoss(at="last", weight=LinearWarmup(2))]
    kd = attach_kd(student, Net(6), losses=losses, example=IMAGES)
    called = DistributedDataParallel(student)
    optimizer = torch.optim.SGD([*student.parameters(), *kd.parameters()], 0.1)
    before = [p.clone() for p in student.parameters()]
    for step in range(3):
        optimizer.zero_grad()
        called(IMAGES[rank::2])
        kd.loss().backward()
        optimizer.step()
        still = all(map(torch.equal, before, student.parameters()))
        assert still == (step == 0)
    values = torch.cat([p.detach().flatten() for p in student.parameters()])
    mean = values.clone()
    dist.all_reduce(mean)
    torch.testing.assert_close(values, mean / 2)


@pytest.mark.slow
@pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
def test_processes_stay_together_in_a_warm_up():
    on_two_ranks(warming_up)
