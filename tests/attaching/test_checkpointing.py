"""Gradient checkpointing enabled before `attach_kd` changes neither points nor losses."""

import copy

import pytest
import torch
import torch.nn.functional as F

from kdlayers import CodebookTargets, FitNetLoss, KDPoint, attach_kd, find_points

timm = pytest.importorskip("timm")

STUDENTS = {
    "resnet10t": "layer4",
    "efficientnet_lite0": "blocks.6",
    "test_convnext": "stages.3",
    "test_vit": "blocks",
}
IMAGES, LABELS = torch.randn(4, 3, 64, 64), torch.tensor([0, 1, 2, 0])


def step(student, teacher, name, at):
    """Loss and gradients of one step, with the same parameters in each call."""
    torch.manual_seed(0)
    kd = attach_kd(
        student,
        teacher,
        [KDPoint(at, "layer4", targets=CodebookTargets(4))],
        losses=[FitNetLoss(at=(at, "layer4"))],
        example=images_for(name),
        teacher_transform=lambda x: x,
    )
    kd.fit([(images_for(name), LABELS)], progress=False)
    student.train()
    loss = F.cross_entropy(student(images_for(name)), LABELS) + kd.loss(LABELS)
    loss.backward()
    return loss.detach(), [p.grad for p in student.parameters()]


def images_for(name):
    return F.interpolate(IMAGES, 160) if name == "test_vit" else IMAGES


@pytest.mark.parametrize(("name", "at"), STUDENTS.items())
def test_points_and_losses_are_those_without_checkpointing(name, at):
    torch.manual_seed(1)
    plain = timm.create_model(name, num_classes=3)
    teacher = timm.create_model("resnet10t", num_classes=3)
    checkpointed = copy.deepcopy(plain)
    checkpointed.set_grad_checkpointing()
    names = {point.name for point in find_points(checkpointed, images_for(name))}
    assert at in names
    assert {point.name for point in find_points(plain, images_for(name))} == names
    wanted, grads = step(plain, teacher, name, at)
    found, others = step(checkpointed, teacher, name, at)
    torch.testing.assert_close(found, wanted)
    for mine, theirs in zip(others, grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-3, atol=1e-5)


def test_a_checkpointed_teacher_is_tapped_too():
    torch.manual_seed(1)
    student = timm.create_model("resnet10t", num_classes=3)
    teacher = copy.deepcopy(student)
    checkpointed = copy.deepcopy(student)
    checkpointed.set_grad_checkpointing()
    values = [step(copy.deepcopy(student), t, "", "layer4")[0] for t in (teacher, checkpointed)]
    torch.testing.assert_close(*values)
