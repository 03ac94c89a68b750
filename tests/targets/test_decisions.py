"""Decision targets: every step by plain loops, the shapes of labels, the state, the errors."""

import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis

from kdlayers import DecisionTargets
from kdlayers._targets import decision_fit
from kdlayers._targets.distances import own_subclass
from kdlayers.errors import (
    ArgumentError,
    ArgumentTypeError,
    FitError,
    KDLayersWarning,
    NotFittedError,
    ShapeError,
)


def data(n=600, classes=4, width=6, dtype=torch.float64):
    """Overlapping classes of several lumps each."""
    labels = torch.arange(n) % classes
    lumps = torch.randn(classes, 3, width, dtype=dtype) * 2
    return lumps[labels, torch.randint(3, (n,))] + torch.randn(n, width, dtype=dtype), labels


def batches(features, labels, size):
    return list(zip(features.split(size), labels.split(size), strict=True))


def fitted(**options):
    features, labels = data()
    targets = DecisionTargets(3, components=2, **options).fit([(features, labels)])
    return targets, features, labels


def squared(a, b):
    return sum((x - y) ** 2 for x, y in zip(a, b, strict=True))


def own_by_loop(z, labels, centers, subclasses):
    out = []
    for row, y in zip(z.tolist(), labels.tolist(), strict=True):
        mine = range(subclasses * y, subclasses * (y + 1))
        out.append(min(mine, key=lambda s: squared(row, centers[s].tolist())))
    return out


def table_by_loop(z, labels, targets):
    """Prototypes and count table from the centres, in plain Python."""
    k = len(targets.centers)
    own = own_by_loop(z, labels, targets.centers, targets.subclasses)
    prototypes = []
    for s in range(k):
        mine = [row for row, h in zip(z.tolist(), own, strict=True) if h == s]
        mean = [sum(column) / len(mine) for column in zip(*mine, strict=True)] if mine else None
        prototypes.append(mean or targets.centers[s].tolist())
    table = torch.zeros(k, k, dtype=torch.float64)
    for row, h in zip(z.tolist(), own, strict=True):
        table[h, min(range(k), key=lambda s: squared(row, prototypes[s]))] += 1
    for s in range(k):
        if table[s].sum() == 0:
            table[s, s] = 1
    return torch.tensor(prototypes, dtype=torch.float64), table / table.sum(1, keepdim=True)


@pytest.fixture
def small_sample(monkeypatch):
    """16 rows a sub-class are sampled, so that modest data need all four passes."""
    monkeypatch.setattr(decision_fit, "ROWS_PER_SUBCLASS", 16)
    monkeypatch.setattr(decision_fit, "SMALL_SAMPLE", 0)


# ---------------------------------------------------------------- fit


@pytest.mark.parametrize("n", [600, 601, 83])  # tails, and far fewer rows than 10000
def test_prototypes_and_decisions_agree_with_loops(n):
    features, labels = data(n)
    targets = DecisionTargets(3, components=2).fit(batches(features, labels, 50))
    z = features @ targets.projection.T + targets.shift
    prototypes, decisions = table_by_loop(z, labels, targets)
    torch.testing.assert_close(targets.prototypes, prototypes)
    torch.testing.assert_close(targets.decisions, decisions)
    assert targets.counts.sum() == n
    assert ((decisions > 0) & (decisions < 1)).any()  # classes overlap: the table is not trivial


def test_four_passes_agree_with_loops(small_sample):
    features, labels = data(1200)
    targets = DecisionTargets(3, components=2).fit(batches(features, labels, 77))
    z = features @ targets.projection.T + targets.shift
    prototypes, decisions = table_by_loop(z, labels, targets)
    torch.testing.assert_close(targets.prototypes, prototypes)
    torch.testing.assert_close(targets.decisions, decisions)
    assert targets.counts.sum() == 1200


@pytest.mark.parametrize(("n", "passes"), [(4 * 48, 2), (4 * 48 + 1, 4)])
def test_passes_over_the_data(n, passes, small_sample):
    features, labels = data(n)
    fitter, done, stages = DecisionTargets(3, components=2).fitter(), 0, []
    while True:
        stages.append(fitter.stage)
        fitter.update(features, labels)
        done += 1
        if not fitter.end_pass():
            break
    assert done == passes
    assert len(set(stages)) == passes


