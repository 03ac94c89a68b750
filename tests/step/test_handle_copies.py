"""Copies and pickles of a handle work on their own student."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F

from kdlayers import CodebookTargets, FitNetLoss, KDLoss, KDPoint, attach_kd, attach_mutual
from kdlayers.errors import AttachError
from tests.nets import Net, batch, losses_of_steps

IMAGES, LABELS = batch()


def attached():
    student, teacher = Net(4), Net(6)
    point = KDPoint("last", targets=CodebookTargets(num_templates=4))
    losses = [KDLoss(), FitNetLoss(at="first")]
    kd = attach_kd(student, teacher, [point], losses=losses, example=IMAGES)
    kd.fit([(IMAGES, LABELS)], progress=False)
    return student.train(), teacher, kd


def pickled(pair):
    return pickle.loads(pickle.dumps(pair))


def saved(pair):
    file = io.BytesIO()
    torch.save(pair, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


def steps(student, kd, count=3):
    return losses_of_steps(student, kd, IMAGES, LABELS, count)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, saved])
@pytest.mark.parametrize("live", [False, True], ids=["", "with a forward recorded"])
def test_a_copied_handle_trains_only_the_copied_student(copied, live):
    student, teacher, kd = attached()
    steps(student, kd, 1)
    if live:
        logits = student(IMAGES)
    twin, twin_kd = copied((student, kd))
    assert twin_kd.student is twin
    assert twin_kd.step == 1
    assert all(a is not b for a, b in zip(kd.parameters(), twin_kd.parameters(), strict=True))
    before = {k: v.clone() for k, v in student.state_dict().items()}
    if live:
        (F.cross_entropy(logits, LABELS) + kd.loss(LABELS)).backward()
        kd.step, student.grads = 1, None
        student.zero_grad()
        student.load_state_dict(before)
        twin.load_state_dict(before)
    found = steps(twin, twin_kd)
    assert all(torch.equal(v, before[k]) for k, v in student.state_dict().items())
    assert found == steps(student, kd)
    twin_kd.remove()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in twin.modules())
    assert any(m._forward_hooks for m in student.modules())
    steps(student, kd)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_copying_the_handle_copies_its_student(copied):
    student, _, kd = attached()
    twin_kd = copied(kd)
    assert twin_kd.student is not student
    assert steps(twin_kd.student, twin_kd) == steps(student, kd)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled])
def test_a_copy_of_a_detached_handle_is_detached(copied):
    student, _, kd = attached()
    kd.detach()
    twin, twin_kd = copied((student, kd))
    twin(IMAGES).sum().backward()
    with pytest.raises(AttachError, match="this handle was detached"):
        twin_kd.loss(LABELS)


def test_copied_peers_teach_each_other():
    a, b = Net(4).train(), Net(5).train()
    kds = attach_mutual(a, b, example=IMAGES)
    ours, theirs, (kd_a, kd_b) = copy.deepcopy((a, b, kds))
    assert kd_a._teachers[0].model is theirs
    assert kd_b._teachers[0].model is ours
    assert not kd_a._teachers[0].eval_mode
    assert steps(ours, kd_a) == steps(a, kds[0])


def test_a_student_copied_without_its_handle_records_nothing():
    student, _, kd = attached()
    twin = copy.deepcopy(student)
    twin(IMAGES)
    student(IMAGES)
    kd.loss(LABELS).backward()
    assert kd._tape.forward is None


def test_a_deep_copy_shares_the_teacher_and_a_pickle_takes_it_along():
    student, teacher, kd = attached()
    assert copy.deepcopy((student, kd))[1]._teachers[0].model is teacher
    copied, twin_kd = copy.deepcopy((teacher, kd))
    assert twin_kd._teachers[0].model is copied  # what is copied beside the handle is used
    assert pickled((student, kd))[1]._teachers[0].model is not teacher


class InPlace(Net):
    def forward(self, x):
        return super().forward(x.sub_(0.5))


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled, saved])
def test_a_copy_knows_that_its_student_changes_the_images(copied):
    student = InPlace(4).train()
    kd = attach_kd(student, Net(6), losses=[KDLoss()], example=IMAGES)
    found = []
    for each, handle in ((student, kd), copied((student, kd))):
        each(IMAGES.clone())
        found.append(handle.loss(LABELS))
    torch.testing.assert_close(found[0], found[1])
