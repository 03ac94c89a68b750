"""Labels of mixup, CutMix and smoothing: every loss that needs a class, against loops."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from kdlayers import AEKTLoss, DecisionTargets, DKDLoss, KDPoint, attach_kd
from kdlayers._targets.divergence import decision_divergence
from kdlayers._utils import chunks
from kdlayers.errors import ArgumentError, ArgumentTypeError, ShapeError
from kdlayers.functional import aekt, dkd, nckd, tckd
from kdlayers.functional._mixed import classes_of
from tests import reference
from tests.nets import Net, batch

CLASSES = 6


def draw(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def targets_and_labels(n=300):
    labels = torch.arange(n) % CLASSES
    features = draw(CLASSES, 5)[labels] * 2 + draw(n, 5, seed=1)
    return DecisionTargets(3, components=3).fit([(features, labels)]), features, labels


def one_hot(labels, dtype=torch.float64):
    return F.one_hot(labels, CLASSES).to(dtype)


def mixup(labels, lam=0.7, smoothing=0.0):
    """As timm makes them: both labels smoothed, then mixed with those of the flipped batch."""
    off = smoothing / CLASSES
    rows = one_hot(labels) * (1 - smoothing) + off
    return lam * rows + (1 - lam) * rows.flip(0)


def mean_of_rows(assign, rows):
    """The label-weighted mean over all classes, by a loop; ``assign(i, c)`` is one row."""
    return torch.stack(
        [
            sum(w * assign(i, c) for c, w in enumerate(row) if w > 0) / sum(row)
            for i, row in enumerate(rows.tolist())
        ]
    )


# ---------------------------------------------------------------- decisions


@pytest.mark.parametrize("lam", [0.7, 0.5, 1.0])
def test_mixed_labels_give_the_mean_of_the_classes_rows(lam):
    targets, features, labels = targets_and_labels()
    features, rows = features[:20], mixup(labels[:20], lam)
    mine = targets.soft_assignment(features, rows)
    wanted = mean_of_rows(
        lambda i, c: targets.soft_assignment(features[i : i + 1], torch.tensor([c]))[0], rows
    )
    torch.testing.assert_close(mine, wanted, rtol=1e-12, atol=1e-15)
    torch.testing.assert_close(mine.sum(1), torch.ones(20, dtype=torch.float64))


def test_labels_of_many_classes_are_not_cut():
    targets, features, _ = targets_and_labels()
    rows = draw(20, CLASSES, seed=3).softmax(1)
    wanted = mean_of_rows(
        lambda i, c: targets.soft_assignment(features[i : i + 1], torch.tensor([c]))[0], rows
    )
    torch.testing.assert_close(targets.soft_assignment(features[:20], rows), wanted)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_labels_of_one_class_equal_integer_labels(dtype, smoothing):
    targets, features, labels = targets_and_labels()
    rows = (one_hot(labels) * (1 - smoothing) + smoothing / CLASSES).to(dtype)
    expected = targets.soft_assignment(features, labels)
    assert torch.equal(targets.soft_assignment(features, rows), expected)
    scores = draw(300, 18, seed=5).requires_grad_()
    assert torch.equal(
        targets.divergence(scores, features, rows), targets.divergence(scores, features, labels)
    )


def test_smoothing_does_not_change_the_mixture():
    targets, features, labels = targets_and_labels()
    plain = targets.soft_assignment(features, mixup(labels, 0.75))
    smoothed = targets.soft_assignment(features, mixup(labels, 0.75, smoothing=0.06))
    # The off-value 0.01 is in the two weights too: 0.715 and 0.245 in the place of 3 to 1.
    assert (plain - smoothed).abs().max() < 0.01
    found, shares = classes_of(mixup(labels, 0.75, smoothing=0.06), CLASSES)
    assert shares.shape == (300, 2)
    torch.testing.assert_close(shares[1], torch.tensor([0.715, 0.245], dtype=torch.float64) / 0.96)
    assert set(found[1].tolist()) == {int(labels[1]), int(labels[-2])}


def test_positions_of_a_map_have_their_images_labels():
    targets, features, labels = targets_and_labels()
    grid, rows = features.reshape(25, 4, 3, 5), mixup(labels[:25])
    mine = targets.soft_assignment(grid, rows)
    spread = rows[:, None, None].expand(25, 4, 3, CLASSES)
    assert torch.equal(mine, targets.soft_assignment(grid, spread))
    flat = targets.soft_assignment(features, rows.repeat_interleave(12, 0))
    assert torch.equal(mine.reshape(300, -1), flat)


@pytest.mark.parametrize("given_scores", [True, False])
def test_the_fused_divergence_equals_the_unfused_loss(given_scores, monkeypatch):
    monkeypatch.setitem(chunks._ENTRIES, "cpu", 30)
    monkeypatch.setattr(chunks, "LEAST_SCORES", 1)
    targets, features, labels = targets_and_labels()
    rows = mixup(labels)
    units, templates = draw(300, 4, seed=6).requires_grad_(), draw(18, 4, seed=7).requires_grad_()
    reference.check_divergence(targets, features, rows, units, templates, scores=given_scores)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor")
def test_the_fused_operator_with_shares_passes_opcheck():
    student = torch.randn(6, 4, requires_grad=True)
    own, shares = torch.randint(4, (6, 2)), torch.rand(6, 2)
    table = torch.rand(4, 4).softmax(1)
    torch.library.opcheck(decision_divergence, (student, None, own, table, shares, True))


def test_the_number_of_classes_taken_is_that_with_weight(monkeypatch):
    """Cost: one look-up of centres for each class with weight, for any C."""
    from kdlayers._targets import decisions

    calls = []
    plain = decisions.own_subclass
    monkeypatch.setattr(decisions, "own_subclass", lambda *a: calls.append(1) or plain(*a))
    targets, features, labels = targets_and_labels()
    for rows, wanted in [
        (one_hot(labels), 1),
        (mixup(labels), 2),
        (mixup(labels, smoothing=0.1), 2),
        (0.5 * mixup(labels) + 0.5 * mixup(labels.roll(1)), 4),
    ]:
        calls.clear()
        targets.soft_assignment(features, rows)
        assert len(calls) == wanted


# ---------------------------------------------------------------- logits

TERMS = {
    "tckd": tckd,
    "nckd": nckd,
    "dkd": dkd,
    "aekt chi2": aekt,
    "aekt is": lambda *a, **k: aekt(*a, form="is", **k),
}


@pytest.mark.parametrize("name", TERMS)
@given(seed=st.integers(0, 999), lam=st.sampled_from([0.5, 0.9]))
@settings(deadline=None, max_examples=10)
def test_losses_on_logits_are_means_over_the_classes(name, seed, lam):
    term = TERMS[name]
    student, teacher = draw(4, CLASSES, seed=seed), 3 * draw(4, CLASSES, seed=seed + 1)
    rows = mixup(torch.randint(CLASSES, (4,), generator=torch.Generator().manual_seed(seed)), lam)
    wanted = mean_of_rows(
        lambda i, c: term(student[i : i + 1], teacher[i : i + 1], torch.tensor([c])), rows
    )
    torch.testing.assert_close(term(student, teacher, rows, reduction="none"), wanted)
    torch.testing.assert_close(term(student, teacher, rows), wanted.mean())
    torch.testing.assert_close(term(student, teacher, rows, reduction="sum"), wanted.sum())


@pytest.mark.parametrize("loss", [DKDLoss(), AEKTLoss(), AEKTLoss(form="ratio", gamma=0.1)])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_one_hot_rows_give_the_same_losses_as_integers(loss, smoothing):
    student, teacher = draw(4, CLASSES).requires_grad_(), 3 * draw(4, CLASSES, seed=1)
    labels = torch.tensor([0, 5, 2, 2])
    rows = one_hot(labels) * (1 - smoothing) + smoothing / CLASSES
    hard, soft = loss(student, teacher, labels), loss(student, teacher, rows)
    assert torch.equal(hard, soft)
    (one,), (two,) = (torch.autograd.grad(value, student) for value in (hard, soft))
    assert torch.equal(one, two)


def test_aekt_and_its_metrics_are_means_over_the_classes():
    student, teacher = draw(4, CLASSES), 3 * draw(4, CLASSES, seed=1)
    rows, loss = mixup(torch.tensor([0, 5, 2, 2])), AEKTLoss(alpha=0.5, beta=2.0)
    value = loss(student, teacher, rows)
    parts = {key: float(metric) for key, metric in loss.metrics().items()}
    wanted = 0.5 * tckd(student, teacher, rows) + 2 * nckd(student, teacher, rows)
    torch.testing.assert_close(value, wanted + aekt(student, teacher, rows))
    assert parts["target"] == pytest.approx(float(tckd(student, teacher, rows)))
    assert parts["others"] == pytest.approx(float(nckd(student, teacher, rows)))
    assert parts["adaptive"] == pytest.approx(float(aekt(student, teacher, rows)))


# ---------------------------------------------------------------- errors, and a whole step


@pytest.mark.parametrize(
    ("rows", "error", "sentence"),
    [
        (torch.rand(4), ShapeError, r"\[batch, 6\], one for each class, .* \[4\]; for class indic"),
        (torch.rand(4, 5), ShapeError, r"\[batch, 6\], one for each class, but .* \[4, 5\]"),
        (torch.zeros(4, 6), ArgumentError, "with a class above 0 in every row"),
        (-torch.ones(4, 6), ArgumentError, "must be finite and 0 or more"),
        (torch.full((4, 6), torch.nan), ArgumentError, "must be finite and 0 or more"),
        (torch.ones(4, 6).bool(), ArgumentTypeError, r"one-hot rows (pass|as) \w+\.float"),
        (torch.ones(4, 6).long(), ShapeError, r"one-hot rows (pass|as) \w+\.float"),
    ],
)
def test_bad_rows_are_refused_by_all(rows, error, sentence):
    targets, features, _ = targets_and_labels()
    student, teacher = draw(4, CLASSES), draw(4, CLASSES, seed=1)
    with pytest.raises(error, match=sentence):
        targets.soft_assignment(features[:4], rows)
    for loss in (DKDLoss(), AEKTLoss()):
        with pytest.raises(error, match=sentence):
            loss(student, teacher, rows)


def test_a_batch_of_another_length_is_refused():
    targets, features, _ = targets_and_labels()
    with pytest.raises(ShapeError, match=r"must be \[4, 6\], got"):
        targets.soft_assignment(features[:4], mixup(torch.arange(3)))
    for loss in (DKDLoss(), AEKTLoss()):
        with pytest.raises(ShapeError, match="one per sample"):
            loss(draw(4, CLASSES), draw(4, CLASSES), mixup(torch.arange(3)))


def test_two_classes_mixed_in_halves_are_both_taken():
    found, shares = classes_of(torch.tensor([[0.5, 0.5], [1.0, 0.0]]), 2)
    assert found.shape == (2, 2)
    assert shares.tolist() == [[0.5, 0.5], [1.0, 0.0]]


def test_a_step_with_mixed_labels_through_every_loss():
    images, labels = batch(12)
    student, teacher = Net(), Net(6)
    kd = attach_kd(
        student,
        teacher,
        [KDPoint("first", targets=DecisionTargets(2)), KDPoint("last", targets=DecisionTargets(2))],
        losses=[DKDLoss(), AEKTLoss()],
        example=images,
    )
    kd.fit([(images, labels)], progress=False)

    def step(given):
        torch.manual_seed(0)
        student(images)
        return kd.loss(given)

    hard, rows = step(labels), F.one_hot(labels, 3).float()
    assert torch.equal(step(rows), hard)
    mixed = step(0.6 * rows + 0.4 * rows.roll(1, 0))
    assert not torch.equal(mixed, hard)
    mixed.backward()
    assert all(torch.isfinite(p.grad).all() for p in student.parameters() if p.grad is not None)
