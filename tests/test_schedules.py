import pickle
from math import cos, pi

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kdlayers.errors import ArgumentError, ArgumentTypeError
from kdlayers.losses import KDLoss
from kdlayers.schedules import Constant, Cosine, LinearWarmup, MultiStep, Product, Step

EVERY = [
    Constant(0.3),
    LinearWarmup(5),
    LinearWarmup(5, then=Cosine(20), start=0.01, steps_per_epoch=3),
    Cosine(7, value=2.0, end=0.5),
    Step(3, gamma=0.5, steps_per_epoch=2),
    MultiStep((2, 4)),
    LinearWarmup(4) * Step(10) * 0.9,
]


@given(step=st.integers(0, 500), length=st.integers(1, 60), per_epoch=st.integers(1, 20))
def test_values_follow_the_published_rules_epoch_by_epoch(step, length, per_epoch):
    epoch = step // per_epoch
    unit = {"steps_per_epoch": per_epoch}
    assert Step(length, value=3.0, gamma=0.5, **unit)(step) == 3.0 * 0.5 ** (epoch // length)
    swing = 3.0 * (1 + cos(pi * min(epoch, length) / length)) / 2
    assert Cosine(length, value=3.0, **unit)(step) == pytest.approx(swing)
    reached = [m for m in (length, 2 * length) if m <= epoch]
    multi = MultiStep((length, 2 * length), value=3.0, gamma=0.5, **unit)
    assert multi(step) == 3.0 * 0.5 ** len(reached)


@given(step=st.integers(0, 300), ramp=st.integers(0, 20), per_epoch=st.integers(1, 10))
def test_warmup_meets_the_schedule_that_follows(step, ramp, per_epoch):
    then = Cosine(30, value=2.0, steps_per_epoch=per_epoch)
    warm = LinearWarmup(ramp, then=then, start=0.01, steps_per_epoch=per_epoch)
    epoch = step // per_epoch
    goal = 2.0 * (1 + cos(pi * min(ramp, 30) / 30)) / 2
    expected = 0.01 + epoch * (goal - 0.01) / ramp if epoch < ramp else then(step)
    assert warm(step) == pytest.approx(expected)


@pytest.mark.parametrize("length", [1, 2, 20])
def test_the_documented_recipe_is_the_ramp_of_decoupled_distillation(length):
    ramp = LinearWarmup(length - 1, start=1 / length, steps_per_epoch=10)
    for epoch in range(30):
        assert ramp(10 * epoch + 9) == pytest.approx(min((epoch + 1) / length, 1.0))


@pytest.mark.parametrize("schedule", EVERY, ids=repr)
def test_schedules_pickle_compare_and_drive_a_loss(schedule):
    copy = pickle.loads(pickle.dumps(schedule))
    assert copy == schedule
    assert hash(copy) == hash(schedule)
    loss = KDLoss(weight=schedule)
    assert [loss.weight_at(step) for step in range(40)] == [copy(step) for step in range(40)]
    assert all(isinstance(schedule(step), float) for step in range(40))


def test_products_multiply_value_by_value():
    first, second = LinearWarmup(4), Step(10)
    for step in range(30):
        assert (first * second * 0.5)(step) == pytest.approx(first(step) * second(step) * 0.5)
        assert (0.5 * first)(step) == Product(first, 0.5)(step)


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: Constant(-1.0), "value must be 0 or more and finite, got -1.0"),
        (lambda: Cosine(0), "length must be above 0 and finite, got 0"),
        (lambda: Step(float("nan")), "every must be above 0 and finite"),
        (lambda: MultiStep((3, 2)), r"milestones must be strictly increasing, got \(3, 2\)"),
        (lambda: LinearWarmup(3, start=-0.1), "start must be 0 or more"),
        (lambda: LinearWarmup(3, steps_per_epoch=0), "steps_per_epoch must be 1 or more"),
        (lambda: Constant(1.0) * -2.0, "a factor must be 0 or more"),
        (lambda: LinearWarmup(3, then=-1.0), "then must be 0 or more"),
    ],
)
def test_unusable_numbers_are_named(make, sentence):
    with pytest.raises(ArgumentError, match=sentence):
        make()


def test_a_wrong_type_is_named():
    with pytest.raises(ArgumentTypeError, match="length must be a number, got str"):
        Cosine("ten")
    with pytest.raises(ArgumentTypeError, match="steps_per_epoch must be an integer, got float"):
        Cosine(10, steps_per_epoch=2.5)


def test_milestones_must_be_a_sequence():
    with pytest.raises(ArgumentTypeError, match=r"for one milestone write MultiStep\(\(5,\)\)"):
        MultiStep(5)
    assert MultiStep([5]) == MultiStep((5,))
