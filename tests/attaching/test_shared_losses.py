"""A loss with parameters belongs to one handle."""

import pytest
import torch

from kdlayers import FeatureLoss, KDLoss, attach_kd
from kdlayers.errors import KDLayersWarning
from tests.nets import Net, batch

MESSAGE = "the losses .*FeatureLoss.last.* were already given to another attach_kd"


def attached(losses):
    return attach_kd(Net(4), Net(6), losses=losses, example=batch(2)[0])


def test_two_students_that_would_train_one_projector_are_noticed():
    losses = [FeatureLoss(at="last"), KDLoss()]
    first = attached(losses)
    with pytest.warns(KDLayersWarning, match=MESSAGE):
        second = attached(losses)
    assert {id(p) for p in first.parameters()} == {id(p) for p in second.parameters()}


@pytest.mark.parametrize("end", ["remove", "detach", "delete"])
def test_a_loss_of_a_handle_that_is_no_longer_used_is_free(end):
    losses = [FeatureLoss(at="last")]
    kd = attached(losses)
    if end == "delete":
        del kd
    else:
        getattr(kd, end)()
    assert torch.is_tensor(next(attached(losses).parameters()))


def test_losses_without_a_state_may_be_shared():
    losses = [KDLoss()]
    assert attached(losses) is not attached(losses)
