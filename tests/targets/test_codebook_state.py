"""The state of codebook targets: loading, damage, copies, pickles and devices."""

import copy
import math
import pickle

import pytest
import torch

from kdlayers import CodebookTargets
from kdlayers.errors import CheckpointError
from tests.targets.test_codebook import with_centers


def test_state_loads_strictly_into_unfitted_and_other_sizes():
    fitted = CodebookTargets(5).fit([(torch.randn(50, 3), None)])
    for other in (CodebookTargets(5), CodebookTargets(9), with_centers(torch.randn(2, 8))):
        other.load_state_dict(fitted.state_dict())
        assert other.num_templates == 5
        features = torch.randn(4, 3)
        assert torch.equal(other.soft_assignment(features), fitted.soft_assignment(features))
        assert torch.equal(other.inertia, fitted.inertia)
        other.centers.zero_()  # a copy, not the same storage
        assert fitted.centers.any()


def test_state_loads_inside_another_module_and_by_assignment():
    fitted = CodebookTargets(5).fit([(torch.randn(50, 3), None)])
    outer = torch.nn.ModuleDict({"a": CodebookTargets(5), "b": CodebookTargets(2)})
    state = torch.nn.ModuleDict({"a": fitted, "b": CodebookTargets(2)}).state_dict()
    outer.load_state_dict(state, assign=True)
    assert outer["a"].fitted
    assert not outer["b"].fitted
    assert torch.equal(outer["a"].centers, fitted.centers)


def test_state_survives_a_file(tmp_path):
    fitted = CodebookTargets(5).fit([(torch.randn(50, 3), None)])
    torch.save(fitted.state_dict(), tmp_path / "state.pt")
    targets = CodebookTargets(5)
    targets.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(targets.centers, fitted.centers)


def test_unfitted_state_into_fitted_targets_is_an_error():
    with pytest.raises(RuntimeError, match="Missing key"):
        with_centers(torch.randn(3, 2)).load_state_dict(CodebookTargets(3).state_dict())


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"centers": torch.randn(5)}, r"must be a float tensor \[templates, channels\]"),
        ({"centers": torch.ones(5, 3).long()}, "must be a float tensor"),
        ({"counts": torch.ones(4)}, r"counts has shape \[4\], but the other tensors require \[5\]"),
        ({"centers": torch.full((5, 3), math.nan)}, "centers has NaN or infinite values"),
        ({"counts": None}, "is incomplete: it has centers, inertia, but not counts"),
        ({"inertia": "much"}, "inertia is a str, not a tensor"),
    ],
)
def test_damaged_states(change, sentence):
    fitted = CodebookTargets(5).fit([(torch.randn(50, 3), None)])
    state = {k: v for k, v in {**fitted.state_dict(), **change}.items() if v is not None}
    targets = CodebookTargets(7)
    with pytest.raises(CheckpointError, match=sentence):
        targets.load_state_dict(state)
    assert not targets.fitted
    assert targets.num_templates == 7


def test_moves_copies_and_pickles():
    fitted = CodebookTargets(5).fit([(torch.randn(50, 3), None)])
    features = torch.randn(4, 3)
    expected = fitted.soft_assignment(features)
    for other in (copy.deepcopy(fitted), pickle.loads(pickle.dumps(fitted))):
        assert torch.equal(other.soft_assignment(features), expected)
    assert fitted.double().soft_assignment(features).dtype == torch.float64
    assert fitted.counts.dtype == torch.long
    assert fitted.to("meta").centers.is_meta


def test_loading_keeps_the_device_of_the_module():
    fitted = CodebookTargets(5).fit([(torch.randn(50, 3), None)])
    targets = CodebookTargets(5).to("meta")
    with pytest.warns(UserWarning, match="is a no-op"):  # nothing can be copied onto meta
        targets.load_state_dict(fitted.state_dict())
    assert targets.centers.is_meta
