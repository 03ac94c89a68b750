"""Nothing of the library depends on torch's default device.

The device ``meta`` stands for a GPU: a tensor without a device would have no values.
"""

import pytest
import torch
from torch.utils.data import TensorDataset

from kdlayers import (
    AEKTLoss,
    AttentionTransferLoss,
    BinaryKDLoss,
    ChannelWiseLoss,
    CodebookTargets,
    DecisionTargets,
    DISTLoss,
    DKDLoss,
    FeatureLoss,
    FitNetLoss,
    InheritExploreLoss,
    KDLoss,
    KDPoint,
    RecordedTeacher,
    RKDLoss,
    SimilarityPreservingLoss,
    StudentFriendlyKDLoss,
    attach_kd,
    bake,
    fold,
    load_student,
    prune_templates,
    save_student,
)
from kdlayers.viz import template_usage
from tests.nets import Net, batch

IMAGES, LABELS = batch()
LOSSES = [
    *(KDLoss(), KDLoss(standardize=True), DKDLoss(), AEKTLoss(), StudentFriendlyKDLoss()),
    *(BinaryKDLoss(), DISTLoss(), RKDLoss(at="last"), SimilarityPreservingLoss(at="last")),
    *(FitNetLoss(at="last"), FeatureLoss(at="last", normalize_teacher=True)),
    *(AttentionTransferLoss(at="first"), ChannelWiseLoss(at="first")),
    InheritExploreLoss(at="first", epochs=1, split="random"),
    InheritExploreLoss(at="first", coder="online"),
]


def numbers(device, losses=(), points=()):
    """The loss and the state of a handle that was attached and fitted with this default device."""
    torch.manual_seed(0)
    student, teacher = Net(4).train(), Net(6)
    with torch.device(device):
        kd = attach_kd(student, teacher, points, losses=losses, example=IMAGES[:2])
        kd.fit([(IMAGES, LABELS)] * 2, progress=False)
        student(IMAGES)
        total = kd.loss(LABELS)
        total.backward()
        state = kd.state_dict()
        kd.load_state_dict(state)
        kd.summary()
        student(IMAGES)
        kd.gradient_norms(LABELS)
    assert {tensor.device.type for tensor in kd.parameters()} <= {"cpu"}
    return student, kd, total


@pytest.mark.parametrize("index", range(len(LOSSES)))
def test_losses(index):
    loss = LOSSES[index]
    assert numbers("meta", [loss])[2].isfinite()


def test_layers_and_what_leaves(tmp_path):
    def points():
        first = KDPoint("first", targets=DecisionTargets(2))
        return [first, KDPoint("last", targets=CodebookTargets(8))]

    expected = numbers("cpu", points=points())[2]
    fresh = Net(4)
    student, kd, total = numbers("meta", points=points())
    torch.testing.assert_close(total, expected)  # the same layers and the same fit
    kd.detach()
    with torch.device("meta"):
        assert template_usage(student, [IMAGES], at="last").positions
        prune_templates(student, [IMAGES])
        save_student(student.eval(), tmp_path / "student.pt")
        loaded = load_student(fresh, tmp_path / "student.pt").eval()
        for other in (loaded, bake(student), fold(student)):
            torch.testing.assert_close(other(IMAGES), student(IMAGES), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("workers", [0, 1])
def test_records(tmp_path, workers):
    student, teacher, data = Net(4).train(), Net(6), TensorDataset(IMAGES, LABELS)
    point = KDPoint("last", targets=CodebookTargets(8))
    with torch.device("meta"):
        kd = attach_kd(student, teacher, [point], losses=[KDLoss()], example=IMAGES[:2])
        recorded = kd.record(data, tmp_path, views=1, num_workers=workers, progress=False)
        recorded.set_epoch(1)
        items = [recorded[index] for index in range(len(data))]
        x, y, key = (torch.stack(part) for part in zip(*items, strict=True))
        kd.fit([(x, y, key)] * 2, progress=False)
        student(x)
        live = kd.loss(y, recorded=key)
        assert live.isfinite()
        kd.remove()
        kd = attach_kd(student, RecordedTeacher(tmp_path), losses=[KDLoss()], example=IMAGES[:2])
        student(x)
        assert kd.loss(y, recorded=key).isfinite()
