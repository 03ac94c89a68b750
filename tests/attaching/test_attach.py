"""Points that attach_kd accepts, and those for which it raises an error."""

import copy

import pytest
import torch
from torch import nn

from kdlayers import CodebookTargets, DecisionTargets, KDPoint, attach_kd
from kdlayers._step.sites import slots
from kdlayers.errors import (
    ArgumentError,
    AttachError,
    KDLayersError,
    LayoutError,
    NoMatchError,
)
from tests.nets import Net, batch

IMAGES, LABELS = batch()


def attach(at, student=None, teacher=None, **kwargs):
    student = student or Net(4)
    kd = attach_kd(student, teacher or Net(6), at, example=IMAGES, **kwargs)
    return student, kd


@pytest.mark.parametrize(
    ("at", "points"),
    [
        ("last", ["last"]),
        (["last", "first"], ["first", "last"]),
        ({"first": "last"}, ["first"]),
        ([KDPoint("last", "first"), "first"], ["first", "last"]),
        (["*st"], ["first", "last"]),
        (["[fl]*t"], ["first", "last"]),
        (["module.last"], ["last"]),
        (["_orig_mod.first"], ["first"]),
        (["_orig_mod.module.first"], ["first"]),
        (["module._orig_mod.f*t"], ["first"]),
    ],
)
def test_formats_of_at(at, points):
    student, _ = attach(at)
    assert list(slots(student)) == points


class Outer(nn.Module):
    """Holds its network under the name that DDP uses."""

    def __init__(self):
        super().__init__()
        self.module = Net(4)

    def forward(self, x):
        return self.module(x)


@pytest.mark.parametrize("name", ["module.last", "module.module.last", "_orig_mod.module.la*"])
def test_a_submodule_called_module(name):
    student = Outer()
    attach_kd(student, Net(6), {name.replace("*", "st"): "last"}, example=IMAGES)
    assert list(slots(student)) == ["module.last"]
    student = Outer()
    attach_kd(student, Outer(), [name], example=IMAGES)
    assert list(slots(student)) == ["module.last"]


def test_default_targets_are_codebook_last_and_decisions_before():
    _, kd = attach(["last", "first"])
    losses = {term.point: term.loss.template_targets for term in kd._terms}
    assert isinstance(losses["first"], DecisionTargets)
    assert losses["first"].num_templates == 24
    assert isinstance(losses["last"], CodebookTargets)
    assert losses["last"].num_templates == 4096
    _, kd = attach([KDPoint("first", num_templates=6), KDPoint("last", num_templates=9)])
    assert kd._terms[0].loss.template_targets.subclasses == 2
    assert kd._terms[1].loss.template_targets.num_templates == 9


def test_layers_only_without_a_teacher():
    student = Net(4)
    kd = attach_kd(student, at=[KDPoint("last", num_templates=7)], example=IMAGES)
    assert slots(student)["last"].head.num_templates == 7
    student(IMAGES)
    with pytest.raises(AttachError, match="teacher=None"):
        kd.loss(LABELS)


def test_parameters_follow_the_students_dtype_and_mode():
    student = Net(4).double()
    student.last.eval()
    attach_kd(
        student,
        at=[KDPoint("last", num_templates=7), KDPoint("first", num_templates=7)],
        example=IMAGES,
    )
    layers = slots(student)
    assert layers["last"].head.weight.dtype == torch.float64
    assert not layers["last"].norm.training
    assert layers["first"].norm.training


def test_initialisation_follows_the_global_seed():
    torch.manual_seed(3)
    first, _ = attach(["last"])
    torch.manual_seed(3)
    second, _ = attach(["last"])
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)


class Twice(Net):
    """Runs ``last`` twice, ``side`` off the path to the output, ``idle`` never."""

    def __init__(self):
        super().__init__(4)
        self.again = nn.Sequential(nn.Conv2d(5, 5, 1), nn.ReLU())
        self.side = nn.Sequential(nn.Conv2d(3, 5, 1), nn.ReLU())
        self.idle = nn.Sequential(nn.Conv2d(3, 5, 1), nn.ReLU())
        self.norm = nn.BatchNorm2d(5)

    def forward(self, x):
        self.side(x)
        x = self.last(self.first(self.stem(x)))
        return self.head(self.norm(self.again(self.again(x))).mean((2, 3)))


class Dropped(Net):
    def forward(self, x):
        return super().forward(x) + torch.rand(())


class Flat(Net):
    def forward(self, x):
        return {"no": "tensor"}


@pytest.mark.parametrize(
    ("student", "at", "error", "sentence"),
    [
        (Flat(), ["last"], AttachError, "returns no tensor"),
        (Dropped(), ["last"], AttachError, "its eval-mode forward is random"),
        (nn.Linear(3, 3), [""], ArgumentError, "has no convolution of images .*; pass example="),
        (Twice(), ["again"], NoMatchError, "no module 'again' runs in the teacher"),
    ],
)
def test_models_that_cannot_be_attached(student, at, error, sentence):
    with pytest.raises(error, match=sentence):
        attach_kd(student, Net(6), at)


def test_a_failed_attach_leaves_the_student_unchanged():
    student = Twice().eval()
    student.first.train()
    flags = [m.training for m in student.modules()]
    keys, output = list(student.state_dict()), student(IMAGES)
    for at in (
        {"last": "last", "side": "first"},
        {"last": "last", "again": "last"},
        {"last": "no"},
    ):
        with pytest.raises(KDLayersError):
            attach(at, student)
    assert list(student.state_dict()) == keys
    assert torch.equal(student(IMAGES), output)
    assert [m.training for m in student.modules()] == flags
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in student.modules())


def test_attaching_twice():
    student, kd = attach(["last"])
    with pytest.raises(AttachError, match=r"call kd\.remove\(\)"):
        attach(["last"], student)
    kd.remove()
    attach(["last"], student)


class Gray(nn.Module):
    """Square maps with as many channels as rows, and no module that states an axis."""

    def __init__(self, sizes=None):
        super().__init__()
        self.sizes = sizes
        self.body = Shift()
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        if self.sizes is not None and tuple(x.shape[2:]) not in self.sizes:
            raise ValueError("another size")
        return self.head(self.body(x.mean(1, keepdim=True).expand(-1, 8, -1, -1)).mean((2, 3)))


class Shift(nn.Module):
    def __init__(self):
        super().__init__()
        self.by = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        return x + self.by


def test_ambiguous_layout_is_refused_and_another_example_resolves_it():
    sizes = [(8, 8), (4, 6)]
    with pytest.raises(LayoutError, match="which axis holds the channels"):
        attach_kd(Gray(sizes), Net(), {"body": "last"}, example=IMAGES)
    wide = torch.zeros(2, 3, 4, 6)
    attach_kd(Gray(sizes), Net(), {"body": "last"}, example=wide)


def test_images_of_other_sizes_resolve_equal_axes():
    student = Gray()
    attach_kd(student, Net(), {"body": "last"}, example=IMAGES)
    assert slots(student)["body"].head.channel_dim == 1


def test_example_is_made_from_the_model():
    student = Net(4)
    kd = attach_kd(student, Net(6), "last")
    assert "last" in kd.summary()
    twin = copy.deepcopy(student)
    assert torch.equal(twin.eval()(IMAGES), student.eval()(IMAGES))
