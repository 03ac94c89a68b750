"""Images with several labels, for which a softmax over the classes is the wrong comparison."""

import warnings

import pytest
import torch

from kdlayers import BinaryKDLoss, DISTLoss, DKDLoss, FeatureLoss, KDLoss, attach_kd
from kdlayers.errors import ArgumentError, KDLayersWarning
from tests.nets import Net, batch

IMAGES, LABELS = batch(6)
SEVERAL = torch.tensor([[1.0, 1, 0], [0, 0, 1], [1, 1, 1], [0, 1, 0], [1, 0, 0], [0, 1, 1]])


def attached(*losses):
    torch.manual_seed(0)
    student = Net(4)
    return student, attach_kd(student, Net(6), losses=losses, example=IMAGES)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool, torch.int64])
def test_a_softmax_over_several_labels_warns_once(dtype):
    student, kd = attached(KDLoss(), DISTLoss())
    student(IMAGES)
    with pytest.warns(KDLayersWarning, match=r"in KDLoss, DISTLoss, .* sum to 3: it has several"):
        kd.loss(SEVERAL.to(dtype)).backward()
    student(IMAGES)
    kd.loss(SEVERAL.to(dtype)).backward()  # warnings are errors


@pytest.mark.parametrize(
    ("losses", "labels"),
    [
        ([KDLoss()], LABELS),
        ([KDLoss()], torch.stack([LABELS, LABELS + 1], dim=1)),  # of two tasks
        ([KDLoss()], None),
        ([KDLoss(), DKDLoss()], torch.full((6, 3), 1 / 3).half()),
        ([KDLoss()], torch.tensor([[0.7, 0.3, 0.0]]).expand(6, 3).bfloat16()),
        ([BinaryKDLoss(), FeatureLoss(at="last")], SEVERAL),
    ],
)
def test_other_labels_and_losses_do_not_warn(losses, labels):
    student, kd = attached(*losses)
    student(IMAGES)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        kd.loss(labels).backward()


def test_losses_that_need_one_label_name_the_loss_for_several():
    student, kd = attached(DKDLoss())
    student(IMAGES)
    none = SEVERAL * torch.tensor([[1.0]] * 5 + [[0.0]])  # no label in the last image
    with pytest.warns(KDLayersWarning), pytest.raises(ArgumentError, match="BinaryKDLoss"):
        kd.loss(none)
