"""State dicts of students: plain ones and those of other KD layers."""

import pytest
import torch
from torch import nn

from kdlayers import KDPoint, attach_kd
from kdlayers._step.sites import slots
from tests.nets import Net, batch

IMAGES, _ = batch()


def student(*names):
    model = Net(4)
    attach_kd(model, at=[KDPoint(name, num_templates=6) for name in names], example=IMAGES)
    return model


@pytest.mark.parametrize("held", ["first", "last"])
def test_a_state_of_one_kd_layer_does_not_load_strictly_into_two(held):
    two, one = student("first", "last"), student(held)
    other = "last" if held == "first" else "first"
    prefix = {"first": "first.2.kd.", "last": "last.1.kd."}[other]
    absent = {key for key in two.state_dict() if key.startswith(prefix)}
    counter = {f"{prefix}norm.num_batches_tracked"}  # torch makes it up in states without versions
    with pytest.raises(RuntimeError, match=r"Missing key\(s\) in state_dict: ") as caught:
        two.load_state_dict(one.state_dict())
    assert all(key in str(caught.value) for key in absent - counter)
    before = slots(two)[other].head.weight.clone()
    result = two.load_state_dict(one.state_dict(), strict=False)
    assert absent - counter <= set(result.missing_keys) <= absent
    assert len(set(result.missing_keys)) == len(result.missing_keys)
    assert torch.equal(slots(two)[held].head.weight, slots(one)[held].head.weight)
    assert torch.equal(slots(two)[other].head.weight, before)


def test_a_plain_state_loads_strictly_and_again():
    two, plain = student("first", "last"), Net(4)
    kept = {name: slot.head.weight.clone() for name, slot in slots(two).items()}
    for _ in range(2):
        two.load_state_dict(plain.state_dict())
        assert torch.equal(two.head.weight, plain.head.weight)
    assert all(torch.equal(slots(two)[name].head.weight, kept[name]) for name in kept)
    # One call's findings are not the next one's.
    two.load_state_dict(student("first", "last").state_dict())
    two.load_state_dict(plain.state_dict())


def test_the_same_inside_a_larger_model():
    larger = nn.ModuleDict({"student": student("first", "last"), "head": nn.Linear(3, 2)})
    plain = nn.ModuleDict({"student": Net(4), "head": nn.Linear(3, 2)})
    larger.load_state_dict(plain.state_dict())
    other = nn.ModuleDict({"student": student("last"), "head": nn.Linear(3, 2)})
    with pytest.raises(RuntimeError, match=r'Missing key.*"student\.first\.2\.kd\.head\.weight"'):
        larger.load_state_dict(other.state_dict())
