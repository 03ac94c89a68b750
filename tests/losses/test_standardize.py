"""standardize=True in the losses on logits."""

import pytest
import torch

from kdlayers import functional as kdf
from kdlayers.errors import KDLayersWarning
from kdlayers.losses import AEKTLoss, DKDLoss, KDLoss

from . import naive
from .loss_tester import LossTester
from .naive_relations import standardized


def rows(logits):
    return torch.tensor([standardized(row) for row in logits.tolist()], dtype=torch.float64)


def dkd(student, teacher, targets):
    return naive.tckd(student, teacher, targets) + 8 * naive.nckd(student, teacher, targets)


class TestStandardizedKD(LossTester):
    make = staticmethod(lambda: KDLoss(standardize=True))
    reference = staticmethod(lambda loss, s, t, y: naive.kd(rows(s), rows(t), y))
    warns_on_two_classes = True


class TestStandardizedDKD(LossTester):
    make = staticmethod(lambda: DKDLoss(standardize=True))
    reference = staticmethod(lambda loss, s, t, y: dkd(rows(s), rows(t), y))
    needs_labels = True
    warns_on_two_classes = True


class TestStandardizedAEKT(LossTester):
    make = staticmethod(lambda: AEKTLoss(standardize=True))
    needs_labels = True
    warns_on_two_classes = True
    metrics = ("target", "others", "adaptive", "ratio")

    @staticmethod
    def reference(loss, student, teacher, targets):
        weight, bias = loss.fc.weight.tolist(), loss.fc.bias.tolist()
        mapped = torch.tensor(
            [
                [sum(w * z for w, z in zip(line, row, strict=True)) + b for line, b in both]
                for row in student.tolist()
                for both in [list(zip(weight, bias, strict=True))]
            ],
            dtype=torch.float64,
        )
        tensors = rows(mapped), rows(teacher), targets
        return dkd(*tensors) + naive.aekt(*tensors)


@pytest.mark.parametrize("make", [KDLoss, lambda **o: DKDLoss(beta=0, **o), AEKTLoss])
def test_two_classes_have_no_gradient_and_a_warning_says_so(make):
    student = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(4, 2, dtype=torch.float64)
    with pytest.warns(KDLayersWarning) as seen:
        value = make(standardize=True)(student, teacher, torch.tensor([0, 1, 1, 0]))
    assert any("the gradient of a loss on them is always 0" in str(w.message) for w in seen)
    assert torch.autograd.grad(value, student)[0].abs().max() < 1e-5


@pytest.mark.parametrize("make", [KDLoss, DKDLoss, AEKTLoss])
def test_the_scale_of_student_and_teacher_does_not_matter(make):
    draw = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(4, 5, generator=draw) for _ in "ab")
    loss, labels = make(standardize=True), torch.tensor([0, 1, 2, 4])
    expected = loss(student, teacher, labels)
    torch.testing.assert_close(loss(3 * student + 1, 0.5 * teacher - 2, labels), expected)
    plain = make()(kdf.standardize(student), kdf.standardize(teacher), labels)
    torch.testing.assert_close(expected, plain)
    assert ", standardize=True" in repr(loss)
    assert "standardize" not in repr(make())
