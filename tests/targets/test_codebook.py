"""Codebook targets: the assignment by plain loops, the fit, the state, the errors."""

import math
import pickle
import re

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.cluster import KMeans

from kdlayers import CodebookTargets
from kdlayers._targets import TemplateTargets, codebook_fit, reservoir, rows
from kdlayers.errors import (
    ArgumentError,
    ArgumentTypeError,
    FitError,
    KDLayersWarning,
    NotFittedError,
    ShapeError,
)


def with_centers(centers, **options):
    """Targets with these centres, without a fit."""
    targets = CodebookTargets(len(centers), **options)
    counts = torch.ones(len(centers), dtype=torch.long)
    targets._install(centers=centers, counts=counts, inertia=torch.zeros((), dtype=torch.float64))
    return targets


def batches(features, size):
    return [(part, None) for part in features.split(size)]


def naive(features, centers, sharpness):
    """Softmax of minus sharpness times squared distance, one number at a time, in float64."""
    rows = []
    for f in features.double().tolist():
        scores = [
            -sharpness * sum((a - b) ** 2 for a, b in zip(f, e, strict=True))
            for e in centers.double().tolist()
        ]
        weights = [math.exp(s - max(scores)) for s in scores]
        rows.append([w / sum(weights) for w in weights])
    return torch.tensor(rows, dtype=torch.float64)


@pytest.fixture
def small_sample(monkeypatch):
    """16 rows a centre are sampled, so that modest data need the second pass."""
    monkeypatch.setattr(codebook_fit, "ROWS_PER_CENTER", 16)
    monkeypatch.setattr(codebook_fit, "SMALL_SAMPLE", 0)


# ---------------------------------------------------------------- soft assignment


@pytest.mark.parametrize("sharpness", [0.01, 0.3, 1.0, 5.0])
def test_soft_assignment_agrees_with_loops(sharpness):
    features = torch.randn(30, 6, dtype=torch.float64) * 2
    centers = torch.randn(11, 6, dtype=torch.float64) * 2
    q = with_centers(centers, sharpness=sharpness).soft_assignment(features)
    torch.testing.assert_close(q, naive(features, centers, sharpness), atol=1e-12, rtol=1e-9)


def test_larger_sharpness_is_harder():
    features, centers = torch.randn(5, 3), torch.randn(4, 3)
    soft = with_centers(centers, sharpness=0.1).soft_assignment(features)
    hard = with_centers(centers, sharpness=10.0).soft_assignment(features)
    assert (hard.max(1).values > soft.max(1).values).all()


def test_no_sharpness_is_one_hot():
    features, centers = torch.randn(2, 7, 3), torch.randn(4, 3)
    q = with_centers(centers, sharpness=None).soft_assignment(features)
    nearest = ((features.unsqueeze(-2) - centers) ** 2).sum(-1).argmin(-1)
    assert torch.equal(q, torch.nn.functional.one_hot(nearest, 4).float())


@given(
    st.lists(st.integers(1, 4), max_size=3),
    st.integers(1, 5),
    st.integers(1, 6),
    st.sampled_from([torch.float32, torch.float64, torch.float16, torch.bfloat16]),
)
def test_any_leading_shape_and_dtype(shape, width, k, dtype):
    features = torch.randn(*shape, width).to(dtype)
    targets = with_centers(torch.randn(k, width))
    q = targets.soft_assignment(features, torch.zeros(3))  # labels are ignored
    assert q.shape == (*shape, k)
    assert q.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    rows = naive(features.reshape(-1, width), targets.centers, 1.0).reshape(*shape, k)
    torch.testing.assert_close(q.double(), rows, atol=1e-4, rtol=1e-3)


def test_far_rows_give_no_nan():
    q = with_centers(torch.randn(5, 3)).soft_assignment(torch.full((2, 3), 1e6))
    torch.testing.assert_close(q.sum(1), torch.ones(2))


