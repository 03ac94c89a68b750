import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from kdlayers.errors import ArgumentError, NotFittedError, ShapeError
from kdlayers.functional import dkd
from kdlayers.losses import AEKTLoss, DKDLoss

from . import naive
from .loss_tester import LossTester


def reference(loss, student, teacher, targets):
    weight, bias = loss.fc.weight.tolist(), [0.0] * loss.fc.out_features
    if loss.fc.bias is not None:
        bias = loss.fc.bias.tolist()
    mapped = torch.tensor(
        [
            [sum(w * z for w, z in zip(line, row, strict=True)) + b
             for line, b in zip(weight, bias, strict=True)]
            for row in student.tolist()
        ],
        dtype=torch.float64,
    )  # fmt: skip
    target, others = naive.tckd(mapped, teacher, targets), naive.nckd(mapped, teacher, targets)
    adaptive = naive.aekt(mapped, teacher, targets, loss.form)
    return loss.alpha * target + loss.beta * others + loss.gamma * adaptive


class TestAEKT(LossTester):
    make = AEKTLoss
    reference = staticmethod(reference)
    needs_labels = True
    warns_on_two_classes = True
    metrics = ("target", "others", "adaptive", "ratio")


class TestAEKTRatioSquared(TestAEKT):
    make = staticmethod(lambda: AEKTLoss(form="ratio_sq", fc_bias=False))


class TestAEKTRatio(TestAEKT):
    make = staticmethod(lambda: AEKTLoss(form="ratio", gamma=0.1))


class TestAEKTIs(TestAEKT):
    make = staticmethod(lambda: AEKTLoss(form="is", alpha=0.5, beta=2.0, gamma=3.0))


def pair(seed=0, classes=6):
    draw = torch.Generator().manual_seed(seed)
    student, teacher = (2 * torch.randn(4, classes, generator=draw) for _ in "ab")
    return student, teacher, torch.randint(classes, (4,), generator=draw)


@given(seed=st.integers(0, 9999))
@settings(deadline=None)
def test_equals_dkd_at_step_0_without_the_adaptive_term(seed):
    student, teacher, targets = pair(seed)
    loss = AEKTLoss(gamma=0.0, beta=2.0)
    assert torch.equal(loss(student, teacher, targets), dkd(student, teacher, targets, beta=2.0))


def test_cross_entropy_on_the_students_logits_leaves_the_layer_alone():
    student, teacher, targets = pair()
    loss = AEKTLoss()
    loss(student, teacher, targets)
    F.cross_entropy(student.requires_grad_(), targets).backward()
    assert loss.fc.weight.grad is None


def test_distillation_gradients_reach_the_student_only_through_the_matrix():
    student, teacher, targets = (t.double() if t.is_floating_point() else t for t in pair())
    loss = AEKTLoss(fc_init="default")
    loss.build(student, teacher)
    mapped = F.linear(student, loss.fc.weight, loss.fc.bias).detach().requires_grad_()
    raw = AEKTLoss()
    raw(mapped, teacher, targets).backward()
    loss(student.requires_grad_(), teacher, targets).backward()
    torch.testing.assert_close(student.grad, mapped.grad @ loss.fc.weight)


def test_relations_are_the_matrix_rows_for_the_students_logits():
    loss = AEKTLoss()
    with pytest.raises(NotFittedError, match="no matrix yet: attach_kd makes it, or the first"):
        loss.relations()
    loss(*pair())
    assert torch.equal(loss.relations(), torch.eye(6))
    assert not loss.relations().requires_grad
    assert sum(p.numel() for p in loss.parameters()) == 6 * 6 + 6


def test_the_number_of_classes_is_fixed_by_the_first_batch():
    loss = AEKTLoss()
    loss(*pair())
    with pytest.raises(ShapeError, match=r"made for 6 classes, but the logits are \[4, 5\]"):
        loss(*pair(classes=5))


def test_a_clip_bounds_the_gradient_but_keeps_it():
    teacher = torch.tensor([[40.0, 0.0, 0.0]])
    slopes = []
    for clip in (None, 5.0):
        student = torch.tensor([[0.0, 20.0, 20.0]], requires_grad=True)
        loss = AEKTLoss(alpha=0.0, beta=0.0, temperature=1.0, ratio_clip=clip)
        value = loss(student, teacher, torch.tensor([0]))
        value.backward()
        slopes.append(-student.grad[0, 0].item())
        assert value > 1e8  # the true value, clipped or not
    assert slopes[0] > 1e8
    assert slopes[1] == pytest.approx(5.0, rel=1e-3)


def test_two_classes_with_only_the_target_terms_give_no_warning():
    assert AEKTLoss(beta=0.0)(*pair(classes=2)).isfinite()


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"form": "chi"}, "form must be one of chi2, ratio_sq, ratio, is, got 'chi'"),
        ({"fc_init": "zero"}, "fc_init must be one of identity, default, got 'zero'"),
        ({"gamma": -1.0}, "gamma must be 0 or more"),
        ({"ratio_clip": 0.0}, "ratio_clip must be above 0"),
    ],
)
def test_unusable_options_are_named(wrong, sentence):
    with pytest.raises(ArgumentError, match=sentence):
        AEKTLoss(**wrong)


def test_training_lowers_both_losses_on_one_batch():
    student, teacher, targets = pair()
    loss, student = AEKTLoss(beta=1.0), student.requires_grad_()
    first = loss(student, teacher, targets).item()
    optimiser = torch.optim.SGD([student, *loss.parameters()], lr=0.05)
    for _ in range(100):
        optimiser.zero_grad()
        loss(student, teacher, targets).backward()
        optimiser.step()
    assert loss(student, teacher, targets) < 0.1 * first
    assert DKDLoss(beta=1.0)(student, teacher, targets) < first
