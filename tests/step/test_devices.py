"""Teacher and student on different devices, which needs a GPU, and in other dtypes."""

import copy

import pytest
import torch
import torch.nn.functional as F

from kdlayers import (
    AEKTLoss,
    ChannelWiseLoss,
    CodebookTargets,
    DecisionTargets,
    FitNetLoss,
    InheritExploreLoss,
    KDLoss,
    KDPoint,
    StudentFriendlyKDLoss,
    attach_kd,
)
from kdlayers._models.trace import trace
from kdlayers._step.teacher import Teacher
from tests.nets import Net, batch

IMAGES, LABELS = batch()
PLACES = [("cuda", "cpu"), ("cpu", "cuda"), ("cuda", "cuda")]
gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")


def step(student_device, teacher_device, teachers=1, state=None):
    """Values and gradients of one step, on the CPU, and the state that was fitted."""
    torch.manual_seed(0)
    student = Net(4).double().to(student_device)
    models = [Net(6).double() for _ in range(teachers)]
    models = [model.to(teacher_device if i == 0 else "cpu") for i, model in enumerate(models)]
    points = [
        KDPoint("first", targets=DecisionTargets(1, components=2)),
        KDPoint("last", targets=CodebookTargets(4)),
    ]
    losses = [
        KDLoss(),
        AEKTLoss(beta=1.0),
        FitNetLoss(at="first"),
        InheritExploreLoss(factor_channels=2, at="last", epochs=1, split="natural"),
    ]
    kd = attach_kd(student, models, points, losses=losses, example=IMAGES.double())
    kd.fit([(IMAGES.double(), LABELS)])
    fitted = kd.state_dict()
    if state is not None:
        kd.load_state_dict(state)  # fitting elsewhere may number the centres otherwise
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in [*student.parameters(), *kd.parameters()]:
            p.copy_(torch.randn(p.shape, generator=generator, dtype=p.dtype) * 0.2)
    images, labels = IMAGES.double().to(student_device), LABELS.to(student_device)
    loss = F.cross_entropy(student.train()(images), labels) + kd.loss(labels)
    loss.backward()
    parameters = [*student.parameters(), *kd.parameters()]
    assert all(p.device.type == student_device for p in parameters)
    grads = [None if p.grad is None else p.grad.cpu() for p in parameters]
    return (loss.detach().cpu(), grads, {k: v.cpu() for k, v in kd.terms.items()}), fitted


@gpu
@pytest.mark.parametrize("teachers", [1, 2])
@pytest.mark.parametrize(("student", "teacher"), PLACES)
def test_devices_make_no_difference(student, teacher, teachers):
    expected, state = step("cpu", "cpu", teachers)
    found, _ = step(student, teacher, teachers, copy.deepcopy(state))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


@gpu
def test_labels_and_images_may_stay_on_the_cpu_of_a_loader():
    student, teacher = Net(4).cuda().train(), Net(6)
    kd = attach_kd(student, teacher, losses=[KDLoss()], example=IMAGES)
    kd.teach(IMAGES)
    kd.clear()
    student(IMAGES.cuda())
    assert kd.loss(LABELS).is_cuda


@gpu
def test_losses_follow_a_student_that_moves_after_attach():
    student, teacher = Net(4), Net(6)
    kd = attach_kd(student, teacher, losses=[AEKTLoss(beta=1.0)], example=IMAGES)
    parameters = list(kd.parameters())
    student.cuda().train()(IMAGES.cuda())
    kd.loss(LABELS).backward()
    assert [p.is_cuda for p in kd.parameters()] == [True] * len(parameters)
    assert all(a is b for a, b in zip(parameters, kd.parameters(), strict=True))


@pytest.mark.parametrize(
    "loss",
    [
        lambda: AEKTLoss(beta=1.0),
        StudentFriendlyKDLoss,
        lambda: FitNetLoss(at="last"),
        lambda: ChannelWiseLoss(at="last"),
        lambda: InheritExploreLoss(at="last", coder="online"),
    ],
)
def test_losses_follow_a_student_to_float64_and_back(loss):
    student = Net(4)
    kd = attach_kd(student, Net(6), losses=[loss()], example=IMAGES)
    found = []
    for dtype in (torch.float32, torch.float64, torch.float32):
        student.to(dtype)(IMAGES.to(dtype))  # the teacher stays in float32
        found.append(kd.loss(LABELS))
        found[-1].backward()
        assert all(p.dtype == dtype for p in kd.parameters())
        for parameter in kd.parameters():
            parameter.grad = None
    assert torch.equal(found[0], found[2])
    torch.testing.assert_close(found[1].float(), found[0], rtol=1e-5, atol=1e-5)


class Abroad(Net):
    """Refuses inputs that were not moved to it, as a model on another device does."""

    def forward(self, x):
        if x.dtype != torch.float64:
            raise RuntimeError("expected all tensors to be on the same device")
        return super().forward(x)


def test_a_step_can_be_repeated_from_a_fitted_state():
    first, state = step("cpu", "cpu", 2)
    torch.testing.assert_close(step("cpu", "cpu", 2, state)[0], first)


def test_inputs_are_moved_to_the_teacher_in_every_call():
    """A dtype is used instead of a device, because the same call converts both."""
    student, teacher = Net(4).train(), Abroad(6).double()
    twin = copy.deepcopy(teacher)
    kd = attach_kd(
        student,
        teacher,
        [KDPoint("last", targets=CodebookTargets(4))],
        losses=[KDLoss(), FitNetLoss(at="first")],
        example=IMAGES,
    )
    kd.fit([(IMAGES, LABELS)])
    for ahead in (False, True):
        if ahead:
            kd.teach(IMAGES)
        student(IMAGES)
        kd.loss(LABELS).backward()
    with kd.batch(IMAGES):
        logits = student.forward(IMAGES)
    kd.loss(LABELS, logits=logits).backward()
    alone = Teacher(twin, trace(twin, (IMAGES,), "teacher"), twin)
    seen, features = alone.run((IMAGES,), {}, ["last"])
    assert seen.dtype == features["last"].dtype == torch.float64


@gpu
@pytest.mark.parametrize("memory", ["normal", "low"])
def test_a_step_on_the_gpu_equals_the_cpu_without_synchronising(memory):
    def step(device):
        torch.manual_seed(0)
        student, teacher = Net(4).to(device).train(), Net(6).to(device)
        points = [
            KDPoint("first", targets=DecisionTargets(2, components=2)),
            KDPoint("last", targets=CodebookTargets(4)),
        ]
        kd = attach_kd(student, teacher, points, memory=memory)
        images, labels = IMAGES.to(device), LABELS.to(device)
        kd.fit([(images, labels)], progress=False)
        torch.cuda.set_sync_debug_mode("error" if device == "cuda" else "default")
        try:
            student(images)
            loss = kd.loss(labels)
            loss.backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        found = {n: p.grad for n, p in student.named_parameters() if "kd" in n}
        return loss.cpu(), {n: g.cpu() for n, g in found.items() if g is not None}

    (ours, grads), (theirs, wanted) = step("cuda"), step("cpu")
    assert grads
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    for name, grad in grads.items():
        torch.testing.assert_close(grad, wanted[name], rtol=1e-2, atol=1e-4)
