"""Training without the parameters in the student: `torch.func` calls it with others."""

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call, grad_and_value

from kdlayers import (
    CodebookTargets,
    DecisionTargets,
    DKDLoss,
    FeatureLoss,
    FitNetLoss,
    KDLoss,
    KDPoint,
    RKDLoss,
    attach_kd,
)
from tests.nets import Net, batch

IMAGES, LABELS = batch(12, pixels=16)
IMAGES = IMAGES.double()  # the fused operators round otherwise than the plain ones
LOADER = [(IMAGES[:6], LABELS[:6]), (IMAGES[6:], LABELS[6:])]
WAYS = {
    "KD": ([], [KDLoss()]),
    "DKD": ([], [DKDLoss()]),
    "FitNet": ([], [FitNetLoss(at="last")]),
    "FeatureLoss and RKD": ([], [FeatureLoss(at="last"), RKDLoss(at="last")]),
    "a weight of 0": ([], [KDLoss(weight=0.0), FitNetLoss(at="last")]),
    "letKD-2 and KD": (
        [
            KDPoint("first", targets=DecisionTargets(1, components=2)),
            KDPoint("last", targets=CodebookTargets(40)),  # as many as the fused operators take
        ],
        [KDLoss()],
    ),
}


@pytest.mark.filterwarnings("ignore:the optimiser changed the student")  # the test does
@pytest.mark.parametrize("way", WAYS)
def test_gradients_of_functional_calls(way):
    at, losses = WAYS[way]
    torch.manual_seed(0)
    student, teacher = Net(4).double(), Net(6).double()
    kd = attach_kd(student, teacher, at, losses=losses, example=IMAGES)
    kd.fit(LOADER, seed=0)
    given = {name: value.detach() + 0.1 for name, value in student.named_parameters()}
    buffers = {name: buffer.clone() for name, buffer in student.named_buffers()}

    def loss(parameters):
        state = parameters, {name: buffer.clone() for name, buffer in buffers.items()}
        logits = functional_call(student, state, (IMAGES,))
        return F.cross_entropy(logits, LABELS) + kd.loss(LABELS)

    slopes, value = grad_and_value(loss)(given)
    with torch.no_grad():  # the same with the parameters in the student
        for name, parameter in student.named_parameters():
            parameter.copy_(given[name])
    expected = F.cross_entropy(student(IMAGES), LABELS) + kd.loss(LABELS)
    expected.backward()
    assert float(kd.terms["total"]) > 0
    torch.testing.assert_close(value, expected.detach())
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(slopes[name], parameter.grad)
