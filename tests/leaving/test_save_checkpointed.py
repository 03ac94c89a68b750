"""Students with torch's checkpoint_wrapper around a part, before or after attach_kd."""

import io

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
    checkpoint_wrapper,
    offload_wrapper,
)

from kdlayers import (
    CodebookTargets,
    FitNetLoss,
    KDPoint,
    attach_kd,
    bake,
    find_points,
    fold,
    load_student,
    save_student,
)
from kdlayers._step.sites import slots
from tests.nets import Net, batch

IMAGES, LABELS = batch()


class Stage(nn.Sequential):
    """A container with a forward of its own, which gets the hook; its last child gets the layer."""

    def forward(self, x):
        return super().forward(x) + 1


class Staged(Net):
    def __init__(self):
        super().__init__(4)
        self.first = Stage(*self.first)
        self.last = nn.Sequential(nn.Sequential(nn.Conv2d(4, 5, 3)), nn.Sequential(*self.last[1:]))


def of(*kinds):
    """Wrap all modules of these kinds."""
    return lambda model: apply_activation_checkpointing(
        model, checkpoint_wrapper, lambda module: type(module) in kinds
    )


def twice(model):
    model.last = checkpoint_wrapper(offload_wrapper(model.last))


WRAPPERS = {
    "stages": of(nn.Sequential, Stage),
    "leaves": of(nn.ReLU, nn.Conv2d),
    "both": of(nn.Sequential, Stage, nn.ReLU),
    "twice": twice,
}


def attached(wrapper, order, seed=0):
    """A student, wrapped before attach_kd, after it, or not at all."""
    torch.manual_seed(7)
    teacher = Net(6)
    torch.manual_seed(seed)
    model = Staged()
    if order == "before":
        WRAPPERS[wrapper](model)
    points = [KDPoint(name, targets=CodebookTargets(6)) for name in ("first", "last")]
    kd = attach_kd(model, teacher, points, losses=[FitNetLoss(at="last")], example=IMAGES)
    kd.fit([(IMAGES, LABELS)], progress=False)
    if order == "after":
        WRAPPERS[wrapper](model)
    return model, kd


def step(model, kd):
    """The loss and the gradients of a training step."""
    loss = F.cross_entropy(model.train()(IMAGES), LABELS) + kd.loss(LABELS)
    loss.backward()
    return loss.detach(), [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_file_loads_into_plain_and_wrapped_models(wrapper, order):
    model, kd = attached(wrapper, order)
    kd.detach()
    model.train()(IMAGES)  # changes the statistics of batch norms
    expected = model.eval()(IMAGES)
    file = io.BytesIO()
    save_student(model, file)
    assert torch.equal(load_student(Staged(), file).eval()(IMAGES), expected)
    wrapped = Staged()
    WRAPPERS[wrapper](wrapped)
    assert torch.equal(load_student(wrapped, file).eval()(IMAGES), expected)
    again = io.BytesIO()
    save_student(wrapped, again)
    assert torch.equal(load_student(Staged(), again).eval()(IMAGES), expected)
    assert torch.equal(bake(wrapped)(IMAGES), expected)
    torch.testing.assert_close(fold(model)(IMAGES), expected)


@pytest.mark.parametrize("order", ["before", "after"])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_states_are_those_of_an_unwrapped_student(wrapper, order):
    plain, plain_kd = attached(wrapper, "never")
    model, kd = attached(wrapper, order, seed=1)
    assert list(model.state_dict()) == list(plain.state_dict())
    model.load_state_dict(plain.state_dict())
    kd.load_state_dict(plain_kd.state_dict())
    assert torch.equal(model.eval()(IMAGES), plain.eval()(IMAGES))
    assert torch.equal(step(model, kd)[0], step(plain, plain_kd)[0])
    plain.load_state_dict(model.state_dict())
    assert torch.equal(model.eval()(IMAGES), plain.eval()(IMAGES))


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_steps_are_those_of_an_unwrapped_student(wrapper):
    expected, gradients = step(*attached(wrapper, "never"))
    for order in ("before", "after"):
        model, kd = attached(wrapper, order)
        found, grads = step(model, kd)
        assert torch.equal(found, expected)
        for mine, theirs in zip(grads, gradients, strict=True):
            torch.testing.assert_close(mine, theirs)
        kd.remove()
        assert not [key for key in model.state_dict() if ".kd." in key]


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_points_have_the_names_of_the_unwrapped_model(wrapper):
    model = Staged()
    names = [point.name for point in find_points(model, IMAGES)]
    WRAPPERS[wrapper](model)
    assert [point.name for point in find_points(model, IMAGES)] == names
    given = "last._checkpoint_wrapped_module.1"
    kd = attach_kd(model, at=[KDPoint(given, num_templates=4)], example=IMAGES)
    assert list(slots(model)) == ["last.1"]
    kd.remove()
    assert not [key for key in model.state_dict() if ".kd." in key]


def test_a_student_in_a_wrapper_is_saved_without_it():
    model = checkpoint_wrapper(Net(4)).eval()
    attach_kd(model, at=[KDPoint("last", num_templates=4)], example=IMAGES).detach()
    file = io.BytesIO()
    save_student(model, file)
    assert torch.equal(load_student(Net(4).eval(), file)(IMAGES), model(IMAGES))
