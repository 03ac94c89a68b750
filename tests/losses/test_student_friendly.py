import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from kdlayers.errors import ArgumentError, ArgumentTypeError, KDLayersWarning, ShapeError
from kdlayers.losses import (
    AEKTLoss,
    AttentionSimplifier,
    DKDLoss,
    KDLoss,
    MutualLoss,
    StudentFriendlyKDLoss,
)

from . import naive
from .loss_tester import LossTester


def simplify(simplifier, softened):
    """One sample's simplified logits, by loops."""

    def layer(module, values):
        return [
            sum(w * v for w, v in zip(line, values, strict=True)) + b
            for line, b in zip(module.weight.tolist(), module.bias.tolist(), strict=True)
        ]

    query, key, value = (
        layer(m, softened) for m in (simplifier.query, simplifier.key, simplifier.value)
    )
    attended = [
        sum(a * v for a, v in zip(naive.softmax([q * k for k in key]), value, strict=True))
        for q in query
    ]
    return [x + o for x, o in zip(softened, layer(simplifier.output, attended), strict=True)]


def teacher_side(loss, teacher):
    temperature = loss.temperature
    rows = [
        [temperature * u for u in simplify(loss.simplifier, [z / temperature for z in row])]
        for row in teacher.tolist()
    ]
    return torch.tensor(rows, dtype=torch.float64)


def reference(loss, student, teacher, targets):
    return naive.kd(student, teacher_side(loss, teacher), targets)


class TestStudentFriendlyKD(LossTester):
    make = StudentFriendlyKDLoss
    reference = staticmethod(reference)
    metrics = ("entropy", "agreement", "teacher_kl")


class TestStudentFriendlyDKD(LossTester):
    make = staticmethod(lambda: StudentFriendlyKDLoss(base=DKDLoss(beta=2.0)))
    metrics = ("entropy", "agreement", "teacher_kl")
    warns_on_two_classes = True

    @staticmethod
    def reference(loss, student, teacher, targets):
        teacher = teacher_side(loss, teacher)
        target, others = (f(student, teacher, targets) for f in (naive.tckd, naive.nckd))
        return target + 2.0 * others

    def test_labels_are_needed_one_a_sample(self):
        student, teacher, _ = self.inputs()
        with pytest.raises(ArgumentTypeError, match="DKDLoss needs the labels"):
            type(self).make()(student, teacher)


class TestAnchored(LossTester):
    make = staticmethod(lambda: StudentFriendlyKDLoss(anchor=0.5))
    metrics = ("entropy", "agreement", "teacher_kl")

    @staticmethod
    def reference(loss, student, teacher, targets):
        simplified = teacher_side(loss, teacher)
        anchor = naive.kd(simplified, teacher, targets) / loss.temperature**2
        return naive.kd(student, simplified, targets) + 0.5 * anchor


def pair(seed=0, classes=6, batch=4):
    draw = torch.Generator().manual_seed(seed)
    student, teacher = (2 * torch.randn(batch, classes, generator=draw) for _ in "ab")
    return student, teacher, torch.randint(classes, (batch,), generator=draw)


@given(seed=st.integers(0, 9999), temperature=st.sampled_from([1.0, 3.0, 4.0]))
@settings(deadline=None)
def test_step_0_equals_the_base_loss(seed, temperature):
    student, teacher, targets = pair(seed)
    loss = StudentFriendlyKDLoss(temperature=temperature)
    expected = KDLoss(temperature=temperature)(student, teacher, targets)
    torch.testing.assert_close(loss(student, teacher, targets), expected)
    torch.testing.assert_close(loss.student_friendly(teacher).detach(), teacher)


def test_first_step_moves_the_output_layer_then_all_layers_learn():
    student, teacher, targets = pair()
    loss = StudentFriendlyKDLoss()
    loss(student, teacher, targets).backward()
    moved = {name for name, p in loss.named_parameters() if p.grad.abs().sum() > 0}
    assert moved == {"simplifier.output.weight", "simplifier.output.bias"}
    torch.optim.SGD(loss.parameters(), 0.1).step()
    loss(student, teacher, targets).backward()
    assert all(p.grad.abs().sum() > 0 for p in loss.parameters())


def test_adaptive_base_trains_simplifier_and_matrix():
    student, teacher, targets = pair()
    loss = StudentFriendlyKDLoss(base=AEKTLoss(beta=1.0))
    loss(student, teacher, targets).backward()
    names = {name for name, p in loss.named_parameters() if p.grad.abs().sum() > 0}
    assert {"base.fc.weight", "simplifier.output.weight"} <= names
    assert {"entropy", "ratio"} <= set(loss.metrics())


def test_gradient_scale_changes_the_simplifiers_gradient_only():
    student, teacher, targets = pair()
    gradients = []
    for scale in (1.0, 1 / 16):
        loss = StudentFriendlyKDLoss(simplifier_grad_scale=scale)
        ours = student.clone().requires_grad_()
        value = loss(ours, teacher, targets)
        value.backward()
        gradients.append((value.detach(), ours.grad, loss.simplifier.output.bias.grad))
    (value, ours, bias), (value2, ours2, bias2) = gradients
    assert torch.equal(value, value2)
    assert torch.equal(ours, ours2)
    torch.testing.assert_close(bias2, bias / 16)


