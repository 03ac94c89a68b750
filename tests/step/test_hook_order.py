"""A KD layer acts on its module's own output; hooks of others get what the next module gets."""

import copy
import io

import pytest
import torch

from kdlayers import (
    CodebookTargets,
    DistillLoss,
    KDPoint,
    attach_kd,
    bake,
    fold,
    load_student,
    save_student,
)
from tests.nets import Net, batch

IMAGES, LABELS = batch()


class Reads(Net):
    """Uses features that a hook has read; the hook comes in the first forward, as transformers'."""

    def __init__(self):
        super().__init__()
        self.hooked = False

    def forward(self, x):
        if not self.hooked:
            self.hooked = True
            self.first[-1].register_forward_hook(lambda m, args, out: self.read.append(out))
        self.read = []
        maps = self.last(self.first(self.stem(x)))
        (read,) = self.read
        return self.head(maps.mean((2, 3))) + read.mean((1, 2, 3))[:, None]


def made(ran=True, kind=Reads, seed=0):
    torch.manual_seed(seed)
    model = kind().eval()
    if ran:
        model(IMAGES)
    return model


def loaded(file, model):
    file.seek(0)
    return load_student(model, file).eval()


def test_a_hook_reads_the_same_features_whether_it_or_the_layer_came_first():
    student = made()
    plain = student(IMAGES)
    attach_kd(student, at=[KDPoint("first", num_templates=4)], example=IMAGES).detach()
    expected = student(IMAGES)
    assert not torch.allclose(expected, plain)
    file = io.BytesIO()
    save_student(student, file)
    assert torch.equal(loaded(file, made(ran=False, seed=1))(IMAGES), expected)
    assert torch.equal(loaded(file, made(ran=True, seed=1))(IMAGES), expected)


class OnlyRead(Reads):
    """Its output depends on its features only through the hook."""

    def forward(self, x):
        super().forward(x)
        return self.read[0].mean((2, 3))


def test_a_point_whose_features_only_a_hook_reads_takes_a_layer():
    student = made(kind=OnlyRead)
    plain = student(IMAGES)
    attach_kd(student, at=[KDPoint("first", num_templates=4)], example=IMAGES)
    assert not torch.allclose(student(IMAGES), plain)


@pytest.mark.parametrize("first", ["hook", "layer"])
def test_a_hook_that_changes_the_output_changes_that_of_the_layer(first):
    def shifted(model):
        model.last[-1].register_forward_hook(lambda module, args, output: output - 0.25)
        return model

    student = shifted(made(kind=Net)) if first == "hook" else made(kind=Net)
    kd = attach_kd(student, at=[KDPoint("last", num_templates=4)], example=IMAGES)
    kd.detach()
    student = student if first == "hook" else shifted(student)
    layer = kd.layers["last"].eval()
    inner = student.last[0](student.first(student.stem(IMAGES))).relu()
    expected = student.head((layer(inner) - 0.25).mean((2, 3)))
    torch.testing.assert_close(student(IMAGES), expected)
    file = io.BytesIO()
    save_student(student, file)
    for fresh in (
        loaded(file, shifted(made(kind=Net, seed=1))),
        shifted(loaded(file, made(kind=Net, seed=1))),
        bake(student),
        fold(student),
        copy.deepcopy(student),
    ):
        torch.testing.assert_close(fresh(IMAGES), expected)


class Kept(DistillLoss):
    """Keeps the student's features."""

    def forward(self, student, teacher, targets=None):
        self.seen = student.detach()
        return (student - teacher).square().mean()


@pytest.mark.parametrize("later", [True, False])
def test_losses_read_a_point_behind_its_layer_and_the_hooks_of_others(later):
    student, teacher = made(kind=Net), Net(4)
    losses = [Kept(at="last"), Kept(at="last")]
    student.last[-1].register_forward_hook(lambda module, args, output: output * 2)
    if later:  # the layer belongs to a later handle than the loss
        first = attach_kd(student, teacher, losses=losses[:1], example=IMAGES)
    points = [KDPoint("last", targets=CodebookTargets(4))]
    kd = attach_kd(student, teacher, points, losses=losses[1:], example=IMAGES)
    kd.fit([(IMAGES, LABELS)], progress=False)
    received = []
    student.last.register_forward_hook(lambda module, args, output: received.append(output))
    student.train()(IMAGES)
    for handle in (first, kd) if later else (kd,):
        handle.loss(LABELS)
    for loss in losses if later else losses[1:]:
        assert torch.equal(loss.seen, received[0])
