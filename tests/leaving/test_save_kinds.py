"""Students of other dtypes, quantized ones, modules with states of their own, and options."""

import io
import itertools

import numpy as np
import pytest
import torch
from torch import nn

from kdlayers import KDPoint, attach_kd, bake, load_student, save_student
from kdlayers._step.sites import slots
from kdlayers.errors import CheckpointError
from tests.nets import Net, batch

IMAGES, _ = batch()
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def student(model=None, *, memory="normal", alpha=1.0):
    model = Net(4) if model is None else model
    points = [KDPoint(name, num_templates=6, alpha=alpha) for name in ("first", "last")]
    kd = attach_kd(model, at=points, example=IMAGES, memory=memory)
    model(IMAGES)
    kd.detach()
    return model.eval()


def file_of(model):
    file = io.BytesIO()
    save_student(model, file)
    return file


@pytest.mark.parametrize(("saved", "here"), list(itertools.product(DTYPES, DTYPES)))
def test_kd_layers_take_the_dtype_of_the_model(saved, here):
    model = student().to(saved)
    fresh = load_student(Net(4).to(here).eval(), file_of(model))
    images = IMAGES.to(here)
    assert torch.equal(fresh(images), model.to(here)(images))
    assert {t.dtype for t in fresh.state_dict().values()} == {here, torch.int64}
    fresh.train()(images).sum().backward()


def test_mixed_dtypes_are_kept():
    # KD layers in float32 in a half-precision model, as mixed-precision recipes leave norms.
    model = student().to(torch.bfloat16)
    for slot in slots(model).values():
        slot.float()
    fresh = load_student(Net(4).to(torch.bfloat16), file_of(model))
    assert all(
        p.dtype == torch.float32 for slot in slots(fresh).values() for p in slot.parameters()
    )
    # Batch norms alone in float32: each tensor follows those that have its dtype in the file.
    model = student().half()
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.float()
    mixed = Net(4).half()
    mixed.stem[1].float()
    fresh = load_student(mixed, file_of(model))
    for slot in slots(fresh).values():
        assert slot.norm.weight.dtype == slot.norm.running_var.dtype == torch.float32
        assert slot.head.weight.dtype == slot.value.scale.dtype == torch.float16


def test_values_that_do_not_fit_the_dtype_are_refused():
    model = student()
    with torch.no_grad():
        model.head.bias[0] = 1e6
    half = Net(4).half()
    before = {key: value.clone() for key, value in half.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"head\.bias has values that torch\.float16 cannot"):
        load_student(half, file_of(model))
    assert all(torch.equal(value, before[key]) for key, value in half.state_dict().items())
    assert load_student(Net(4), file_of(model)).head.bias[0] == 1e6


class Counting(Net):
    """Keeps a state that is not a tensor."""

    def __init__(self):
        super().__init__(4)
        self.facts = {}

    def get_extra_state(self):
        return self.facts

    def set_extra_state(self, state):
        self.facts = state


def test_states_that_are_not_tensors_are_kept():
    model = student(Counting())
    model.facts = {"seen": 7, "mean": torch.ones(3), "names": ["a", ("b", None)], "on": True}
    fresh = load_student(Counting(), file_of(model))
    assert torch.equal(fresh.facts.pop("mean"), torch.ones(3))
    assert fresh.facts == {"seen": 7, "names": ["a", ("b", None)], "on": True}


@pytest.mark.parametrize("value", [np.float64(1.5), {1, 2}, object(), {"deep": [np.ones(2)]}])
def test_states_that_a_file_without_code_cannot_hold_are_refused(value):
    model = student(Counting())
    model.facts = value
    with pytest.raises(CheckpointError, match=r"_extra_state.* let get_extra_state\(\) return"):
        file_of(model)


class Tagged(torch.Tensor):
    pass


def test_tensors_of_other_classes_are_refused_and_views_are_not():
    model = student()
    model.register_buffer("tagged", torch.zeros(3).as_subclass(Tagged))
    with pytest.raises(CheckpointError, match="'tagged' is a Tagged"):
        file_of(model)
    model, fresh = student(), Net(4)
    for each in (model, fresh):
        each.register_buffer("wide", torch.zeros(1).expand(1000))
    model.wide = torch.ones(1).expand(1000)
    with pytest.raises(CheckpointError, match="failed to load the file's weights"):
        load_student(fresh, file_of(model))  # torch refuses to write into expanded tensors
    fresh.wide = torch.zeros(1000)
    assert torch.equal(load_student(fresh, file_of(model)).wide, torch.ones(1000))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*quantized:UserWarning")
@pytest.mark.filterwarnings("ignore:.*TypedStorage is deprecated:UserWarning")
def test_quantized_students_are_saved_and_loaded():
    def quantized(model):
        return torch.ao.quantization.quantize_dynamic(model, {nn.Linear})

    model = quantized(student())
    file = file_of(model)
    fresh = load_student(quantized(Net(4).eval()), file)
    assert torch.equal(fresh(IMAGES), model(IMAGES))
    with pytest.raises(CheckpointError, match="do not fit this Net"):
        load_student(Net(4), file)


def test_memory_and_alpha_are_saved():
    model = student(memory="low", alpha=np.float64(0.25))
    fresh = load_student(Net(4).eval(), file_of(model))
    again = load_student(Net(4).eval(), file_of(fresh))
    for each in (fresh, again):
        assert [slot.memory for slot in slots(each).values()] == ["low", "low"]
        assert [slot.alpha for slot in slots(each).values()] == [0.25, 0.25]
        assert torch.equal(each(IMAGES), model(IMAGES))
    baked = bake(model)
    assert [layer.memory for layer in (baked.first[2][1], baked.last[1][1])] == ["low", "low"]
    for slot in slots(model).values():
        slot.alpha = torch.tensor(0.5)  # as a schedule may set it
    assert [slot.alpha for slot in slots(load_student(Net(4), file_of(model))).values()] == [
        0.5
    ] * 2


def test_changed_kd_layers_are_refused():
    model = student()
    nn.utils.parametrizations.weight_norm(slots(model)["last"].head)
    with pytest.raises(CheckpointError, match=r"'last' differs from a plain one.*parametrizations"):
        file_of(model)