def test_gradient_into_the_simplified_logits_is_the_closed_form():
    student, teacher, targets = (t.double() if t.is_floating_point() else t for t in pair())
    loss = StudentFriendlyKDLoss()
    loss(student, teacher, targets).backward()
    q, p = (t.div(4).softmax(1) for t in (teacher, student))
    logs = (q / p).log()
    slope = q * (logs - (q * logs).sum(1, keepdim=True))
    torch.testing.assert_close(loss.simplifier.output.bias.grad, 16 * slope.mean(0))


def test_metrics_measure_entropy_agreement_and_distance_to_the_teacher():
    student, teacher, targets = pair(classes=4)
    loss = StudentFriendlyKDLoss(simplifier=nn.Linear(4, 4))
    loss(student, teacher, targets)
    with torch.no_grad():
        u = loss.simplifier(teacher / 4)
    values = {name: value.item() for name, value in loss.metrics().items()}
    rows = [naive.softmax(row) for row in u.tolist()]
    assert values["entropy"] == pytest.approx(
        naive.mean(-naive.divergence(q, [1.0] * 4) for q in rows), rel=1e-5
    )
    assert values["agreement"] == (u.argmax(1) == teacher.argmax(1)).float().mean()
    kl = naive.kd(4 * u, teacher, targets) / 16
    assert values["teacher_kl"] == pytest.approx(kl, rel=1e-5)


class Reverse(nn.Module):
    def forward(self, x):
        return -x


def test_warns_about_lost_agreement_at_intervals():
    student, teacher, targets = pair()
    loss = StudentFriendlyKDLoss(simplifier=Reverse(), check_every=3)
    loss(student, teacher, targets)
    loss(student, teacher, targets)
    with pytest.warns(KDLayersWarning, match="agree with the teacher's class on 0% of the last"):
        loss(student, teacher, targets)
    loss(student, teacher, targets)
    healthy = StudentFriendlyKDLoss(check_every=1)
    healthy(student, teacher, targets)


class Longer(nn.Module):
    def forward(self, x):
        return torch.cat([x, x], 1)


def test_a_simplifier_must_keep_the_shape():
    with pytest.raises(ShapeError, match=r"must keep the shape .* got \[4, 6\] and gave \[4, 12\]"):
        StudentFriendlyKDLoss(simplifier=Longer())(*pair())


@pytest.mark.parametrize(
    ("wrong", "error", "sentence"),
    [
        ({"base": MutualLoss()}, ArgumentError, "base=MutualLoss sends no gradient to the teacher"),
        ({"base": KDLoss(weight=0.9)}, ArgumentError, "weight, at, name and teacher_index of"),
        ({"base": KDLoss(teacher_index=1)}, ArgumentError, "base=KDLoss would be ignored; give"),
        (
            {"base": KDLoss(temperature=2.0), "temperature": 4.0},
            ArgumentError,
            "has temperature=2.0",
        ),
        ({"base": nn.Linear(2, 2)}, ArgumentTypeError, "base must be a DistillLoss, got Linear"),
        ({"simplifier": len}, ArgumentTypeError, "simplifier must be an nn.Module"),
        ({"anchor": -1.0}, ArgumentError, "anchor must be 0 or more"),
        ({"min_agreement": 50}, ArgumentError, "min_agreement is a share, between 0 and 1, got 50"),
        ({"check_every": 0}, ArgumentError, "check_every must be 1 or more"),
        ({"temperature": 0.0}, ArgumentError, "temperature must be above 0"),
    ],
)
def test_unusable_options_are_named(wrong, error, sentence):
    with pytest.raises(error, match=sentence):
        StudentFriendlyKDLoss(**wrong)


def test_simplifier_sizes():
    assert sum(p.numel() for p in AttentionSimplifier(100).parameters()) == 40_400
    assert sum(p.numel() for p in AttentionSimplifier(1000).parameters()) == 513_384
    with pytest.raises(ArgumentError, match="num_classes must be 2 or more, got 1"):
        AttentionSimplifier(1)
    start = AttentionSimplifier(5, 2, residual=False)(torch.randn(3, 5))
    assert not start.any()


@pytest.mark.parametrize("scale", [1.0, 0.25])
@pytest.mark.parametrize("base", [KDLoss, DKDLoss])
def test_classes_that_the_teacher_masks_have_probability_zero(base, scale):
    student = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(4, 5, dtype=torch.float64)
    targets = torch.tensor([0, 1, 3, 4])
    teacher[:, 2] = -torch.inf
    loss = StudentFriendlyKDLoss(base=base(), simplifier_grad_scale=scale, anchor=0.5)
    loss.build(student, teacher)
    # The attention starts as the identity, so the first value is the base loss's.
    value = loss(student, teacher, targets)
    torch.testing.assert_close(value, base()(student, teacher, targets))
    torch.nn.init.normal_(loss.simplifier.output.weight)
    loss(student, teacher, targets).backward()
    gradients = [student.grad, *(p.grad for p in loss.simplifier.parameters())]
    assert all(g is not None and g.isfinite().all() for g in gradients)
    assert all(metric.isfinite() for metric in loss.metrics().values())
    simplified = loss.student_friendly(teacher)
    assert simplified[:, 2].isneginf().all()
    assert simplified[:, [0, 1, 3, 4]].isfinite().all()
