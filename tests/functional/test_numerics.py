"""Dtypes, autocast, compilers, and the messages for wrong arguments."""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from kdlayers import functional as kdf
from kdlayers.errors import ArgumentError, ArgumentTypeError, KDLayersWarning, ShapeError

Y = torch.tensor([0, 2, 1, 3])


def logits(dtype=torch.float32, size=2.0):
    draw = torch.Generator().manual_seed(0)
    return [(size * torch.randn(4, 5, generator=draw)).to(dtype) for _ in "ab"]


CALLS = {
    "kd": lambda s, t, **o: kdf.kd(s, t, **o),
    "tckd": lambda s, t, **o: kdf.tckd(s, t, Y, **o),
    "nckd": lambda s, t, **o: kdf.nckd(s, t, Y, **o),
    "dkd": lambda s, t, **o: kdf.dkd(s, t, Y, **o),
    "aekt": lambda s, t, **o: kdf.aekt(s, t, Y, **o),
    "template_kl": lambda s, t, **o: kdf.template_kl(s, t.softmax(-1), **o),
    "inheritance": lambda s, t, **o: kdf.inheritance(s, t, **o),
    "exploration": lambda s, t, **o: kdf.exploration(s, t, **o),
}


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs_are_computed_in_float32(call, dtype):
    student, teacher = logits(dtype)
    if call is CALLS["template_kl"]:
        teacher = teacher.float()
    value = call(student, teacher)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, call(student.float(), teacher.float()), rtol=1e-6, atol=1e-6)
    assert call(*logits(torch.float64)).dtype == torch.float64


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
def test_autocast_and_compile_give_the_same_value(call):
    student, teacher = logits()
    expected = call(student, teacher)
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(student, teacher), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(call(student, teacher), expected)
        torch.testing.assert_close(compiled(student, teacher), expected)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("form", ["chi2", "ratio_sq", "ratio", "is"])
def test_the_ratio_never_overflows(form, temperature):
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        student = torch.tensor([[-150.0, 150.0, 150.0]], dtype=dtype, requires_grad=True)
        teacher = torch.tensor([[150.0, -150.0, -150.0]], dtype=dtype)
        value = kdf.aekt(student, teacher, Y[:1], form=form, temperature=temperature)
        value.backward()
        assert value.isfinite()
        assert student.grad.isfinite().all()


def test_one_hot_assignments_are_cross_entropy_with_the_template():
    scores = logits()[0]
    expected = torch.nn.functional.cross_entropy(scores, Y)
    one_hot = torch.nn.functional.one_hot(Y, 5).float()
    torch.testing.assert_close(kdf.template_kl(scores, one_hot), expected)
    rows = kdf.template_kl(scores.expand(3, 4, 5), one_hot.expand(3, 4, 5), reduction="none")
    assert rows.shape == (3, 4)


def test_gradient_of_template_kl_is_the_difference_of_the_assignments():
    scores, other = logits(torch.float64)
    scores, wanted = scores.reshape(2, 2, 5).requires_grad_(), other.softmax(1).reshape(2, 2, 5)
    kdf.template_kl(scores, wanted).backward()
    torch.testing.assert_close(scores.grad, (scores.softmax(-1).detach() - wanted) / 4)


def test_warns_when_the_term_vanishes_with_two_classes():
    student, teacher = torch.randn(3, 2), torch.randn(3, 2)
    targets = torch.tensor([0, 1, 1])
    for function in (kdf.nckd, kdf.dkd):
        with pytest.warns(KDLayersWarning, match="with 2 classes the non-target term .* always 0"):
            function(student, teacher, targets)
    torch.testing.assert_close(
        kdf.dkd(student, teacher, targets, beta=0.0), kdf.kd(student, teacher)
    )


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (
            lambda s, t: kdf.kd(s, t[:, :4]),
            ShapeError,
            r"one shape \[batch, classes\], got \[4, 5\]",
        ),
        (lambda s, t: kdf.kd(s[0], t[0]), ShapeError, r"got \[5\] and \[5\]"),
        (lambda s, t: kdf.kd(s[:, :1], t[:, :1]), ShapeError, "at least 2 classes, got"),
        (lambda s, t: kdf.kd(s, Y), ArgumentTypeError, "the order of arguments is student, teach"),
        (lambda s, t: kdf.kd(3.0, 4.0), ArgumentTypeError, "student must be a tensor, got float"),
        (lambda s, t: kdf.kd(s, t, temperature=0), ArgumentError, "temperature must be above 0"),
        (
            lambda s, t: kdf.kd(s, t, temperature="4"),
            ArgumentTypeError,
            "must be a number, got str",
        ),
        (lambda s, t: kdf.kd(s, t, reduction="batchmean"), ArgumentError, 'must be "mean", "sum"'),
        (
            lambda s, t: kdf.dkd(s, t, t.softmax(1)[:, :4]),
            ShapeError,
            r"\[batch, 5\], one for",
        ),
        (
            lambda s, t: kdf.dkd(s, t, Y[:2]),
            ShapeError,
            r"\[4\], one per sample, got \[2\]",
        ),
        (lambda s, t: kdf.dkd(s, t, Y - 1), ArgumentError, r"in 0..4 .* labels from -1 to 2"),
        (lambda s, t: kdf.dkd(s, t, Y > 1), ArgumentTypeError, "got torch.bool"),
        (lambda s, t: kdf.dkd(s, t, [0, 1]), ArgumentTypeError, "targets must be a tensor, got"),
        (lambda s, t: kdf.dkd(s, t, Y, beta=-1), ArgumentError, "beta must be 0 or more"),
        (lambda s, t: kdf.aekt(s, t, Y, form="kl"), ArgumentError, "form must be one of chi2"),
        (lambda s, t: kdf.aekt(s, t, Y, ratio_clip=0), ArgumentError, "ratio_clip must be above"),
        (lambda s, t: kdf.template_kl(s, t[:2]), ShapeError, r"one shape \[..., templates\]"),
        (lambda s, t: kdf.inheritance(s, t[:, :2]), ShapeError, r"factors of one shape \[batch"),
        (lambda s, t: kdf.inheritance(s, t, p=3), ArgumentError, "p must be 1 or 2, got 3"),
        (lambda s, t: kdf.exploration(s, t, scale="no"), ArgumentError, "scale must be"),
        (
            lambda s, t: kdf.exploration(s[:2], t[:2], measure="cka"),
            ShapeError,
            "needs a batch of 3 or more, got 2 .* always 1",
        ),
        (
            lambda s, t: kdf.inheritance(s, t, p=2, reduction="none"),
            ArgumentError,
            "which give one value for the whole batch",
        ),
    ],
)
def test_wrong_arguments_are_named(call, error, sentence):
    with pytest.raises(error, match=sentence):
        call(*logits())