def test_projection_is_scikit_learns():
    targets, features, labels = fitted()
    z = (features @ targets.projection.T + targets.shift).numpy()
    x, y = features.numpy(), labels.numpy()
    theirs = LinearDiscriminantAnalysis(solver="svd").fit(x, y).transform(x)[:, :2]
    theirs = theirs * np.sqrt((theirs * theirs).sum(0).mean() ** -1 * (z * z).sum(0).mean())
    np.testing.assert_allclose(z * np.sign((z * theirs).sum(0)), theirs, atol=1e-6)


def test_centres_belong_to_their_class():
    targets, features, labels = fitted()
    z = features @ targets.projection.T + targets.shift
    own = torch.tensor(own_by_loop(z, labels, targets.centers, 3))
    assert torch.equal(own // 3, labels)
    for s in range(12):  # the sample held all rows, so k-means has converged on them
        torch.testing.assert_close(targets.centers[s], z[own == s].mean(0))


def test_empty_subclass_decides_for_itself():
    features, labels = data(300)
    features[labels == 2] = features[2].clone()  # one point, three sub-classes
    targets = DecisionTargets(3, components=2).fit([(features, labels)])
    empty = (targets.counts == 0).flatten().nonzero().flatten()
    assert len(empty) == 2
    for s in empty.tolist():
        assert s // 3 == 2
        assert torch.equal(targets.decisions[s], torch.eye(12, dtype=torch.float64)[s])
        assert torch.equal(targets.prototypes[s], targets.centers[s])
    torch.testing.assert_close(targets.decisions.sum(1), torch.ones(12, dtype=torch.float64))


@pytest.mark.parametrize("sizes", [[1203], [100] * 12 + [3], [1, 1202]])
def test_result_does_not_depend_on_the_batch_size(sizes, small_sample):
    features, labels = data(1203, dtype=torch.float32)
    one = DecisionTargets(3, components=2).fit(batches(features, labels, 64), seed=1)
    two = DecisionTargets(3, components=2).fit(batches(features, labels, sizes), seed=1)
    for name, value in one.state_dict().items():
        assert torch.equal(value, two.state_dict()[name]), name
        assert value.dtype == (torch.long if name == "counts" else torch.float32)


def test_seed_decides_and_global_state_is_left_alone(small_sample):
    features, labels = data(1200)
    before = torch.get_rng_state()
    one, two, other = (
        DecisionTargets(3, components=2).fit([(features, labels)], seed=s) for s in (1, 1, 2)
    )
    assert torch.equal(one.centers, two.centers)
    assert torch.equal(one.projection, other.projection)
    assert not torch.equal(one.centers, other.centers)
    assert torch.equal(before, torch.get_rng_state())


@given(st.lists(st.integers(1, 3), max_size=2), st.booleans())
def test_grids_with_labels_of_images_or_positions(shape, positions):
    features, labels = data(24, classes=2, width=2, dtype=torch.float32)
    # Every image repeats its row at each position, so all label shapes say the same.
    grid = features.reshape(24, *[1] * len(shape), 2).expand(24, *shape, 2)
    spread = labels
    if positions:
        spread = labels.reshape(24, *[1] * len(shape)).expand(24, *shape)
    one = DecisionTargets(2, components=1).fit([(grid, spread)])
    rows = features.repeat_interleave(math.prod(shape), 0)
    two = DecisionTargets(2, components=1).fit([(rows, labels.repeat_interleave(math.prod(shape)))])
    assert torch.equal(one.decisions, two.decisions)
    q = one.soft_assignment(grid, spread)
    assert q.shape == (24, *shape, 4)
    torch.testing.assert_close(
        q.reshape(-1, 4), one.soft_assignment(rows, labels.repeat_interleave(math.prod(shape)))
    )


@pytest.mark.parametrize(("width", "found"), [(6, 3), (2, 2)], ids=["by classes", "by channels"])
def test_the_default_uses_all_components_if_there_are_few(width, found):
    features, labels = data(width=width)
    assert DecisionTargets(2).fit([(features, labels)]).projection.shape == (found, width)


def test_too_many_components_are_reduced_with_a_warning():
    features, labels = data()
    with pytest.warns(KDLayersWarning, match=r"components=9\) is reduced to 3: 4 .* 6 have"):
        targets = DecisionTargets(2, components=9).fit([(features, labels)])
    assert targets.projection.shape == (3, 6)


def test_number_of_classes_is_inferred_or_given():
    features, labels = data()
    inferred = DecisionTargets(3, components=2)
    assert inferred.num_templates is None
    inferred.fit([(features, labels)])
    assert (inferred.num_classes, inferred.num_templates) == (4, 12)
    given_later = DecisionTargets(3, components=2)
    given_later.num_classes = 4
    assert given_later.num_templates == 12
    assert torch.equal(given_later.fit([(features, labels)]).decisions, inferred.decisions)
    with pytest.raises(ArgumentError, match="are fitted to 4 classes; create new"):
        given_later.num_classes = 5


# ---------------------------------------------------------------- soft assignment


def test_soft_assignment_agrees_with_loops():
    targets, _, _ = fitted()
    features, labels = data(100)
    z = features @ targets.projection.T + targets.shift
    own = own_by_loop(z, labels, targets.centers, 3)
    q = targets.soft_assignment(features, labels)
    assert torch.equal(q, targets.decisions[own])
    torch.testing.assert_close(q.sum(1), torch.ones(100, dtype=torch.float64))


def test_only_centres_of_the_own_class_are_compared():
    """Also with one sub-class a class, and a row farther from its own centre than any other."""
    z, labels = torch.tensor([[100.0], [100.0], [0.0]]), torch.tensor([1, 0, 2])
    centers = torch.tensor([[0.0], [-500.0], [100.0]])
    assert own_subclass(z, labels, centers, 1).tolist() == [1, 0, 2]


def test_a_negative_label_that_was_not_checked_is_not_the_last_class():
    z, centers = torch.randn(3, 2), torch.randn(4, 2)
    assert own_subclass(z, torch.tensor([-1, 1, -2]), centers, 1).tolist() == [-1, 1, -1]


def test_one_subclass_for_each_class():
    features, labels = data()
    targets = DecisionTargets(1, components=2).fit([(features, labels)])
    z = features @ targets.projection.T + targets.shift
    means = torch.stack([z[labels == c].mean(0) for c in range(4)])
    torch.testing.assert_close(targets.centers, means)
    nearest = ((z[:, None] - means[None]) ** 2).sum(-1).argmin(1)
    for c in range(4):
        share = torch.bincount(nearest[labels == c], minlength=4) / (labels == c).sum()
        torch.testing.assert_close(targets.decisions[c].float(), share)
    assert torch.equal(targets.soft_assignment(features, labels), targets.decisions[labels])


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.int64])
def test_integer_labels_of_any_width(dtype):
    targets, features, labels = fitted()
    expected = targets.soft_assignment(features, labels)
    assert torch.equal(targets.soft_assignment(features, labels.to(dtype)), expected)