def test_no_graph_and_full_precision_inside_autocast():
    features, targets = torch.randn(9, 4, requires_grad=True), with_centers(torch.randn(6, 4))
    plain = targets.soft_assignment(features)
    with torch.autocast("cpu", torch.bfloat16):
        inside = targets.soft_assignment(features)
    assert torch.equal(inside, plain)
    assert not plain.requires_grad
    assert not list(targets.parameters())


def test_compiles_without_graph_break():
    features, targets = torch.randn(9, 4), with_centers(torch.randn(6, 4))
    compiled = torch.compile(targets.soft_assignment, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(features), targets.soft_assignment(features))


# ---------------------------------------------------------------- fit


def test_fit_is_as_good_as_scikit_learn(monkeypatch):
    monkeypatch.setattr(codebook_fit, "SMALL_SAMPLE", 0)  # 2048 rows of 6000 are sampled
    features = torch.cat([torch.randn(3000, 5), torch.rand(3000, 5) * 5])
    targets = CodebookTargets(32).fit(batches(features, 500))
    theirs = KMeans(32, n_init=2, random_state=0).fit(features.numpy())
    assert targets.inertia < 1.05 * theirs.inertia_ / len(features)
    assert targets.centers.shape == (32, 5)
    assert targets.counts.sum() == 6000


def test_second_pass_is_one_lloyd_step_over_all_rows(small_sample, monkeypatch):
    features, seen = torch.randn(1000, 3), []
    original = codebook_fit.LloydPass.__init__

    def spy(self, centers, install):
        seen.append(centers.clone())
        original(self, centers, install)

    monkeypatch.setattr(codebook_fit.LloydPass, "__init__", spy)
    targets = CodebookTargets(10).fit(batches(features, 64))
    start = seen[0].double()
    index = ((features.double()[:, None] - start[None]) ** 2).sum(-1).argmin(1)
    total = 0.0
    for k in range(10):
        mine = features.double()[index == k]
        torch.testing.assert_close(targets.centers[k].double(), mine.mean(0), atol=1e-6, rtol=0)
        assert targets.counts[k] == len(mine)
        total += float(((mine - mine.mean(0)) ** 2).sum())
    assert float(targets.inertia) == pytest.approx(total / 1000)


@pytest.mark.parametrize("sizes", [[1000], [7] * 142 + [6], [999, 1]])
def test_result_does_not_depend_on_the_batch_size(sizes, small_sample):
    features = torch.randn(1000, 4)
    one = CodebookTargets(8).fit(batches(features, 100), seed=3)
    two = CodebookTargets(8).fit([(part, None) for part in features.split(sizes)], seed=3)
    assert torch.equal(one.centers, two.centers)
    assert torch.equal(one.counts, two.counts)


def test_order_of_the_loader_does_not_matter_if_the_sample_holds_all():
    features = torch.randn(400, 4)
    one = CodebookTargets(8).fit(batches(features, 100))
    two = CodebookTargets(8).fit(batches(features[torch.randperm(400)], 33))
    assert torch.equal(one.centers, two.centers)


def test_seed_decides_and_global_state_is_left_alone(small_sample):
    features = torch.randn(1000, 4)
    before = torch.get_rng_state()
    one, two = (CodebookTargets(8).fit(batches(features, 100), seed=1) for _ in range(2))
    other = CodebookTargets(8).fit(batches(features, 100), seed=2)
    assert torch.equal(one.centers, two.centers)
    assert not torch.equal(one.centers, other.centers)
    assert torch.equal(before, torch.get_rng_state())


def test_grids_with_gradient_and_image_labels_are_taken():
    grid = torch.randn(6, 3, 4, 5, requires_grad=True)
    rows = grid.detach().reshape(-1, 5)
    one = CodebookTargets(4).fit([(grid, torch.arange(6)), (grid, torch.rand(6, 10))])
    two = CodebookTargets(4).fit([(rows, None), (rows, None)])
    assert torch.equal(one.centers, two.centers)
    assert not one.centers.requires_grad


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_dtype_of_the_centres(dtype, expected):
    targets = CodebookTargets(3).fit([(torch.randn(50, 2).to(dtype), None)])
    assert targets.centers.dtype == expected