@pytest.mark.parametrize("call", ["kd", "tckd", "nckd", "dkd"])
@pytest.mark.parametrize("both", [False, True])
def test_masked_classes_have_probability_zero(call, both):
    student, teacher = logits(torch.float64)
    teacher[:, 4] = -torch.inf
    if both:
        student[:, 4] = -torch.inf
    student.requires_grad_()
    teacher.requires_grad_()
    value = CALLS[call](student, teacher)
    value.backward()
    low = teacher.detach().clone().clamp(min=-4e3)  # softmax underflows to the same zeros
    expected = CALLS[call](student.detach().clamp(min=-4e3), low)
    torch.testing.assert_close(value, expected)
    for tensor in (student, teacher):
        assert tensor.grad.isfinite().all()
    if call == "kd" and not both:
        ours, theirs = (student / 4).log_softmax(1), (teacher / 4).softmax(1)
        by_torch = 16 * torch.nn.functional.kl_div(ours, theirs, reduction="batchmean")
        torch.testing.assert_close(value, by_torch)


@pytest.mark.parametrize("form", ["chi2", "ratio_sq", "ratio", "is"])
def test_mixed_labels_do_not_read_classes_of_weight_zero(form):
    student, teacher = logits(torch.float64)
    for masked in (student, teacher):
        masked[:, 2:] = -torch.inf
    mixed = torch.tensor([[1.0, 0.0], [0.3, 0.7], [0.0, 1.0], [1.0, 0.0]]).double()
    labels = torch.cat([mixed, torch.zeros(4, 3)], dim=1)  # the first row has one class, not two
    student.requires_grad_()
    value = kdf.aekt(student, teacher, labels, form=form, reduction="none")
    each = [
        kdf.aekt(student, teacher, torch.full((4,), k), form=form, reduction="none") for k in (0, 1)
    ]
    torch.testing.assert_close(value, (torch.stack(each, dim=1) * mixed).sum(dim=1))
    (slope,) = torch.autograd.grad(value.sum(), student)
    assert slope.isfinite().all()


@pytest.mark.parametrize("call", [kdf.tckd, kdf.nckd, kdf.dkd, kdf.aekt])
def test_vmap_is_a_loop(call):
    draw = torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(3, 4, 5, generator=draw) for _ in "ab")
    targets = torch.randint(5, (3, 4), generator=draw)
    expected = torch.stack([call(*row) for row in zip(student, teacher, targets, strict=True)])
    torch.testing.assert_close(torch.func.vmap(call)(student, teacher, targets), expected)
    slopes = torch.func.vmap(torch.func.grad(call))(student, teacher, targets)
    one = torch.func.grad(call)(student[1], teacher[1], targets[1])
    torch.testing.assert_close(slopes[1], one)


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_empty_batches_raise_a_clear_error(call, reduction, monkeypatch):
    monkeypatch.setitem(globals(), "Y", Y[:0])
    with pytest.raises(ShapeError, match=r"got \[0, 5\]: .* skip empty batches"):
        call(torch.zeros(0, 5), torch.zeros(0, 5), reduction=reduction)


def test_kd_on_fake_tensors_gives_a_fake_scalar():
    with FakeTensorMode():
        student = torch.randn(4, 5, requires_grad=True)
        value = kdf.kd(student, torch.randn(4, 5))
        value.backward()
        assert value.shape == ()
        assert student.grad.shape == (4, 5)


def test_labels_of_a_subclass_are_checked_like_others():
    class Labels(torch.Tensor):
        pass

    with pytest.raises(ArgumentError, match=r"targets must lie in 0\.\.4 for 5 classes"):
        kdf.dkd(*logits(), torch.tensor([0, 2, 1, 5]).as_subclass(Labels))