def test_no_graph_and_full_precision_inside_autocast():
    targets, features, labels = fitted()
    features = features.float().requires_grad_()
    targets.float()
    plain = targets.soft_assignment(features, labels)
    with torch.autocast("cpu", torch.bfloat16):
        inside = targets.soft_assignment(features, labels)
    assert torch.equal(plain, inside)
    assert not plain.requires_grad
    assert targets.soft_assignment(features.bfloat16(), labels).dtype == torch.float32


def test_compiles_without_graph_break():
    targets, features, labels = fitted()
    compiled = torch.compile(targets.soft_assignment, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(features, labels), targets.soft_assignment(features, labels))


@pytest.mark.parametrize(
    ("labels", "error", "sentence"),
    [
        (None, ArgumentError, "needs the class labels"),
        (
            torch.rand(2),
            ShapeError,
            r"labels of dtype float32 .* shape is \[2\]; for class",
        ),
        (torch.ones(2, 4).bool(), ArgumentTypeError, r"pass one-hot rows as labels.float\(\)"),
        (torch.ones(2, 4).long(), ShapeError, r"pass one-hot rows as labels.float\(\)"),
        (torch.ones(3).long(), ShapeError, r"must be \[2\] or \[2, 3\], got"),
        (torch.tensor([0, 4]), ArgumentError, r"must lie in 0\.\.3 .* got labels from 0 to 4"),
        (torch.tensor([0, -1]), ArgumentError, "got labels from -1 to 0"),
        ([0, 1], ArgumentTypeError, "must be a tensor, got list"),
    ],
)
def test_bad_labels_at_assignment(labels, error, sentence):
    targets, _, _ = fitted()
    with pytest.raises(error, match=sentence):
        targets.soft_assignment(torch.randn(2, 3, 6), labels)


