"""A few dozen tries; ``python -m tests.reliability --ways N`` runs more."""

import random

import pytest
import torch

from kdlayers._step import replay
from tests.reliability import ways

pytestmark = pytest.mark.filterwarnings("ignore::kdlayers.errors.KDLayersWarning")


@pytest.mark.slow
def test_all_ways_to_a_loss_agree():
    counts = ways.run(40, seed=3)
    assert counts["tried"] == 40
    assert counts["silently wrong"] == counts["raw errors"] == 0
    assert counts["right"] > 30


def differences():
    torch.manual_seed(0)
    given = ways.setting(random.Random(0), timm=False)
    given.losses, given.point = ["KD", "features"], "codebook"
    return list(ways.differences(given))


def test_the_right_numbers_of_one_setting():
    assert differences() == []


@pytest.mark.parametrize("name", ["bake", "fold", "load_student"])
def test_a_wrong_form_of_the_student_is_noticed(monkeypatch, name):
    right = getattr(ways, name)

    @torch.no_grad()
    def wrong(*args):
        student = right(*args)
        student.head.weight.mul_(1.01)
        return student

    monkeypatch.setattr(ways, name, wrong)
    assert differences() == [{"load_student": "loaded"}.get(name, f"{name.rstrip('e')}ed")]


def test_a_wrong_record_is_noticed(monkeypatch):
    read = replay.read
    monkeypatch.setattr(replay, "read", lambda *args: [1.01 * t for t in read(*args)])
    assert differences() == ["record", "RecordedTeacher"]
