"""Standardised logits, correlations, relations and channels: loops, identities, and edges."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdlayers import functional as kdf
from kdlayers.errors import ArgumentError, ArgumentTypeError, ShapeError

from ..losses import naive_relations as naive

quick = settings(max_examples=20, deadline=None)


def pair(batch=4, width=5, other=None, dtype=torch.float64, seed=0, spread=2.0):
    draw = torch.Generator().manual_seed(seed)
    shapes = (batch, width), (batch, other or width)
    return [
        (spread * torch.randn(s, generator=draw, dtype=torch.float64)).to(dtype) for s in shapes
    ]


def maps(dtype=torch.float64, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(3, 4, 2, 5, generator=draw, dtype=torch.float64).to(dtype) for _ in "ab"]


CALLS = {
    "standardize": (lambda s, t: kdf.kd(kdf.standardize(s), kdf.standardize(t)), pair),
    "standardize maps": (lambda s, t: (kdf.standardize(s) - kdf.standardize(t)).abs().sum(), maps),
    "dist": (lambda s, t: kdf.dist(s, t, beta=2.0, gamma=0.5, temperature=2.0), pair),
    "rkd_distance": (kdf.rkd_distance, pair),
    "rkd_angle": (kdf.rkd_angle, pair),
    "similarity_preserving": (kdf.similarity_preserving, pair),
    "channelwise": (kdf.channelwise, maps),
}
BY_NAME = pytest.mark.parametrize(("call", "make"), CALLS.values(), ids=CALLS)


@given(seed=st.integers(0, 999), batch=st.integers(3, 6), width=st.integers(2, 6))
@quick
def test_values_equal_loops(seed, batch, width):
    student, teacher = pair(batch, width, seed=seed)
    rows = [naive.standardized(row) for row in student.tolist()]
    torch.testing.assert_close(kdf.standardize(student), torch.tensor(rows, dtype=torch.float64))
    for options in ({}, {"beta": 0.5, "gamma": 2.0, "temperature": 4.0}):
        expected = naive.dist(student, teacher, **options)
        assert kdf.dist(student, teacher, **options).item() == pytest.approx(expected, rel=1e-9)
    wide = pair(batch, width, other=width + 3, seed=seed)
    for name in ("rkd_distance", "rkd_angle", "similarity_preserving"):
        expected = getattr(naive, name)(*wide)
        assert getattr(kdf, name)(*wide).item() == pytest.approx(expected, rel=1e-8, abs=1e-12)
    for temperature in (1.0, 4.0):
        expected = naive.channelwise(*maps(seed=seed), temperature)
        found = kdf.channelwise(*maps(seed=seed), temperature=temperature)
        assert found.item() == pytest.approx(expected, rel=1e-9)


@BY_NAME
def test_gradients_equal_differences_on_both_sides(call, make):
    student, teacher = (tensor.requires_grad_() for tensor in make())
    assert torch.autograd.gradcheck(call, (student, teacher))


@pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # by torch's forward mode
def test_similarities_have_all_derivatives_although_their_backward_is_our_own():
    call, (student, teacher) = kdf.similarity_preserving, pair()
    leaves = student.requires_grad_(), teacher.requires_grad_()
    assert torch.autograd.gradcheck(call, leaves, check_forward_ad=True)
    assert torch.autograd.gradgradcheck(call, leaves)
    batches = torch.randn(3, 4, 5), torch.randn(3, 4, 2)
    each = zip(*batches, strict=True)
    slopes = torch.stack([torch.func.grad(call)(ours, theirs) for ours, theirs in each])
    torch.testing.assert_close(torch.vmap(torch.func.grad(call))(*batches), slopes)


@BY_NAME
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_inputs_are_computed_in_float32(call, make, dtype):
    student, teacher = make(dtype=dtype)
    value = call(student, teacher)
    assert value.dtype == torch.float32
    torch.testing.assert_close(value, call(student.float(), teacher.float()), rtol=1e-6, atol=1e-6)
    assert call(*make()).dtype == torch.float64


@BY_NAME
def test_autocast_and_compile_give_the_same_value(call, make):
    student, teacher = make(dtype=torch.float32)
    expected = call(student, teacher)
    torch._dynamo.reset()
    compiled = torch.compile(call, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(student, teacher), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(call(student, teacher), expected)


@BY_NAME
def test_equal_tensors_are_the_minimum(call, make):
    student = make()[0].requires_grad_()
    value = call(student, student.detach().clone())
    # DIST has a constant in its denominators.
    assert value.item() == pytest.approx(0, abs=1e-5 if call is CALLS["dist"][0] else 1e-12)
    assert torch.autograd.grad(value, student)[0].abs().max() < 1e-5


@given(scale=st.floats(0.1, 50), shift=st.floats(-20, 20), seed=st.integers(0, 999))
@quick
def test_irrelevant_transformations_do_not_change_the_value(scale, shift, seed):
    student, teacher = pair(seed=seed)
    moved = scale * student + shift
    close = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(kdf.standardize(moved), kdf.standardize(student), **close)
    for relation in (kdf.rkd_distance, kdf.rkd_angle):
        torch.testing.assert_close(relation(moved, teacher), relation(student, teacher), **close)
    expected = kdf.similarity_preserving(student, teacher)
    torch.testing.assert_close(kdf.similarity_preserving(scale * student, teacher), expected)
    channels = torch.randn(1, 4, 1, 1, dtype=torch.float64)
    ours, theirs = maps()
    expected = kdf.channelwise(ours, theirs)
    torch.testing.assert_close(kdf.channelwise(ours + channels, theirs), expected)


def test_probabilities_that_are_a_linear_function_of_the_teachers_cost_nothing():
    teacher = pair()[1].softmax(1)
    student = (0.4 * teacher + 0.6 / 5).log()
    assert kdf.dist(student, teacher.log()).item() == pytest.approx(0, abs=1e-5)
    assert kdf.kd(student, teacher.log()) > 0.1


def test_classes_that_no_sample_resembles_count_little():
    """As in the authors' code: its constant is added to the product of the norms."""
    student, teacher = pair(batch=6, width=8)
    for logits in (student, teacher):
        logits[:, :3] += 14.0  # the probabilities of the other five are about 1e-6
    found = kdf.dist(student, teacher, beta=0.0).item()
    assert found == pytest.approx(naive.dist(student, teacher, beta=0.0), rel=1e-9)
    few = kdf.dist(student[:, :3], teacher[:, :3], beta=0.0).item()
    assert found == pytest.approx(5 / 8 + 3 / 8 * few, rel=1e-2)