def test_integer_one_hot_rows_are_not_labels_of_the_rows_of_a_map():
    """They have its shape ``[B, H]`` if the map has as many rows as there are classes."""
    targets, features, labels = fitted()
    maps, labels = features[:20].reshape(5, 4, 1, -1).expand(5, 4, 3, -1), labels[:5]
    hot = F.one_hot(labels, 4)
    expected = targets.soft_assignment(maps, labels)
    assert torch.equal(targets.soft_assignment(maps, hot.double()), expected)
    every = labels[:, None, None].expand(5, 4, 3)
    assert torch.equal(targets.soft_assignment(maps, every), expected)
    for wrong in (hot, hot[:, None].expand(5, 4, 4).double()):
        with pytest.raises(ShapeError, match=r"image or position, .* must be \[5(, 4\]|\] or)"):
            targets.soft_assignment(maps, wrong)
    with pytest.raises(ShapeError, match=r"must be \[5\] or \[5, 4, 3\], got int64"):
        DecisionTargets(3, components=2).fit([(maps, hot)])


# ---------------------------------------------------------------- errors of fit


def tiny(labels):
    return [(torch.randn(len(labels), 3), torch.tensor(labels))]


@pytest.mark.parametrize(
    ("given", "error", "sentence"),
    [
        (tiny([0, 0, 2, 2, 5, 5]), FitError, "no sample of classes 1, 3, 4 of the 6 classes 0..5"),
        (tiny([0, 0, 1, 2, 2]), FitError, r"positions of class 1 for 2 .* classes: 1\)"),
        (tiny([0, 0, 0]), FitError, "every label is 0, but decisions need two classes"),
        (tiny([0, 0, -1]), FitError, "labels must be 0 or more, got labels from -1 to 0"),
        ([(torch.randn(4, 3), None)], FitError, "fit.. got batches without them"),
        ([(torch.randn(4, 3), torch.zeros(3).long())], ShapeError, r"must be \[4\], got"),
        ([(torch.randn(4, 3), torch.rand(4, 2))], ArgumentTypeError, "a loader without mixup"),
        ([(torch.full((1, 3), math.inf), torch.tensor([0]))], FitError, "batch 0 .* infinite"),
        ([(torch.randn(0, 3), torch.zeros(0).long())], FitError, "without a single row"),
        ([], FitError, "empty loader"),
    ],
)
def test_bad_data_are_errors_and_leave_the_targets_unchanged(given, error, sentence):
    targets = DecisionTargets(2, components=1)
    with pytest.raises(error, match=sentence):
        targets.fit(given)
    assert not targets.fitted
    assert targets.num_classes is None


def test_labels_beyond_the_given_number_of_classes():
    with pytest.raises(FitError, match=re.escape("must be 0..2 (num_classes=3), got labels from")):
        DecisionTargets(1, num_classes=3).fit(tiny([0, 0, 1, 3]))


def test_many_missing_classes_are_not_all_listed():
    with pytest.raises(FitError, match=r"classes 1, 2, .*, 10 and 9 more of the 20 classes"):
        DecisionTargets(1, components=1, num_classes=20).fit(tiny([0, 0]))


def test_as_many_classes_as_rows():
    with pytest.raises(FitError, match="do not vary within classes"):
        DecisionTargets(1, components=1).fit(tiny([0, 1, 2]))


# ---------------------------------------------------------------- construction, state


@pytest.mark.parametrize(
    ("arguments", "error", "sentence"),
    [
        ({"subclasses": 0}, ArgumentError, "subclasses must be 1 or more, got 0"),
        ({"components": 0}, ArgumentError, "components must be 1 or more, got 0"),
        ({"num_classes": 1}, ArgumentError, "num_classes must be 2 or more, got 1"),
        ({"subclasses": "8"}, ArgumentTypeError, "subclasses must be an integer, got str"),
    ],
)
def test_bad_arguments(arguments, error, sentence):
    with pytest.raises(error, match=re.escape(sentence)):
        DecisionTargets(**arguments)


def test_before_fit():
    targets = DecisionTargets()
    assert (targets.subclasses, targets.components, targets.num_classes) == (8, 60, None)
    assert not targets.fitted
    assert targets.state_dict() == {}
    assert "8, components=60, num_classes=None, fitted=False" in repr(targets)
    with pytest.raises(NotFittedError, match="DecisionTargets is not fitted"):
        targets.soft_assignment(torch.randn(2, 3), torch.tensor([0, 1]))
