"""No hook, tape or tensor leaks after loss, exceptions, detach, remove, or deletion."""

import gc
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from kdlayers import (
    AEKTLoss,
    CodebookTargets,
    FitNetLoss,
    InheritExploreLoss,
    KDLoss,
    KDPoint,
    StudentFriendlyKDLoss,
    attach_kd,
    bake,
)
from kdlayers._step.hooks import InsertLayer
from tests.nets import Net, batch

LABELS = batch()[1]


class Failing(Net):
    """Raises an error where asked: nowhere, in its head, or in an earlier module."""

    at = None

    def forward(self, x):
        x = self.last(self.first(self.stem(x)))
        if self.at == "end":
            raise RuntimeError("out of memory, say")
        return self.head(x.mean((2, 3)))


class FailingLoss(KDLoss):
    fails = False

    def forward(self, student, teacher, targets=None):
        value = super().forward(student, teacher, targets)
        if self.fails:
            raise RuntimeError("out of memory, say")
        return value


def attached():
    """A handle with every kind of term: scores, features, logits, train-only parameters."""
    student, teacher = Failing(4), Failing(6)
    losses = [
        FitNetLoss(at="first"),
        InheritExploreLoss(factor_channels=2, at="last", epochs=1),
        AEKTLoss(),
        StudentFriendlyKDLoss(),
        FailingLoss(),
    ]
    points = [KDPoint("last", targets=CodebookTargets(4))]
    kd = attach_kd(student, teacher, points, losses=losses, example=batch()[0])
    kd.fit([batch()])
    return student.train(), teacher, kd


class Watched:
    """Weak references to every activation of a model while it is watched."""

    def __init__(self, *models):
        self.seen = {}
        self.hooks = [
            module.register_forward_hook(
                lambda m, args, out, key=(number, name): self.note(key, args, out), prepend=True
            )
            for number, model in enumerate(models)
            for name, module in model.named_modules()
        ]

    def note(self, key, args, out):
        tensors = [t for t in (*args, out) if isinstance(t, torch.Tensor)]
        for place, tensor in enumerate(tensors):
            self.seen[(*key, place)] = weakref.ref(tensor)

    def end(self):
        for hook in self.hooks:
            hook.remove()

    def alive(self):
        return sorted(key for key, ref in self.seen.items() if ref() is not None)


@pytest.fixture(params=["reference counts", "collector"])
def collect(request):
    """Runs without the garbage collector: reference cycles would free memory late."""
    gc.collect()
    if request.param == "reference counts":
        gc.disable()
        yield lambda: None
        gc.enable()
    else:
        yield gc.collect


def step(student, kd, images):
    loss = F.cross_entropy(student(images), LABELS) + kd.loss(LABELS)
    loss.backward()


def kd_hooks(model):
    return [
        hook
        for module in model.modules()
        for hooks in (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks)
        for hook in hooks.values()
    ]


def test_no_tensor_of_a_batch_survives_a_step(collect):
    student, teacher, kd = attached()
    watched = Watched(student, teacher)
    step(student, kd, batch()[0])
    collect()
    assert len(watched.seen) > 20
    assert watched.alive() == []
    assert not any(value.requires_grad for value in kd.terms.values())


def test_no_tensor_of_a_batch_survives_a_step_without_the_kd_loss(collect):
    student, teacher, kd = attached()
    watched = Watched(student, teacher)
    kd.teach(batch()[0])
    F.cross_entropy(student(batch()[0]), LABELS).backward()
    kd.clear()
    collect()
    assert watched.alive() == []


def test_no_tensor_of_fit_survives(collect):
    student, teacher, kd = attached()
    watched = Watched(student, teacher)
    kd.fit([batch(seed=3)], refit=True)
    collect()
    assert len(watched.seen) > 6
    assert watched.alive() == []


@pytest.mark.parametrize("taught", [False, True], ids=["", "after kd.teach"])
def test_an_exception_in_the_students_forward_frees_its_activations(collect, taught):
    student, teacher, kd = attached()
    watched = Watched(student, teacher)
    student.at = "end"
    images = batch()[0]
    if taught:
        kd.teach(images)
    with pytest.raises(RuntimeError, match="out of memory"):
        student(images)
    del images
    collect()
    assert watched.alive() == []
    assert not kd._tape.active
    student.at = None
    step(student, kd, batch()[0])
    assert watched.alive() == []


