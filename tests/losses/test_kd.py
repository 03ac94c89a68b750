import pytest

from kdlayers import losses
from kdlayers.errors import ArgumentError, ArgumentTypeError
from kdlayers.losses import KDLoss

from . import naive
from .loss_tester import LossTester


class TestKD(LossTester):
    make = KDLoss
    reference = staticmethod(lambda loss, *tensors: naive.kd(*tensors))


class TestKDAtTemperatureOne(LossTester):
    make = staticmethod(lambda: KDLoss(temperature=1.0))
    reference = staticmethod(lambda loss, *tensors: naive.kd(*tensors, temperature=1.0))


@pytest.mark.parametrize("temperature", [0, -1.0, float("inf"), float("nan")])
def test_temperature_must_be_above_zero(temperature):
    with pytest.raises(ArgumentError, match="temperature must be above 0 and finite, got"):
        KDLoss(temperature=temperature)


def test_weights_are_numbers_or_functions_of_the_step():
    assert KDLoss(weight=0.5).weight_at(7) == 0.5
    assert KDLoss(weight=lambda step: 2 * step).weight_at(7) == 14.0
    with pytest.raises(ArgumentError, match="weight must be 0 or more and finite, got -1"):
        KDLoss(weight=-1)
    with pytest.raises(ArgumentTypeError, match="weight must be a number or a function"):
        KDLoss(weight="big")
    with pytest.raises(ArgumentError, match=r"at must be None .*, a module name or a .* pair"):
        KDLoss(at=["a", "b"])
    for teacher in (-1, "first"):
        with pytest.raises(ArgumentError, match="teacher_index counts the teachers from 0, got"):
            KDLoss(teacher_index=teacher)


def test_the_printed_loss_shows_its_numbers():
    assert (
        repr(KDLoss(temperature=2.0, weight=0.9)) == "KDLoss(temperature=2.0, weight=0.9, at=None)"
    )


@pytest.mark.parametrize(
    ("make", "value"),
    [
        (KDLoss, 4.0),
        (losses.DKDLoss, 1.0),
        (losses.MutualLoss, 1.0),
        (losses.BinaryKDLoss, 1.0),
        (losses.AEKTLoss, "chi2"),
        (losses.StudentFriendlyKDLoss, None),
        (losses.InheritExploreLoss, 64),
        (losses.TemplateLoss, None),
        (losses.FitNetLoss, 1.0),
        (losses.AttentionTransferLoss, 1.0),
    ],
)
def test_losses_take_keywords_only(make, value):
    with pytest.raises(TypeError, match="positional argument"):
        make(value)
    assert make(weight=0.5, at="layer4", name="term").name == "term"