@pytest.mark.parametrize(("rows", "passes"), [(128, 1), (129, 2)])
def test_passes_over_the_data(rows, passes, small_sample):
    fitter, features = CodebookTargets(8).fitter(), torch.randn(rows, 2)
    done = 0
    while True:
        fitter.update(features, None)
        done += 1
        if not fitter.end_pass():
            break
    assert done == passes
    with pytest.raises(FitError, match="has finished; get a new one"):
        fitter.update(features, None)


def test_fitter_holds_a_bounded_number_of_rows(monkeypatch, small_sample):
    monkeypatch.setattr(rows, "BLOCK", 512)
    fitter, sizes = CodebookTargets(8).fitter(), []
    for _ in range(100):
        fitter.update(torch.randn(1000, 4), None)
        sizes.append(len(pickle.dumps(fitter)))  # counts every tensor it still holds
    numbers = 1.25 * 128 + 2 * 1000 + 512
    assert max(sizes) < numbers * (4 * 4 + 3 * 8) + 20_000


def test_wide_features_take_fewer_rows_a_centre():
    assert reservoir.sample_size(2**18, 4096, 64) == 2**18
    assert reservoir.sample_size(2**18, 4096, 2048) == 2**17
    assert reservoir.sample_size(2**18, 16000, 4096) == 16 * 16000


def test_too_few_rows_say_what_to_type():
    said = (
        "CodebookTargets(4096) needs at least 4096 positions, but the batches hold 640; pass more "
        "data, or choose a smaller codebook, such as KDPoint(..., targets=CodebookTargets(40)) "
        "with 16 positions for each centre"
    )
    with pytest.raises(FitError, match=re.escape(said)):
        CodebookTargets(4096).fit([(torch.randn(640, 4), None)])
    CodebookTargets(40).fit([(torch.randn(640, 4), None)])


def test_few_distinct_rows_warn():
    features = torch.tensor([[0.0, 1.0], [2.0, 3.0]]).repeat(20, 1)
    with pytest.warns(KDLayersWarning, match="only 2 distinct .* lower num_templates to 2 or less"):
        targets = CodebookTargets(5).fit([(features, None)])
    assert targets.centers.isfinite().all()
    q = targets.soft_assignment(features)
    torch.testing.assert_close(q.sum(1), torch.ones(40))


@pytest.mark.parametrize(
    ("given", "error", "sentence"),
    [
        ([(torch.randn(5, 2), None)], FitError, "at least 9 positions, but the batches hold 5"),
        ([], FitError, "empty loader"),
        ([(torch.randn(0, 2), None)], FitError, "without a single row"),
        (
            [(torch.randn(20, 2), None), (torch.tensor([[1.0, math.nan]]), None)],
            FitError,
            r"batch 1 \(counted from 0\) has NaN or infinite features in 1 of 1 rows",
        ),
        (
            [(torch.randn(20, 2), None), (torch.randn(20, 3), None)],
            ShapeError,
            "batch 1 has features of width 3, earlier batches had 2",
        ),
        (
            [(torch.randn(20, 2) * 1e19, None)],
            FitError,
            r"squared distances overflow torch.float32: choose a point after a normalisation",
        ),
        ([(torch.ones(20, 2).long(), None)], ArgumentTypeError, "floating-point tensor"),
        ([("features", None)], ArgumentTypeError, "must be a tensor, got str"),
        ([(torch.tensor(1.0), None)], ShapeError, r"must be \[\.\.\., D\]"),
        ([torch.randn(2, 20, 3)], ArgumentTypeError, "pairs .* found a Tensor; write fit"),
        (torch.randn(2, 20, 3), ArgumentTypeError, "pairs .* found a Tensor; write fit"),
        ([[torch.randn(20, 3)]], ArgumentTypeError, "pairs .* found a list of length 1;"),
        (torch.nn.Identity(), ArgumentTypeError, "pairs .* found a Identity; write fit"),
    ],
)
def test_bad_data_are_errors_and_leave_the_targets_unchanged(given, error, sentence):
    targets = CodebookTargets(9)
    with pytest.raises(error, match=sentence):
        targets.fit(given)
    assert not targets.fitted
    targets.fit([(torch.randn(40, 2), None)])
    centers = targets.centers
    with pytest.raises(error, match=sentence):
        targets.fit(given)
    assert targets.centers is centers


