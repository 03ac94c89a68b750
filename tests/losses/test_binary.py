"""BinaryKDLoss: independent classes, one logit, and masks that overlap."""

from math import exp

import pytest
import torch
import torch.nn.functional as F

from kdlayers import BinaryKDLoss, attach_kd, functional
from kdlayers.errors import ShapeError
from tests.nets import Net, batch

from . import naive
from .loss_tester import LossTester


def loops(loss, student, teacher, _targets):
    scale = loss.temperature

    def shares(z):
        p = 1 / (1 + exp(-z / scale))
        return [p, 1 - p]

    pairs = zip(student.flatten().tolist(), teacher.flatten().tolist(), strict=True)
    return scale**2 * naive.mean(naive.divergence(shares(zt), shares(zs)) for zs, zt in pairs)


class TestBinaryKD(LossTester):
    make = BinaryKDLoss
    reference = staticmethod(loops)
    shift_invariant = False

    @pytest.mark.parametrize("value", [torch.nan])  # inf is a probability of 1
    def test_a_teacher_without_finite_numbers_is_not_hidden(self, value):
        super().test_a_teacher_without_finite_numbers_is_not_hidden(value)


class TestBinaryKDOnClassMaps(TestBinaryKD):
    make = staticmethod(lambda: BinaryKDLoss(temperature=2.0))
    kind = "maps"


def test_it_is_binary_cross_entropy_less_the_teachers_entropy():
    draw = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(6, 4, generator=draw, dtype=torch.float64) for _ in "ab")
    shares = teacher.sigmoid()
    expected = [F.binary_cross_entropy_with_logits(z, shares) for z in (student, teacher)]
    value = functional.binary_kd(student, teacher)
    torch.testing.assert_close(value, expected[0] - expected[1])
    each = functional.binary_kd(student, teacher, reduction="none")
    assert each.shape == (6, 4)
    torch.testing.assert_close(each.mean(), value)
    torch.testing.assert_close(functional.binary_kd(student, teacher, reduction="sum"), each.sum())


def test_infinite_logits_are_certain():
    student = torch.tensor([[0.5, -0.5]], requires_grad=True)
    value = functional.binary_kd(student, torch.tensor([[torch.inf, -torch.inf]]))
    wanted = torch.tensor([[1.0, 0.0]])
    torch.testing.assert_close(value, F.binary_cross_entropy_with_logits(student, wanted))
    value.backward()
    torch.testing.assert_close(student.grad, (student.detach().sigmoid() - wanted) / 2)


@pytest.mark.parametrize("classes", [1, 5])
def test_a_student_learns_the_probabilities_of_a_teacher(classes):
    torch.manual_seed(0)
    images, _ = batch(16)
    student, teacher = Net(4, classes), Net(6, classes).eval()
    several = (torch.rand(16, classes) < 0.5).float()
    kd = attach_kd(student, teacher, losses=[BinaryKDLoss()], example=images)
    optimiser = torch.optim.Adam(student.parameters(), lr=0.01)
    values = []
    for _ in range(60):
        optimiser.zero_grad()
        student(images)
        loss = kd.loss(several)
        loss.backward()
        optimiser.step()
        values.append(loss.item())
    assert values[-1] < values[0] / 10
    with torch.no_grad():
        distance = (student(images).sigmoid() - teacher(images).sigmoid()).abs()
    assert distance.max() < 0.1


def test_maps_of_another_size_are_interpolated():
    student, teacher = torch.randn(2, 1, 4, 4), torch.randn(2, 1, 8, 8)
    halved = F.interpolate(teacher, (4, 4), mode="bilinear", antialias=True)
    loss = BinaryKDLoss()
    torch.testing.assert_close(loss(student, teacher), loss(student, halved))


@pytest.mark.parametrize(
    ("student", "teacher"),
    [((4, 3), (4, 2)), ((4, 3), (4, 3, 2, 2)), ((4,), (4,)), ((4, 3, 2, 2), (4, 2, 2, 2))],
)
def test_shapes_that_differ_raise(student, teacher):
    with pytest.raises(ShapeError, match=r"logits \[batch, classes\] or class maps .*got \[4"):
        BinaryKDLoss()(torch.zeros(student), torch.zeros(teacher))
