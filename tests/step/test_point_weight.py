"""The weight of a KD point: a factor of its template loss, and of nothing else."""

import copy

import pytest
import torch
from torch.nn import functional as F

from kdlayers import CodebookTargets, DecisionTargets, KDLoss, KDPoint, attach_kd
from kdlayers.errors import ArgumentError, ArgumentTypeError
from kdlayers.schedules import Cosine, LinearWarmup
from tests.nets import Net, batch

IMAGES, LABELS = batch()


def attached(first=1.0, last=1.0, losses=()):
    """The same student, teacher and fit every time; only the weights differ."""
    torch.manual_seed(0)
    student, teacher = Net(4).double(), Net(6).double()
    at = [
        KDPoint("first", targets=DecisionTargets(2, components=2), weight=first),
        KDPoint("last", targets=CodebookTargets(5), weight=last),
    ]
    kd = attach_kd(student, teacher, at, losses=losses, example=IMAGES)
    kd.fit([(IMAGES.double(), LABELS)], progress=False)
    return student, kd


def gradients(student, loss):
    loss.backward()
    return {name: p.grad for name, p in student.named_parameters()}


def test_equals_multiplying_by_hand():
    student, kd = attached(first=0.3, last=2.5)
    student(IMAGES.double())
    total = kd.loss(LABELS)
    ours = gradients(student, total)

    plain, plain_kd = attached()
    plain(IMAGES.double())
    _, pairs, labels, _ = plain_kd._read(LABELS, None, None, compiling=False)
    values = [
        term.value(pair.student, pair.teacher, labels, pair.templates)
        for term, pair in zip(plain_kd._terms, pairs, strict=True)
    ]
    by_hand = 0.3 * values[0] + 2.5 * values[1]
    theirs = gradients(plain, by_hand)

    assert torch.equal(total, by_hand)
    assert ours.keys() == theirs.keys()
    reached = [name for name, grad in ours.items() if grad is not None]
    assert any("kd.head" in name for name in reached)
    assert all((ours[name] is None) == (theirs[name] is None) for name in ours)
    for name in reached:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-13, atol=1e-15)


def test_terms_show_the_value_and_the_weighted_value():
    weights = {"first": Cosine(6) * 0.9, "last": lambda step: 0.1 * step}
    student, kd = attached(**weights, losses=[KDLoss(weight=0.5)])
    for step in range(4):
        student(IMAGES.double())
        kd.loss(LABELS).backward()
        for point, weight in weights.items():
            value = kd.terms[f"TemplateLoss.{point}"]
            assert kd.terms[f"TemplateLoss.{point}.weighted"] == weight(step) * value
        assert kd.terms["KDLoss.weighted"] == 0.5 * kd.terms["KDLoss"]
        parts = sum(value for key, value in kd.terms.items() if key.endswith(".weighted"))
        torch.testing.assert_close(kd.terms["total"], parts, rtol=1e-14, atol=0)


def test_a_weight_of_zero_trains_with_labels_only():
    student, kd = attached(first=0.0, last=0)
    optimiser = torch.optim.SGD(student.parameters(), lr=0.1)
    plain, plain_kd = copy.deepcopy(student), attached(first=0.0, last=0)[1]
    plain_kd.clear()
    steps = torch.optim.SGD(plain.parameters(), lr=0.1)
    for _ in range(3):  # and nobody says that the optimiser misses parameters
        for model, optim in ((student, optimiser), (plain, steps)):
            optim.zero_grad()
            loss = F.cross_entropy(model(IMAGES.double()), LABELS)
            (loss + kd.loss(LABELS) if model is student else loss).backward()
            optim.step()
    for ours, theirs in zip(student.parameters(), plain.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def test_weights_are_not_part_of_the_state():
    _, plain = attached()
    student, kd = attached(first=LinearWarmup(10), last=0.3)
    for _ in range(3):
        student(IMAGES.double())
        kd.loss(LABELS).backward()
    state = kd.state_dict()
    assert state["losses"].keys() == plain.state_dict()["losses"].keys()
    for name, losses in plain.state_dict()["losses"].items():
        assert losses.keys() == state["losses"][name].keys()

    again, resumed = attached(first=LinearWarmup(10), last=0.3)
    again.load_state_dict(student.state_dict())
    resumed.load_state_dict(state)
    for model, handle in ((student, kd), (again, resumed)):
        model(IMAGES.double())
        handle.loss(LABELS).backward()
    assert resumed.terms == kd.terms
    first = "TemplateLoss.first"
    assert kd.terms[f"{first}.weighted"] == LinearWarmup(10)(3) * kd.terms[first]


def test_every_point_of_a_glob_has_the_weight_and_the_summary_shows_it():
    kd = attach_kd(Net(4), Net(6), [KDPoint("*st", weight=0.25)], example=IMAGES)
    assert [(term.point, term.loss.weight) for term in kd._terms] == [
        ("first", 0.25),
        ("last", 0.25),
    ]
    assert kd.summary().count("0.25") == 2
    scheduled = attached(last=Cosine(5))[1].summary()
    assert scheduled.count("scheduled") == 1


@pytest.mark.parametrize(
    ("weight", "error", "sentence"),
    [
        (-0.1, ArgumentError, "weight must be 0 or more and finite, got -0.1"),
        (float("nan"), ArgumentError, "weight must be 0 or more and finite, got nan"),
        (float("inf"), ArgumentError, "weight must be 0 or more and finite, got inf"),
        ("1", ArgumentTypeError, "weight must be a number or a function of the step, got str"),
        (True, ArgumentTypeError, "weight must be a number or a function of the step, got bool"),
        (None, ArgumentTypeError, "a number or a function of the step, got NoneType"),
    ],
)
def test_invalid_weights_are_errors(weight, error, sentence):
    with pytest.raises(error, match=sentence):
        KDPoint("last", weight=weight)