def test_close_samples_keep_their_digits_in_float32():
    """Far from the origin, where differences of squared norms lose precision."""
    student, teacher = pair(8, 16, spread=0.1)
    exact = [f(student, teacher) for f in (kdf.rkd_distance, kdf.rkd_angle)]
    narrow = (student + 64).float(), teacher.float()
    for value, function in zip(exact, (kdf.rkd_distance, kdf.rkd_angle), strict=True):
        torch.testing.assert_close(function(*narrow).double(), value, rtol=1e-3, atol=1e-6)


EDGES = {
    "all equal": lambda s: torch.zeros_like(s),
    "two samples equal": lambda s: s[[0, 0, 2, 3]] if s.dim() == 2 else s[[0, 0, 2]],
    "one sample zero": lambda s: (
        s * torch.arange(len(s)).view(-1, *[1] * (s.dim() - 1)).clamp(max=1)
    ),
    "huge": lambda s: 1e4 * s,
    "tiny": lambda s: 1e-6 * s,
}


@BY_NAME
@pytest.mark.parametrize("edge", EDGES.values(), ids=EDGES)
def test_degenerate_inputs_have_finite_values_and_moderate_gradients(call, make, edge):
    student, teacher = (edge(tensor) for tensor in make(dtype=torch.float32))
    for other in (teacher, make(dtype=torch.float32)[1]):
        student = student.detach().requires_grad_()
        value = call(student, other)
        (slope,) = torch.autograd.grad(value, student)
        assert value.isfinite()
        assert slope.isfinite().all()
        if edge is not EDGES["tiny"]:
            assert slope.abs().max() < 1e3


@pytest.mark.parametrize(
    ("call", "error", "sentence"),
    [
        (lambda s, t: kdf.standardize(s[0]), ShapeError, r"with at least 2 classes, got \[5\]"),
        (lambda s, t: kdf.standardize(s.long()), ArgumentTypeError, "logits must be a floating"),
        (lambda s, t: kdf.dist(s, t[:, :4]), ShapeError, r"one shape \[batch, classes\], got"),
        (lambda s, t: kdf.dist(s[:1], t[:1]), ShapeError, "needs a batch of 2 or more.*gamma=0"),
        (lambda s, t: kdf.dist(s, t, gamma=-1), ArgumentError, "gamma must be 0 or more"),
        (lambda s, t: kdf.dist(s, t, temperature=0), ArgumentError, "temperature must be above 0"),
        (lambda s, t: kdf.rkd_distance(s, t[:3]), ShapeError, r"same samples, got \[4, 5\] and"),
        (lambda s, t: kdf.rkd_angle(s[:2], t[:2]), ShapeError, "a batch of 3 or more, got"),
        (
            lambda s, t: kdf.rkd_angle(s[0], t[0]),
            ShapeError,
            r"features \[batch, ...\] of at least",
        ),
        (lambda s, t: kdf.similarity_preserving(s[:1], t[:1]), ShapeError, "of 2 or more, got"),
        (lambda s, t: kdf.similarity_preserving(s, [1]), ArgumentTypeError, "teacher must be a t"),
        (lambda s, t: kdf.channelwise(s, t), ShapeError, r"maps of one shape \[batch, channels"),
        (
            lambda s, t: kdf.channelwise(s[:, :, None, None], t[:, :, None, None]),
            ShapeError,
            "at least 2 positions to compare",
        ),
        (
            lambda s, t: kdf.channelwise(*maps(), temperature=-1),
            ArgumentError,
            "temperature must be above 0",
        ),
    ],
)
def test_wrong_arguments_are_named(call, error, sentence):
    with pytest.raises(error, match=sentence):
        call(*pair())


def test_dist_of_one_sample_without_the_relation_within_classes():
    student, teacher = pair(batch=1)
    assert kdf.dist(student, teacher, gamma=0).isfinite()
