"""Freezing, casting and seeding before and after attach, and the settings of torch.compile."""

import copy
import gc
import warnings

import pytest
import torch
from torch import nn

from kdlayers import (
    AEKTLoss,
    CodebookTargets,
    FitNetLoss,
    KDLayer,
    KDPoint,
    attach_kd,
)
from kdlayers._step.sites import slots
from kdlayers.errors import CaptureError, KDLayersWarning, ShapeError
from tests.nets import Net, batch

IMAGES, LABELS = batch()


def attached(student=None, losses=(), teacher=None):
    student = student or Net(4)
    point = KDPoint("last", targets=CodebookTargets(8))
    kd = attach_kd(student, teacher or Net(6), [point], losses=losses, example=IMAGES)
    kd.fit([(IMAGES, LABELS)], progress=False)
    return student, kd


def steps(student, kd, count=3):
    learning = [p for p in (*student.parameters(), *kd.parameters()) if p.requires_grad]
    optimiser = torch.optim.SGD(learning, lr=0.1)
    for _ in range(count):
        optimiser.zero_grad()
        (student(IMAGES).square().mean() + kd.loss(LABELS)).backward()
        optimiser.step()


def test_freezing_the_layers_after_attach_is_silent():
    student, kd = attached()
    slots(student)["last"].requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steps(student, kd)


class Adapted(nn.Module):
    def __init__(self, base):
        super().__init__()
        self.base = base
        self.low = nn.Parameter(torch.zeros(4, 4, 1, 1))

    def forward(self, x):
        return self.base(x) + torch.nn.functional.conv2d(self.base(x), self.low)


def test_warns_once_when_a_tool_freezes_everything():
    student, kd = attached()
    student.requires_grad_(False)
    student.first[1] = Adapted(student.first[1])
    student.first[1].low.requires_grad_(True)
    with pytest.warns(KDLayersWarning, match=r"TemplateLoss\.last, for example by peft") as told:
        steps(student, kd)
    assert len(told) == 1


def test_errors_for_a_frozen_student_do_not_mention_checkpointing():
    student, kd = attached()
    for name in ("stem", "first", "last"):
        getattr(student, name).requires_grad_(False)
    student(IMAGES)
    with pytest.raises(CaptureError, match="requires_grad is False for all parameters") as caught:
        kd.loss(LABELS)
    assert "checkpoint" not in str(caught.value)
    student, kd = attached(losses=[FitNetLoss(at="first")])
    for name in ("stem", "first"):
        getattr(student, name).requires_grad_(False)
    student(IMAGES)
    with pytest.raises(CaptureError, match=r"^first: requires_grad is False"):
        kd.loss(LABELS)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("loss", [FitNetLoss, AEKTLoss])
def test_a_student_cast_after_attach(loss, dtype):
    extra = {"at": "last"} if loss is FitNetLoss else {}
    student, kd = attached(losses=[loss(**extra)])
    own = list(kd.parameters())
    student(IMAGES)
    expected = kd.loss(LABELS).detach()
    student.to(dtype)
    student(IMAGES.to(dtype))
    found = kd.loss(LABELS)
    found.backward()
    assert all(a is b for a, b in zip(own, kd.parameters(), strict=True))
    tolerance = {torch.float64: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-1}[dtype]
    torch.testing.assert_close(found.double(), expected.double(), rtol=tolerance, atol=tolerance)
    if dtype == torch.float64:
        assert found.dtype == torch.float64


def weights(student):
    return [p.clone() for slot in slots(student).values() for p in slot.parameters()]


def same(a, b):
    return all(torch.equal(x, y) for x, y in zip(weights(a), weights(b), strict=True))


def test_two_students_get_layers_of_their_own_and_one_seed_gives_the_same():
    def made(seed):
        torch.manual_seed(seed)
        return attached(Net(4))[0]

    torch.manual_seed(5)
    first, second, teacher = Net(4), Net(4), Net(6)
    state = torch.get_rng_state()
    attached(first, teacher=teacher)
    attached(second, teacher=teacher)
    assert torch.equal(state, torch.get_rng_state())
    head = slots(first)["last"].head.weight, slots(second)["last"].head.weight
    assert not torch.equal(*head)
    assert same(made(3), made(3))
    assert not torch.equal(weights(made(3))[0], weights(made(4))[0])


def test_one_image_with_one_position_is_refused_in_training():
    layer = KDLayer(4, 8)
    with pytest.raises(ShapeError, match="one image with one position; give two images"):
        layer(torch.randn(1, 4, 1, 1))
    assert layer(torch.randn(2, 4, 1, 1)).isfinite().all()
    assert layer.eval()(torch.randn(1, 4, 1, 1)).isfinite().all()


@pytest.mark.parametrize("found", [True, False])
def test_the_last_remove_restores_the_compiler_setting(found, monkeypatch):
    from torch import _dynamo

    from kdlayers._step import hooks

    monkeypatch.setattr(hooks, "_LIVE", type(hooks._LIVE)())  # layers of other tests
    monkeypatch.setattr(hooks, "_FOUND", [])
    with _dynamo.config.patch(skip_nnmodule_hook_guards=found):
        _, first = attached()
        student, second = attached()
        twin = copy.deepcopy(student)
        first.remove()
        assert not _dynamo.config.skip_nnmodule_hook_guards
        second.remove()
        assert not _dynamo.config.skip_nnmodule_hook_guards  # the copy has its layer still
        del twin
        gc.collect()
        _, third = attached()
        third.remove()
        assert _dynamo.config.skip_nnmodule_hook_guards == found
