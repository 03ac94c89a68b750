"""Inheritance and exploration against NumPy and loops."""

from math import pi

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdlayers.functional import exploration, inheritance

from ..losses import naive


def factors(batch=4, shape=(3, 2, 2), seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(batch, *shape, generator=draw, dtype=torch.float64) for _ in "ab"]


def rows(factor):
    return factor.flatten(1).tolist()


def cka(x, y):
    """Linear CKA by feature covariances, the other way round than by Gram matrices."""
    x, y = (z.flatten(1).numpy() for z in (x, y))
    x, y = x - x.mean(0), y - y.mean(0)
    inner = np.linalg.norm(x.T @ y) ** 2
    return inner / (np.linalg.norm(x.T @ x) * np.linalg.norm(y.T @ y))


@given(seed=st.integers(0, 999), batch=st.integers(2, 5), channels=st.integers(1, 4))
@settings(max_examples=30, deadline=None)
def test_values_equal_loops_and_numpy(seed, batch, channels):
    x, y = factors(batch, (channels, 2, 3), seed)
    for p in (1, 2):
        expected = naive.distance(rows(x), rows(y), p)
        assert inheritance(x, y, p=p).item() == pytest.approx(expected, rel=1e-9)
        assert exploration(x, y, p=p).item() == pytest.approx(-expected, rel=1e-9)
        scaled = inheritance(x, y, p=p, scale="sqrt_dim").item()
        assert scaled == pytest.approx((6 * channels) ** 0.5 * expected, rel=1e-9)
        assert 0 <= scaled <= 2
    cosines = naive.cosines(rows(x), rows(y))
    near = inheritance(x, y, measure="cosine", reduction="none")
    assert near.tolist() == pytest.approx([1 - c for c in cosines])
    far = exploration(x, y, measure="cosine").item()
    assert far == pytest.approx(naive.mean(abs(c) for c in cosines))
    if batch > 2:
        assert exploration(x, y, measure="cka").item() == pytest.approx(cka(x, y), rel=1e-9)
        assert inheritance(x, y, measure="cka").item() == pytest.approx(1 - cka(x, y), abs=1e-9)
    else:  # whatever the factors are
        assert cka(x, y) == pytest.approx(1)


def test_each_measure_has_the_right_sign_for_each_use():
    x, y = factors()
    for measure in ("norm", "cosine", "cka"):
        same, other = (inheritance(x, z, measure=measure).item() for z in (x, y))
        assert same == pytest.approx(0, abs=1e-9)
        assert same < other
        same, other = (exploration(x, z, measure=measure).item() for z in (x, y))
        assert same > other


OPTIONS = [{}, {"p": 2}, {"measure": "cosine"}, {"measure": "cka"}]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("function", [inheritance, exploration])
def test_gradients_equal_differences(function, options):
    x, y = factors(3, (2, 2, 1))
    assert torch.autograd.gradcheck(lambda z: function(z, y, **options), x.requires_grad_())


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("case", ["equal", "zero", "huge", "tiny"])
def test_degenerate_factors_have_finite_values_and_gradients(options, case):
    x, y = (z.float() for z in factors())
    x = {"equal": y.clone(), "zero": 0 * x, "huge": 1e4 * x, "tiny": 1e-6 * x}[case]
    for function in (inheritance, exploration):
        x = x.detach().requires_grad_()
        value = function(x, y, **options)
        value.backward()
        assert value.isfinite()
        assert x.grad.isfinite().all()


def test_independent_factors_have_the_sizes_known_beforehand():
    x, y = factors(64, (32, 8, 8))
    # A difference of unit vectors has entries of variance 2 / D, and E|n| = sqrt(2 / pi).
    size = (2 / 2048) ** 0.5
    assert inheritance(x, y).item() == pytest.approx(size * (2 / pi) ** 0.5, rel=0.01)
    assert inheritance(x, y, p=2).item() == pytest.approx(size, rel=0.01)
    assert exploration(x, y, measure="cka").item() == pytest.approx(0.970, abs=0.005)


@pytest.mark.parametrize("measure", ["norm", "cosine", "cka"])
def test_factors_of_different_dtypes(measure):
    x, y = factors()
    for function in (inheritance, exploration):
        found = function(x.float(), y, measure=measure)
        assert found.item() == pytest.approx(function(x, y, measure=measure).item(), abs=1e-6)
