"""Training setups around the student: memory formats, scalers, checkpointing, larger models."""

import pytest
import timm
import torch
import torch.nn.functional as F

from kdlayers import CodebookTargets, KDPoint, attach_kd, attach_mutual
from kdlayers._step.sites import slots
from tests.nets import Net, batch

IMAGES, LABELS = batch(8)


def attached(student=None, at="last", images=IMAGES):
    student = Net(4) if student is None else student
    kd = attach_kd(
        student, Net(6), [KDPoint(at, "last", targets=CodebookTargets(4))], example=images
    )
    kd.fit([(images, LABELS)])
    return student.train(), kd


def gradients(student, kd, images=IMAGES):
    student.zero_grad()
    (F.cross_entropy(student(images), LABELS) + kd.loss(LABELS)).backward()
    return {name: p.grad.clone() for name, p in student.named_parameters()}


def close(first, second, rtol=1e-4, atol=1e-5):
    for name, value in first.items():
        torch.testing.assert_close(
            value, second[name], rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_channels_last():
    student, kd = attached()
    plain = gradients(student, kd)
    student.to(memory_format=torch.channels_last)
    close(plain, gradients(student, kd, IMAGES.to(memory_format=torch.channels_last)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_grad_scaler_and_clipping(dtype):
    student, kd = attached()
    plain = gradients(student, kd)
    student.zero_grad()
    optimiser = torch.optim.SGD(student.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=64.0)
    with torch.autocast("cpu", dtype=dtype):
        loss = F.cross_entropy(student(IMAGES), LABELS) + kd.loss(LABELS)
    scaler.scale(loss).backward()
    scaler.unscale_(optimiser)
    close(plain, {n: p.grad for n, p in student.named_parameters()}, rtol=0.3, atol=0.05)
    torch.nn.utils.clip_grad_norm_(student.parameters(), 1.0)
    before = slots(student)["last"].head.weight.clone()
    scaler.step(optimiser)
    scaler.update()
    assert not torch.equal(before, slots(student)["last"].head.weight)


@pytest.mark.parametrize("ahead", [False, True])
def test_autocast_keeps_the_gradients_of_both_students_of_a_pair(ahead):
    students = Net(4), Net(6)
    kds = attach_mutual(*students, example=IMAGES)
    found = []
    for enabled in (False, True):
        losses = []
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            for student, kd in zip(students, kds, strict=True):
                if ahead:
                    kd.teach(IMAGES)  # runs the peer before its own forward
                losses.append(F.cross_entropy(student(IMAGES), LABELS) + kd.loss(LABELS))
        for student in students:
            student.zero_grad()
        sum(losses).backward()
        found.append({id(p): p.grad for student in students for p in student.parameters()})
    close(*found, rtol=0.1, atol=0.01)


@pytest.mark.parametrize(
    ("name", "at", "kwargs"),
    [
        ("resnet10t", "layer3", {}),
        ("vit_tiny_patch16_224", "blocks.10", {"img_size": 32}),
        ("convnext_atto", "stages.2", {}),
    ],
)
def test_timms_checkpointing_switch(name, at, kwargs):
    student = timm.create_model(name, num_classes=3, **kwargs)
    images = batch(8, pixels=32)[0]
    student, kd = attached(student, at, images)
    plain = gradients(student, kd, images)
    student.set_grad_checkpointing()
    close(plain, gradients(student, kd, images))


def test_students_that_are_part_of_a_larger_model():
    student, kd = attached()
    alone = gradients(student, kd)
    student.zero_grad()
    outer = torch.nn.Sequential(torch.nn.Identity(), student)
    (F.cross_entropy(outer(IMAGES), LABELS) + kd.loss(LABELS)).backward()
    close(alone, {name: p.grad for name, p in student.named_parameters()})
