"""The divergence in chunks against the loss written out."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kdlayers import CodebookTargets, DecisionTargets, KDLayer, attach_kd
from kdlayers._utils import chunks
from kdlayers.errors import ArgumentError, ShapeError
from kdlayers.functional import template_kl
from kdlayers.losses import TemplateLoss
from tests import reference
from tests.nets import Net


def assignments(dtype, classes=4, width=6):
    """Fitted targets of both kinds, features, labels."""
    torch.manual_seed(1)
    features = torch.randn(200, width, dtype=dtype) + 3
    labels = torch.arange(200) % classes
    features[:, 0] += labels * 2
    codebook = CodebookTargets(12).fit([(features, None)])
    decisions = DecisionTargets(2, components=3).fit([(features, labels)])
    return codebook, decisions, features, labels


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("kind", ["soft", "one-hot", "decisions"])
def test_a_teacher_without_finite_numbers_is_not_hidden(kind, fused, value, monkeypatch):
    if fused:
        monkeypatch.setattr(chunks, "LEAST_SCORES", 0)
    codebook, decisions, features, labels = assignments(torch.float32)
    if kind == "one-hot":
        codebook.sharpness = None
    targets = decisions if kind == "decisions" else codebook
    features[7, 2] = value
    finite = targets.soft_assignment(features, labels).isfinite().all(dim=1)
    assert not finite[7]
    assert finite.sum() == len(features) - 1
    scores = torch.randn(200, targets.num_templates, requires_grad=True)
    found = targets.divergence(scores, features, labels)
    found.backward()
    assert found.isnan()
    assert not scores.grad[7].isfinite().all()


@given(
    positions=st.integers(1, 30),
    channels=st.integers(1, 6),
    sharpness=st.sampled_from([1e-3, 0.1, 1.0, 50.0, None]),
    entries=st.sampled_from([1, 50, 2**20]),
    given_scores=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_codebook_divergence_equals_the_unfused_loss(
    positions, channels, sharpness, entries, given_scores, seed
):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    targets = CodebookTargets(5, sharpness=sharpness).fit([(draw(50, 3), None)])
    features = draw(positions, 3) * 2
    units, templates = (
        draw(positions, channels).requires_grad_(),
        draw(5, channels).requires_grad_(),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(chunks._ENTRIES, "cpu", entries)
        student = units @ templates.T if given_scores else units
        ours = targets.divergence(student, features, templates=None if given_scores else templates)
        grads = torch.autograd.grad(ours, (units, templates))
    scores = units @ templates.T
    plain = template_kl(scores, targets.soft_assignment(features))
    torch.testing.assert_close(ours, plain, rtol=1e-11, atol=1e-12)
    wanted = torch.autograd.grad(plain, (units, templates))
    for mine, theirs in zip(grads, wanted, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("given_scores", [True, False])
def test_decision_divergence_equals_the_unfused_loss(given_scores, monkeypatch):
    monkeypatch.setitem(chunks._ENTRIES, "cpu", 30)
    _, targets, features, labels = assignments(torch.float64)
    units = torch.randn(200, 5, dtype=torch.float64, requires_grad=True)
    templates = torch.randn(8, 5, dtype=torch.float64, requires_grad=True)
    reference.check_divergence(targets, features, labels, units, templates, scores=given_scores)


def test_float32_divergence_with_far_features_is_exact_to_a_millionth():
    torch.manual_seed(0)
    features = torch.randn(500, 64).relu() * 3 + 20  # squared distances of hundreds
    targets = CodebookTargets(100).fit([(features + torch.randn(500, 64), None)])
    scores = torch.randn(500, 100).requires_grad_()
    ours = targets.divergence(scores, features)
    (grad,) = torch.autograd.grad(ours, scores)
    wide = scores.detach().double().requires_grad_()
    plain = template_kl(wide, targets.soft_assignment(features.double()))
    (exact,) = torch.autograd.grad(plain, wide)
    assert abs(ours.item() / plain.item() - 1) < 1e-6
    assert (grad - exact).norm() < 2e-5 * exact.norm()
    same = template_kl(scores, targets.soft_assignment(features))
    assert abs(ours.item() / same.item() - 1) < 1e-6


def test_small_float16_gradients_survive_the_scaler():
    scores = torch.randn(4096, 512).half().requires_grad_()
    targets = CodebookTargets(512).fit([(torch.randn(2048, 8), None)])
    scale = 2.0**16
    (grad,) = torch.autograd.grad(targets.divergence(scores, torch.randn(4096, 8)) * scale, scores)
    assert (grad != 0).float().mean() > 0.99


class Sharper(CodebookTargets):
    def soft_assignment(self, features, labels=None):
        return super().soft_assignment(features, labels).square().softmax(-1)


def test_an_overridden_soft_assignment_is_honoured():
    torch.manual_seed(0)
    features, scores = torch.randn(40, 3), torch.randn(40, 5)
    targets = Sharper(5).fit([(features, None)])
    wanted_assignment = targets.soft_assignment(features)
    assert TemplateLoss(template_targets=targets)(scores, features) == template_kl(
        scores, wanted_assignment
    )
    units, templates = torch.randn(40, 4), torch.randn(5, 4)
    found = TemplateLoss(template_targets=targets)(units, features, templates=templates)
    torch.testing.assert_close(found, template_kl(units @ templates.T, wanted_assignment))


def test_invalid_arguments_are_errors():
    codebook, decisions, features, labels = assignments(torch.float32)
    for targets, number in ((codebook, 12), (decisions, 8)):
        with pytest.raises(ShapeError, match=f"num_templates={number}"):
            targets.divergence(torch.randn(200, 5), features, labels)
        with pytest.raises(ShapeError, match=f"num_templates={number}"):
            targets.divergence(torch.randn(200, 3), features, labels, templates=torch.randn(5, 3))
        for rows in (199, 201):
            with pytest.raises(ShapeError, match=rf"the same positions, got \[{rows}, "):
                targets.divergence(torch.randn(rows, targets.num_templates), features, labels)
    with pytest.raises(ArgumentError, match='"normal" or "low"'):
        KDLayer(4, 4, memory="little")
    with pytest.raises(ArgumentError, match='"normal" or "low"'):
        attach_kd(Net(), Net(), ["last"], memory="little")
