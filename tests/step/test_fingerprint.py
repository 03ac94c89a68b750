"""A resumed run says when its teacher is not the teacher that the state was saved with."""

import copy
import hashlib

import pytest
import torch
from torch.utils.data import TensorDataset

from kdlayers import FitNetLoss, KDLoss, RecordedTeacher, attach_kd, attach_mutual
from kdlayers._step.fingerprint import weights_hash
from kdlayers._utils.checksums import checksum
from kdlayers.errors import CheckpointError, KDLayersWarning
from tests.nets import Net, batch

IMAGES, LABELS = batch()


def attached(teacher):
    return attach_kd(Net(4), teacher, losses=[KDLoss(), FitNetLoss(at="last")], example=IMAGES)


@pytest.fixture
def teacher():
    torch.manual_seed(0)
    return Net(6)


def test_the_same_weights_in_another_object_say_nothing(teacher):
    state = attached(teacher).state_dict()
    other = Net(6)
    other.load_state_dict(teacher.state_dict())
    attached(other).load_state_dict(state)


@pytest.mark.parametrize("entry", list(Net(6).state_dict()))
def test_every_changed_entry_of_a_teacher_is_said(teacher, entry):
    state = attached(teacher).state_dict()
    value = teacher.state_dict()[entry]
    value.view(-1)[-1] += 1
    with pytest.warns(KDLayersWarning, match=r"the weights of teacher 0 \(Net\) are not those"):
        attached(teacher).load_state_dict(state)


def test_the_state_is_loaded_all_the_same(teacher):
    source, other = attached(teacher), attached(Net(6))
    source.step = 7
    with pytest.warns(KDLayersWarning, match="weights of teacher 0"):
        other.load_state_dict(source.state_dict())
    assert other.step == 7


def test_only_the_other_one_of_two_teachers_is_named(teacher):
    pair = [teacher, Net(6)]
    state = attached(pair).state_dict()
    with pytest.warns(KDLayersWarning, match="teacher 1") as said:
        attached([teacher, Net(6)]).load_state_dict(state)
    assert len(said) == 1
    with pytest.warns(KDLayersWarning, match="saved with 2 teachers, but this handle has 1"):
        attached(teacher).load_state_dict(state)


def test_training_does_not_change_it_and_a_record_keeps_it(teacher, tmp_path):
    kd = attached(teacher)
    before = kd.state_dict()
    kd.student(IMAGES)
    kd.loss(LABELS).backward()
    assert kd.state_dict()["teachers"] == before["teachers"] == [weights_hash(teacher)]
    kd.record(TensorDataset(IMAGES, LABELS), tmp_path, views=1, progress=False)
    attached(RecordedTeacher(tmp_path)).load_state_dict(before)


def test_peers_are_not_compared():
    first, second = attach_mutual(Net(4), Net(4), example=IMAGES)
    state = first.state_dict()
    assert state["teachers"] == [None]
    with torch.no_grad():
        second.student.head.weight.add_(1.0)
    first.load_state_dict(state)


def test_states_of_version_2_load_without_a_word(teacher):
    """Version 2 had a checksum of the other entries only."""
    kd = attached(teacher)
    state = kd.state_dict()
    del state["teachers"], state["points"], state["checksum"]
    state["version"] = 2
    state["checksum"] = checksum(state)
    attached(Net(6)).load_state_dict(state)


def test_the_fingerprint_is_under_the_checksum(teacher):
    kd = attached(teacher)
    for changed in ([None], ["0" * 64], [], None):
        with pytest.raises(CheckpointError, match="checksum is wrong"):
            kd.load_state_dict({**kd.state_dict(), "teachers": changed})


def test_it_is_sha256_and_depends_on_values_not_on_memory(teacher):
    """An expanded buffer, which a model may have, counts like its copy."""
    other = copy.deepcopy(teacher)
    for model, table in ((teacher, torch.zeros(1).expand(3, 5)), (other, torch.zeros(3, 5))):
        model.register_buffer("table", table)
    assert weights_hash(teacher) == weights_hash(other)
    assert len(weights_hash(teacher)) == len(hashlib.sha256().hexdigest())
