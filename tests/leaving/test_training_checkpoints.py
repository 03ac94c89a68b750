"""Checkpoints of training scripts, and loading the averaged or the best student from them."""

import argparse
import copy

import pytest
import torch

from kdlayers import KDPoint, attach_kd, load_student, save_student
from kdlayers.errors import CheckpointError
from tests.nets import Net, batch

IMAGES, _ = batch(4)
POINTS = [KDPoint("last", num_templates=4)]


def trained():
    student = Net()
    kd = attach_kd(student, at=POINTS, example=IMAGES)
    kd.detach()
    return student.eval()


def timms(path):
    """What timm's CheckpointSaver writes: weights, averaged weights, and the script's arguments."""
    model, averaged = trained(), trained()
    content = {"epoch": 3, "arch": "net", "args": argparse.Namespace(lr=0.1)}
    weights = {"state_dict": model.state_dict(), "state_dict_ema": averaged.state_dict()}
    torch.save({**content, **weights}, path)
    return averaged


def test_load_student_explains_a_timm_checkpoint(tmp_path):
    timms(tmp_path / "model_best.pth.tar")
    with pytest.raises(
        CheckpointError, match=r"a training script's checkpoint .*save_student"
    ) as e:
        load_student(Net(), tmp_path / "model_best.pth.tar")
    assert "weights_only=False" not in str(e.value)
    assert "state_dict_ema" in str(e.value)
    assert "damaged" not in str(e.value)


def test_load_student_explains_a_checkpoint_of_torchvisions_references(tmp_path):
    state = trained().state_dict()
    torch.save({"model": state, "model_ema": state, "epoch": 1}, tmp_path / "checkpoint.pth")
    with pytest.raises(CheckpointError, match=r"\(it has model, model_ema\), not a file"):
        load_student(Net(), tmp_path / "checkpoint.pth")


def test_the_advice_in_the_error_loads_the_averaged_student(tmp_path):
    averaged = timms(tmp_path / "model_best.pth.tar")
    model = Net()
    attach_kd(model, at=POINTS, example=IMAGES).detach()
    with torch.serialization.safe_globals([argparse.Namespace]):
        checkpoint = torch.load(tmp_path / "model_best.pth.tar", weights_only=True)
    model.load_state_dict(checkpoint["state_dict_ema"])
    save_student(model, tmp_path / "student.pt")
    student = load_student(Net(), tmp_path / "student.pt").eval()
    assert torch.equal(student(IMAGES), averaged(IMAGES))


def test_an_averaged_copy_is_saved_as_it_is(tmp_path):
    averaged = torch.optim.swa_utils.AveragedModel(trained(), use_buffers=True)
    for scale in (0.5, 2.0):
        other = copy.deepcopy(averaged.module)
        for p in other.parameters():
            p.data *= scale
        averaged.update_parameters(other)
    save_student(averaged.module, tmp_path / "student.pt")
    student = load_student(Net(), tmp_path / "student.pt").eval()
    assert torch.equal(student(IMAGES), averaged.eval()(IMAGES))