def test_an_exception_inside_kd_batch_frees_its_activations(collect):
    student, teacher, kd = attached()
    watched = Watched(student, teacher)
    student.at = "end"

    def run():
        images = batch()[0]
        with kd.batch(images):
            student.forward(images)

    with pytest.raises(RuntimeError, match="out of memory"):
        run()
    collect()
    assert watched.alive() == []
    student.at = None
    step(student, kd, batch()[0])


def test_an_exception_in_the_teachers_forward_frees_both_models(collect):
    student, teacher, kd = attached()
    watched = Watched(student, teacher)
    teacher.at = "end"
    with pytest.raises(RuntimeError, match="out of memory"):
        step(student, kd, batch()[0])
    collect()
    assert watched.alive() == []
    watched.end()
    assert kd_hooks(teacher) == []
    teacher.at = None
    step(student, kd, batch()[0])


def test_an_exception_in_a_loss_frees_student_and_teacher(collect):
    student, teacher, kd = attached()
    watched = Watched(student, teacher)
    loss = next(t.loss for t in kd._terms if isinstance(t.loss, FailingLoss))
    loss.fails = True
    with pytest.raises(RuntimeError, match="out of memory"):
        step(student, kd, batch()[0])
    collect()
    assert watched.alive() == []
    loss.fails = False
    step(student, kd, batch()[0])


def test_a_failed_forward_of_a_larger_model_is_not_read(collect):
    student, _, kd = attached()
    student.at = "end"
    with pytest.raises(RuntimeError, match="out of memory"):
        nn.Sequential(student)(batch()[0])
    from kdlayers.errors import CaptureError

    with pytest.raises(CaptureError, match="no training forward"):
        kd.loss(LABELS)


def test_detach_leaves_the_layers_hooks_and_frees_the_rest(collect):
    student, teacher, kd = attached()
    step(student, kd, batch()[0])
    refs = [weakref.ref(teacher), *(weakref.ref(t.loss) for t in kd._terms)]
    refs += [weakref.ref(p) for p in kd.parameters()]
    watched = Watched(student)
    logits = student(batch()[0])
    watched.end()
    kd.detach()
    del teacher, logits
    collect()
    gc.collect()  # an nn.Module with a generator of its own may hold itself
    assert [ref() for ref in refs if ref() is not None] == []
    assert watched.alive() == []
    assert [type(hook) for hook in kd_hooks(student)] == [InsertLayer]
    student(batch()[0]).sum().backward()
    assert kd._tape.forward is None


def test_remove_leaves_no_hook_and_no_layer():
    student, teacher, kd = attached()
    step(student, kd, batch()[0])
    layer = weakref.ref(student.get_submodule("last.1.kd"))
    kd.remove()
    gc.collect()
    assert layer() is None
    assert kd_hooks(student) == kd_hooks(teacher) == []
    assert not any(m._forward_hooks_always_called for m in student.modules())
    assert not any(m._forward_hooks_with_kwargs for m in student.modules())


def test_a_dropped_handle_frees_everything(collect):
    student, teacher, kd = attached()
    watched = Watched(student)
    logits = student(batch()[0])
    refs = [weakref.ref(teacher), weakref.ref(kd), *(weakref.ref(t.loss) for t in kd._terms)]
    watched.end()
    del teacher, kd, logits
    collect()
    gc.collect()
    assert [ref() for ref in refs if ref() is not None] == []
    assert watched.alive() == []
    assert [type(hook) for hook in kd_hooks(student)] == [InsertLayer]
    assert not any(m._forward_hooks_always_called for m in student.modules())


def test_a_handle_is_freed_after_a_failed_forward():
    student, teacher, kd = attached()
    student.at = "end"
    seen = weakref.ref(teacher)
    with pytest.raises(RuntimeError, match="out of memory"):
        student(batch()[0])
    del teacher, kd
    gc.collect()
    assert seen() is None
    assert [type(hook) for hook in kd_hooks(student)] == [InsertLayer]


def test_a_failed_attach_keeps_no_references():
    student, teacher = Net(4), Net(6)
    seen = weakref.ref(teacher)
    with pytest.raises(ValueError, match="reads teacher 1"):
        attach_kd(student, teacher, losses=[KDLoss(teacher_index=1)], example=batch()[0])
    assert kd_hooks(student) == kd_hooks(teacher) == []
    del teacher
    gc.collect()
    assert seen() is None


def test_a_baked_copy_of_an_attached_student_has_no_hooks():
    student, _, kd = attached()
    baked = bake(student)
    assert kd_hooks(baked) == []
    assert not any(m._forward_hooks_always_called for m in baked.modules())
    assert kd.step == 0