def test_the_largest_features_that_fit_give_finite_centres():
    rows = torch.randn(300, 4).clamp(-4, 4)
    for scale, dtype in ((1e18, torch.float32), (1e19, torch.float64)):
        targets = CodebookTargets(3).fit([(rows.to(dtype) * scale, None)])
        plain = CodebookTargets(3).fit([(rows.to(dtype), None)])
        assert targets.inertia.isfinite()
        assert float(targets.inertia) == pytest.approx(scale**2 * float(plain.inertia), rel=0.2)


@pytest.mark.parametrize("sharpness", [1.0, None])
def test_an_empty_batch(sharpness):
    targets = CodebookTargets(3, sharpness=sharpness)
    targets.fit([(torch.randn(0, 2), None), (torch.randn(40, 2), None)])
    assert targets.soft_assignment(torch.randn(0, 5, 2)).shape == (0, 5, 3)
    templates = torch.randn(3, 4)
    for student, extra in ((torch.randn(0, 3), {}), (torch.randn(0, 4), {"templates": templates})):
        with pytest.raises(ShapeError, match="skip empty batches"):
            targets.divergence(student, torch.randn(0, 2), **extra)


def test_a_generator_is_an_error_if_a_second_pass_is_needed(small_sample):
    with pytest.raises(FitError, match="yielded no batch, as an exhausted generator does"):
        CodebookTargets(2).fit((torch.randn(64, 2), None) for _ in range(3))


# ---------------------------------------------------------------- construction, state


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        ({"num_templates": 0}, ArgumentError, "num_templates must be 1 or more, got 0"),
        ({"num_templates": 2.0}, ArgumentTypeError, "must be an integer, got float"),
        ({"num_templates": True}, ArgumentTypeError, "must be an integer, got bool"),
        ({"sharpness": 0}, ArgumentError, "above 0 and finite, got 0"),
        ({"sharpness": -1.0}, ArgumentError, "sharpness must be above 0"),
        ({"sharpness": math.inf}, ArgumentError, "above 0 and finite"),
        ({"sharpness": "1"}, ArgumentTypeError, "sharpness must be a number, got str"),
    ],
)
def test_bad_arguments(arguments, error, sentence):
    with pytest.raises(error, match=re.escape(sentence)):
        CodebookTargets(**arguments)


def test_before_fit():
    targets = CodebookTargets()
    assert isinstance(targets, TemplateTargets)
    assert not targets.fitted
    assert targets.num_templates == 4096
    assert targets.sharpness == 1.0
    assert targets.centers is None
    assert targets.state_dict() == {}
    assert "4096, sharpness=1.0, fitted=False" in repr(targets)
    with pytest.raises(NotFittedError, match=r"CodebookTargets is not fitted .* kd\.fit\(loader\)"):
        targets.soft_assignment(torch.randn(2, 3))


def test_wrong_width_at_assignment():
    targets = with_centers(torch.randn(3, 4))
    with pytest.raises(ShapeError, match=r"must be \[\.\.\., 4\], as at fit, got \[2, 4, 5\]"):
        targets.soft_assignment(torch.randn(2, 4, 5))
