"""Identities that hold for any logits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdlayers import functional as kdf

FORMS = ["chi2", "ratio_sq", "ratio", "is"]


@st.composite
def batches(draw, least_classes=3):
    batch, classes = draw(st.integers(1, 5)), draw(st.integers(least_classes, 9))
    seed = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    spread = draw(st.sampled_from([0.1, 2.0, 10.0]))
    student, teacher = (
        spread * torch.randn(batch, classes, generator=seed, dtype=torch.float64) for _ in "ab"
    )
    return student, teacher, torch.randint(classes, (batch,), generator=seed)


temperatures = st.sampled_from([1.0, 2.0, 4.0, 7.5])
quick = settings(max_examples=20, deadline=None)
CLOSE = {"rtol": 1e-9, "atol": 1e-9}


def slopes(value, student):
    return torch.autograd.grad(value.sum(), student)[0]


def every_term(student, teacher, targets, **options):
    yield kdf.kd(student, teacher, **options)
    for function in (kdf.tckd, kdf.nckd, kdf.dkd):
        yield function(student, teacher, targets, **options)
    for form in FORMS:
        yield kdf.aekt(student, teacher, targets, form=form, **options)


@given(batches(), temperatures)
@quick
def test_distillation_is_the_target_term_plus_the_muted_other_term(batch, temperature):
    student, teacher, targets = batch
    options = {"temperature": temperature, "reduction": "none"}
    confidence = (teacher / temperature).softmax(1).gather(1, targets[:, None])[:, 0]
    target = kdf.tckd(student, teacher, targets, **options)
    others = kdf.nckd(student, teacher, targets, **options)
    whole = kdf.kd(student, teacher, **options)
    torch.testing.assert_close(whole, target + (1 - confidence) * others, **CLOSE)


@given(batches(), temperatures)
@quick
def test_gradients_sum_to_zero_over_classes(batch, temperature):
    student, teacher, targets = batch
    student.requires_grad_()
    for value in every_term(student, teacher, targets, temperature=temperature):
        slope = slopes(value, student)
        scale = slope.abs().sum(1).clamp(min=1.0)
        assert (slope.sum(1).abs() <= 1e-9 * scale).all()


@given(batches(), temperatures)
@quick
def test_gradients_are_the_closed_forms(batch, temperature):
    student, teacher, targets = batch
    student.requires_grad_()
    options = {"temperature": temperature, "reduction": "none"}
    p, q = ((z / temperature).softmax(1).detach() for z in (student, teacher))
    target = torch.nn.functional.one_hot(targets, p.shape[1]).bool()
    s, a = (x[target][:, None] for x in (p, q))
    rest_p, rest_q = (x.masked_fill(target, 0) for x in (p, q))
    rest_p, rest_q = (x / x.sum(1, keepdim=True) for x in (rest_p, rest_q))
    expected = {
        kdf.kd(student, teacher, **options): p - q,
        kdf.tckd(student, teacher, targets, **options): torch.where(
            target, s - a, -(s - a) * rest_p
        ),
        kdf.nckd(student, teacher, targets, **options): rest_p - rest_q,
    }
    for value, slope in expected.items():
        torch.testing.assert_close(slopes(value, student), temperature * slope, **CLOSE)


@given(batches(), temperatures, st.sampled_from(FORMS), st.booleans())
@quick
def test_adaptive_gradients_are_the_closed_forms(batch, temperature, form, drop):
    student, teacher, targets = batch
    student.requires_grad_()
    options = {"temperature": temperature, "reduction": "none"}
    value = kdf.aekt(student, teacher, targets, form=form, drop_one_minus_s=drop, **options)
    p, q = ((z / temperature).softmax(1).detach() for z in (student, teacher))
    s, a = (x.gather(1, targets[:, None]) for x in (p, q))
    r = a / s
    weight = {"chi2": s - r * a, "ratio_sq": -r * a, "ratio": -r, "is": 1 - r}[form]
    one_hot = torch.nn.functional.one_hot(targets, p.shape[1])
    if drop:  # 1 - s, without cancellation where s is almost 1
        weight = weight / (p * (1 - one_hot)).sum(1, keepdim=True)
    expected = temperature * weight * (one_hot - p)
    torch.testing.assert_close(slopes(value, student), expected, rtol=1e-7, atol=1e-9)
    other = {"chi2": (s - a) ** 2 / s, "ratio_sq": a**2 / s, "ratio": r, "is": r - r.log() - 1}
    torch.testing.assert_close(
        value.detach(), temperature**2 * other[form][:, 0], rtol=1e-7, atol=1e-9
    )


@given(batches())
@quick
def test_the_other_term_never_moves_the_target_logit(batch):
    student, teacher, targets = batch
    student.requires_grad_()
    slope = slopes(kdf.nckd(student, teacher, targets), student)
    assert not slope.gather(1, targets[:, None]).any()


@given(batches())
@quick
def test_equal_logits_minimise_losses_with_a_minimum(batch):
    student, _, targets = batch
    teacher = student.clone()
    student.requires_grad_()
    named = [kdf.kd(student, teacher), kdf.dkd(student, teacher, targets)]
    named += [kdf.aekt(student, teacher, targets, form=form) for form in ("chi2", "is")]
    for value in named:
        assert value.item() == pytest.approx(0, abs=1e-12)
        assert slopes(value, student).abs().max() < 1e-12


@given(batches(), st.floats(-30, 30), st.floats(-30, 30))
@quick
def test_a_shift_of_all_logits_changes_nothing(batch, first, second):
    student, teacher, targets = batch
    shifted = every_term(student + first, teacher + second, targets)
    for plain, moved in zip(every_term(student, teacher, targets), shifted, strict=True):
        torch.testing.assert_close(moved, plain, rtol=1e-8, atol=1e-9)


@given(batches())
@quick
def test_no_term_is_negative_and_reductions_agree(batch):
    student, teacher, targets = batch
    rows = list(every_term(student, teacher, targets, reduction="none"))
    sums = every_term(student, teacher, targets, reduction="sum")
    means = every_term(student, teacher, targets)
    for row, total, mean in zip(rows, sums, means, strict=True):
        assert row.shape == targets.shape
        assert (row >= -1e-12).all()
        torch.testing.assert_close(total, row.sum())
        torch.testing.assert_close(mean, row.mean())


@given(batches())
@quick
def test_gradient_reaches_the_teachers_side_but_not_through_the_adaptive_term(batch):
    student, teacher, targets = batch
    teacher.requires_grad_()
    for value in (kdf.kd(student, teacher), kdf.dkd(student, teacher, targets)):
        assert torch.autograd.grad(value, teacher)[0].isfinite().all()
    student.requires_grad_()
    (slope,) = torch.autograd.grad(kdf.aekt(student, teacher, targets), teacher, allow_unused=True)
    assert slope is None
