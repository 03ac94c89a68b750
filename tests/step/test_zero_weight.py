"""A weight of 0: the value is logged, and adds exactly nothing."""

import pytest
import torch

from kdlayers import AEKTLoss, FitNetLoss, KDLoss, attach_kd
from kdlayers.schedules import LinearWarmup
from tests.nets import Net, batch

IMAGES, LABELS = batch()


class Masked(Net):
    """Its last class has no probability, so that KD is infinite."""

    def forward(self, x):
        return super().forward(x).masked_fill(torch.tensor([False, False, True]), -torch.inf)


def test_an_infinite_value_does_not_reach_the_sum():
    student = Masked(4).train()
    losses = [FitNetLoss(at="last"), KDLoss(weight=0.0)]
    kd = attach_kd(student, Net(6), losses=losses, example=IMAGES)
    student(IMAGES)
    total = kd.loss(LABELS)
    total.backward()
    assert kd.terms["KDLoss"] == torch.inf
    assert kd.terms["KDLoss.weighted"] == 0
    assert total == kd.terms["FitNetLoss.last"]
    assert all(p.grad is None or p.grad.isfinite().all() for p in student.parameters())


@pytest.mark.parametrize("weight", [0.0, LinearWarmup(10)])
@pytest.mark.parametrize("precision", [torch.float32, torch.float64])
def test_all_parameters_that_it_reaches_get_a_gradient_of_zero(weight, precision):
    # A wrapper such as DistributedDataParallel waits for the gradient of every parameter.
    student, teacher = Net(4).to(precision).train(), Net(6).to(precision)
    kd = attach_kd(student, teacher, losses=[AEKTLoss(weight=weight)], example=IMAGES)
    student(IMAGES.to(precision))
    total = kd.loss(LABELS)
    total.backward()
    assert total == 0
    assert total.dtype == precision
    for parameter in (*student.parameters(), *kd.parameters()):
        assert (parameter.grad == 0).all()
