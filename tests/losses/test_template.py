import pytest
import torch
from torch import nn

from kdlayers import CodebookTargets
from kdlayers.errors import ArgumentTypeError, NotFittedError, ShapeError
from kdlayers.losses import TemplateLoss

from . import naive
from .loss_tester import LossTester


def reference(loss, scores, assignment, targets):
    scores, assignment = scores.flatten(0, -2).tolist(), assignment.flatten(0, -2).tolist()
    return naive.mean(
        naive.divergence(q, naive.softmax(a)) for a, q in zip(scores, assignment, strict=True)
    )


class TestTemplate(LossTester):
    make = TemplateLoss
    reference = staticmethod(reference)
    kind = "scores"


class OneHotTargets(nn.Module):
    """A substitute for fitted template targets: the largest channel is the template."""

    num_templates = 4

    def __init__(self):
        super().__init__()
        self.register_buffer("fitted_flag", torch.tensor(False))

    @property
    def fitted(self):
        return bool(self.fitted_flag)

    def soft_assignment(self, features, labels=None):
        assert not features.requires_grad
        self.labels = labels
        return nn.functional.one_hot(features.argmax(dim=-1), 4).to(features.dtype)

    def fitter(self, *, seed=0):
        return f"fitter {seed}"


def test_targets_turn_features_into_the_assignment():
    scores = torch.randn(2, 3, 3, 4, generator=torch.Generator().manual_seed(0))
    features = torch.eye(4)[torch.arange(18) % 4].reshape(2, 3, 3, 4).requires_grad_()
    labels = torch.tensor([0, 1])
    loss = TemplateLoss(template_targets=OneHotTargets())
    log_likely = scores.log_softmax(-1).flatten(0, 2)[torch.arange(18), torch.arange(18) % 4]
    torch.testing.assert_close(loss(scores, features, labels), -log_likely.mean())
    assert loss.template_targets.labels is labels


def test_fitting_is_the_targets_and_their_buffers_are_saved():
    loss = TemplateLoss(template_targets=OneHotTargets())
    assert not loss.fitted
    assert loss.fitter(seed=3) == "fitter 3"
    assert list(loss.state_dict()) == ["template_targets.fitted_flag"]
    loss.template_targets.fitted_flag.fill_(True)
    other = TemplateLoss(template_targets=OneHotTargets())
    other.load_state_dict(loss.state_dict())
    assert other.fitted


def test_without_targets_there_is_nothing_to_fit():
    assert TemplateLoss().fitted
    assert TemplateLoss().fitter() is None


def test_the_number_of_templates_must_agree():
    with pytest.raises(ShapeError, match="has 5 templates, but the targets have 4; create the"):
        TemplateLoss(template_targets=OneHotTargets())(torch.zeros(2, 5), torch.zeros(2, 7))
    with pytest.raises(ArgumentTypeError, match=r"must be CodebookTargets.* got Linear"):
        TemplateLoss(template_targets=nn.Linear(2, 2))


def test_positions_must_agree_with_channels_last():
    with pytest.raises(ShapeError, match=r"channels last, got \[2, 4, 3, 3\] and \[2, 3, 3, 4\]"):
        TemplateLoss()(torch.zeros(2, 4, 3, 3), torch.zeros(2, 3, 3, 4))


def test_a_fitted_codebook_gives_the_softmax_of_negative_squared_distances():
    draw = torch.Generator().manual_seed(0)
    features, scores = (torch.randn(2, 3, 3, c, generator=draw) for c in (5, 4))
    loss = TemplateLoss(template_targets=CodebookTargets(4, sharpness=0.5))
    with pytest.raises(NotFittedError, match=r"call kd.fit\(loader\)"):
        loss(scores, features)
    loss.template_targets.fit([(features.flatten(0, 2), None)])
    centers = loss.template_targets.centers.tolist()
    assignment = torch.tensor(
        [
            naive.softmax(
                [-0.5 * sum((a - b) ** 2 for a, b in zip(f, c, strict=True)) for c in centers]
            )
            for f in features.flatten(0, 2).tolist()
        ]
    )
    expected = reference(loss, scores, assignment, None)
    assert loss(scores, features).item() == pytest.approx(expected, rel=1e-4)
