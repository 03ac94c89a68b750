"""Images and labels of a class derived from Tensor, such as one that carries metadata."""

import copy

import pytest
import torch
import torch.nn.functional as F

from kdlayers import (
    CodebookTargets,
    DecisionTargets,
    FeatureLoss,
    InheritExploreLoss,
    KDLoss,
    KDPoint,
    attach_kd,
    bake,
    fold,
)
from tests.nets import Net, batch

IMAGES, LABELS = batch()


class Annotated(torch.Tensor):
    """Every result is one again. It cannot be cut, and makes no tensors of several sizes."""

    def __getitem__(self, index):
        raise TypeError("the metadata of a batch cannot be cut")

    def new_empty(self, size, **options):
        return torch.empty(tuple(size), dtype=self.dtype, **options)


def annotated(tensor):
    return tensor.clone().as_subclass(Annotated)


def trained(student, teacher, images, labels, **options):
    """All numbers of a fit, a step and the student's outputs afterwards."""
    torch.manual_seed(0)
    student, teacher = copy.deepcopy((student, teacher))
    points = [
        KDPoint("first", targets=DecisionTargets(2, components=2)),
        KDPoint("last", targets=CodebookTargets(9)),
    ]
    losses = [KDLoss(), FeatureLoss(at="first"), InheritExploreLoss(at="last", epochs=1)]
    kd = attach_kd(student, teacher, points, losses=losses, example=images, **options)
    for layer in kd.layers.values():
        torch.nn.init.normal_(layer.value.weight)
    kd.fit([(images, labels)] * 2, progress=False)
    logits = student(images)
    loss = kd.loss(labels)
    assert type(loss) is torch.Tensor
    (F.cross_entropy(logits, labels) + loss).backward()
    student.eval()
    with torch.no_grad():
        outputs = [model(images) for model in (student, bake(student), fold(student))]
    assert {type(output) for output in (logits, *outputs)} == {type(images)}
    found = [loss, *outputs, *(p.grad for p in student.parameters())]
    return [tensor.detach().as_subclass(torch.Tensor) for tensor in found]


@pytest.mark.parametrize("memory", ["normal", "low"])
def test_the_class_changes_no_number(memory):
    models = Net(4), Net(6)
    found = trained(*models, annotated(IMAGES), annotated(LABELS), memory=memory)
    wanted = trained(*models, IMAGES, LABELS, memory=memory)
    assert all(torch.equal(*both) for both in zip(found, wanted, strict=True))
