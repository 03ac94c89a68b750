import pytest
import torch

from kdlayers.errors import ArgumentError
from kdlayers.losses import DKDLoss

from . import naive
from .loss_tester import LossTester


def reference(loss, *tensors):
    target, others = naive.tckd(*tensors), naive.nckd(*tensors)
    return loss.alpha * target + loss.beta * others


class TestDKD(LossTester):
    make = DKDLoss
    reference = staticmethod(reference)
    needs_labels = True
    warns_on_two_classes = True


class TestDKDWithOtherWeights(TestDKD):
    make = staticmethod(lambda: DKDLoss(alpha=0.5, beta=2.0, temperature=4.0))


def test_two_classes_without_the_other_term_give_no_warning():
    loss = DKDLoss(beta=0.0)
    logits = torch.tensor([[1.0, 2.0]])
    assert loss(logits, logits, torch.tensor([0])) == 0


@pytest.mark.parametrize("wrong", [{"alpha": -1.0}, {"beta": -1.0}, {"temperature": 0.0}])
def test_numbers_out_of_range_are_named(wrong):
    with pytest.raises(ArgumentError, match=f"{next(iter(wrong))} must be"):
        DKDLoss(**wrong)
