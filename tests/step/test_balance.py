"""The warning that one term is far larger than another: when it comes, and what it costs."""

import warnings

import pytest
import torch

from kdlayers import CodebookTargets, DistillLoss, FeatureLoss, KDLoss, KDPoint, attach_kd
from kdlayers._step.balance import STEPS, Balance
from kdlayers.errors import KDLayersWarning
from kdlayers.schedules import LinearWarmup
from tests.nets import Net, batch

IMAGES, LABELS = batch()


class Fixed(DistillLoss):
    """A value that the test chooses for each step."""

    def __init__(self, *values, **options):
        super().__init__(**options)
        self.values = list(values)

    def forward(self, student, teacher, targets=None):
        value = self.values.pop(0) if len(self.values) > 1 else self.values[0]
        return value + 0 * student.sum()


def attached(*losses, at=()):
    torch.manual_seed(0)
    student = Net().train()
    return student, attach_kd(student, Net(6), at, losses=losses, example=IMAGES)


def steps(student, kd, count, loss=None):
    """The sentences of all warnings, by the step in which they came."""
    said = {}
    for step in range(count):
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always", KDLayersWarning)
            student(IMAGES)
            (loss or kd.loss)(LABELS)
        ours = [str(w.message) for w in seen if w.category is KDLayersWarning]
        said |= {step: ours} if ours else {}
    return said


def test_it_comes_once_after_fifty_steps_and_names_both():
    losses = [Fixed(2.0, name="a"), Fixed(0.5, name="b", weight=500.0), Fixed(40.0, name="c")]
    found = steps(*attached(*losses), 2 * STEPS + 5)
    assert list(found) == [STEPS - 1]
    (sentence,) = found[STEPS - 1]
    assert sentence.startswith("b was more than 100 times a in each of the first 50 steps")
    assert "their means are 250 and 2." in sentence
    assert "Give a a larger weight= or b a smaller one; kd.gradient_norms(y)" in sentence


@pytest.mark.parametrize(
    ("large", "small"),
    [
        ([99.0], [1.0]),
        ([101.0] * (STEPS - 1) + [99.0], [1.0]),  # in all steps but one
        ([101.0], [0.0]),
        ([float("nan")], [1.0]),
        ([float("inf")], [1.0]),
    ],
)
def test_it_does_not_come(large, small):
    student, kd = attached(Fixed(*large, name="large"), Fixed(*small, name="small"))
    assert steps(student, kd, STEPS + 1) == {}


def test_a_schedule_and_a_weight_of_zero_are_choices():
    losses = [
        Fixed(1.0, name="a"),
        Fixed(500.0, name="off", weight=0.0),
        Fixed(500.0, name="warm", weight=LinearWarmup(10)),
        Fixed(1e-3, name="late", weight=lambda step: 1.0),
    ]
    assert steps(*attached(*losses), STEPS + 1) == {}


def test_negative_terms_count_by_their_size():
    assert steps(*attached(Fixed(-500.0, name="a"), Fixed(1.0, name="b")), STEPS)


def test_real_losses_and_a_layer():
    losses = [KDLoss(weight=1e-5), FeatureLoss(at="first")]
    student, kd = attached(*losses, at=[KDPoint("last", targets=CodebookTargets(4))])
    kd.fit([(IMAGES, LABELS)], progress=False)
    (sentence,) = steps(student, kd, STEPS)[STEPS - 1]
    assert "times KDLoss in each" in sentence


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor", "ignore::DeprecationWarning")
def test_under_the_compiler():
    student, kd = attached(KDLoss(name="a"), KDLoss(weight=1e-3, name="b"))
    compiled = torch.compile(kd.loss, backend="eager")
    assert list(steps(student, kd, STEPS, compiled)) == [STEPS - 1]


def test_values_of_other_types_are_compared():
    student, kd = attached(Fixed(500.0, name="a"), Fixed(1.0, name="b"))
    watch = Balance(kd._terms)
    values = {"a.weighted": torch.tensor(500.0), "b.weighted": torch.tensor(1.0).double()}
    for _ in range(STEPS - 1):
        watch.look(values)
    with pytest.warns(KDLayersWarning, match="a was more than 100 times b"):
        watch.look(values)


def test_values_are_read_once(monkeypatch):
    """Until the last of the fifty steps nothing asks a device for a number."""
    student, kd = attached(Fixed(500.0, name="a"), Fixed(1.0, name="b"))
    reads = []
    for name in ("item", "tolist", "cpu", "__bool__", "__float__"):
        real = getattr(torch.Tensor, name)

        def spy(self, *args, real=real, name=name):
            reads.append(name)
            return real(self, *args)

        monkeypatch.setattr(torch.Tensor, name, spy)
    watch = Balance(kd._terms)
    values = {"a.weighted": torch.tensor(2.0), "b.weighted": torch.tensor(1.0)}
    for step in range(2 * STEPS):
        watch.look(values) if watch.names else None
        if step < STEPS - 1:
            assert reads == []
    assert reads.count("cpu") == 1
    assert watch.names == []
