"""States of DecisionTargets: damaged ones are refused, whole ones move and widen."""

import math

import pytest
import torch

from kdlayers import DecisionTargets
from kdlayers.errors import CheckpointError
from tests.targets.test_decisions import data, fitted


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"projection": torch.randn(2)}, r"must be \[components, channels\]"),
        ({"shift": torch.randn(3)}, r"shift has shape \[3\], but the other tensors require \[2\]"),
        ({"centers": torch.randn(11, 2)}, r"centers has shape \[11, 2\]"),
        ({"prototypes": torch.randn(12, 3)}, r"prototypes has shape \[12, 3\]"),
        ({"decisions": torch.eye(11)}, r"decisions has shape \[11, 11\]"),
        ({"decisions": torch.ones(12, 12)}, "rows of decisions must be probabilities"),
        ({"shift": torch.full((2,), math.nan)}, "shift has NaN or infinite values"),
        ({"counts": None}, "is incomplete: it has .* but not counts"),
    ],
)
def test_damaged_states(change, sentence):
    state = {k: v for k, v in {**fitted()[0].state_dict(), **change}.items() if v is not None}
    targets = DecisionTargets(7)
    with pytest.raises(CheckpointError, match=sentence):
        targets.load_state_dict(state)
    assert not targets.fitted
    assert (targets.subclasses, targets.num_classes) == (7, None)


def test_moves_and_widens():
    features, labels = data(dtype=torch.float32)
    targets = DecisionTargets(3, components=2).fit([(features, labels)])
    assert targets.decisions.dtype == torch.float32
    assert targets.double().soft_assignment(features, labels).dtype == torch.float64
    assert targets.counts.dtype == torch.long
    assert targets.to("meta").decisions.is_meta


def test_state_loads_strictly_into_unfitted_and_other_sizes():
    targets, features, labels = fitted()
    others = [DecisionTargets(3), DecisionTargets(5, num_classes=7), fitted()[0]]
    for other in others:
        other.load_state_dict(targets.state_dict())
        assert (other.subclasses, other.num_classes, other.num_templates) == (3, 4, 12)
        q = other.soft_assignment(features, labels)
        assert torch.equal(q, targets.soft_assignment(features, labels))
    assert set(targets.state_dict()) == {
        "projection",
        "shift",
        "centers",
        "prototypes",
        "decisions",
        "counts",
    }
