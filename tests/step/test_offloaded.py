"""Teachers whose weights are on the meta device between forwards, because they are offloaded."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from kdlayers import CodebookTargets, FitNetLoss, KDLoss, KDPoint, attach_kd, find_points
from kdlayers._models.examples import placement, to_model
from kdlayers.errors import ArgumentError
from tests.nets import Net, batch

IMAGES, LABELS = batch()
CPU = torch.device("cpu")


class Tokens(Net):
    """Has weights of its own beside its children's, as transformers do."""

    def __init__(self, channels):
        super().__init__(channels)
        self.shift = nn.Parameter(torch.ones(3, 1, 1))

    def forward(self, x):
        return super().forward(x + self.shift)


def cpu(hf, model, _folder):
    return hf.cpu_offload(model, execution_device=CPU)


def with_buffers(hf, model, _folder):
    return hf.cpu_offload(model, execution_device=CPU, offload_buffers=True)


def whole(hf, model, _folder):
    return hf.cpu_offload_with_hook(model, execution_device=CPU)[0]


def disk(hf, model, folder):
    return hf.disk_offload(model, folder, execution_device=CPU)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("make", [Net, Tokens])
@pytest.mark.parametrize("offload", [cpu, with_buffers, whole, disk])
def test_losses_are_those_of_the_teacher_in_memory(offload, make, double, tmp_path):
    hf = pytest.importorskip("accelerate")

    def values(offloaded):
        torch.manual_seed(0)
        student, teacher = Net(4), make(6).to(torch.float64 if double else torch.float32)
        if offloaded:
            teacher = offload(hf, teacher, tmp_path)
        assert find_points(teacher, IMAGES.to(torch.float64 if double else torch.float32))
        points = [KDPoint("last", targets=CodebookTargets(4))]
        losses = [KDLoss(), FitNetLoss(at="first")]
        kd = attach_kd(student, teacher, points, losses=losses, example=IMAGES)
        kd.fit([(IMAGES, LABELS)], progress=False)
        found = []
        for _ in range(2):
            student(IMAGES)
            found.append(kd.loss(LABELS))
        assert kd.state_dict()
        return found

    torch.testing.assert_close(values(True), values(False), rtol=0, atol=0)


@pytest.mark.parametrize("losses", [[FitNetLoss(at="first")], [FitNetLoss(at="stem")]])
def test_a_forward_that_ends_early_can_be_repeated(losses):
    hf = pytest.importorskip("accelerate")
    student, teacher = Net(4), cpu(hf, Tokens(6).eval(), None)
    with torch.no_grad():
        wanted = teacher(IMAGES)
    kd = attach_kd(student, teacher, losses=losses, example=IMAGES)
    for _ in range(2):
        student(IMAGES)
        assert kd.loss().isfinite()
    with torch.no_grad():
        torch.testing.assert_close(teacher(IMAGES), wanted)


def test_the_error_of_a_wrong_example_is_the_models():
    """Weights and buffers of the module that failed are still loaded then."""
    hf = pytest.importorskip("accelerate")
    teacher = with_buffers(hf, Net(6), None)
    norm = teacher.stem[1]
    norm.register_forward_hook(lambda *_: None)
    old = norm._old_forward
    norm._old_forward = lambda x: old(x[:, :1])  # fails inside, between loading and unloading
    with pytest.raises(ArgumentError, match="running_mean"):
        find_points(teacher, IMAGES)


def hooked(model, *devices):
    """A hook on the outside of the model with these devices: one device, or several hooks."""
    hooks = [SimpleNamespace(execution_device=device) for device in devices]
    model._hf_hook = hooks[0] if len(hooks) == 1 else SimpleNamespace(hooks=hooks)
    return model


@pytest.mark.parametrize("devices", [["cpu"], [CPU], [None, "cpu"]])
def test_the_hook_of_the_whole_model_states_the_device(devices):
    model = hooked(Net().bfloat16().to("meta"), *devices)
    assert placement(model) == (CPU, torch.bfloat16)
    (moved,) = to_model((IMAGES,), model)
    assert moved.device == CPU
    assert torch.equal(moved, IMAGES.bfloat16())


def test_the_hook_comes_before_weights_that_it_will_move():
    assert placement(hooked(Net(), torch.device("meta"))) == (torch.device("meta"), torch.float32)


def test_the_hook_of_a_part_states_the_device():
    model = hooked(Net().to("meta"), None)
    hooked(model.last[0], "cpu")
    assert placement(model)[0] == CPU


def test_without_a_hook_a_weight_in_memory_states_the_device():
    model = Net().to("meta")
    model.head.to_empty(device="cpu").bfloat16()
    model.stem[1].num_batches_tracked = torch.tensor(0)
    assert placement(model) == (CPU, torch.float32)


def test_a_model_on_the_meta_device_stays_there():
    assert placement(Net().to("meta")) == (torch.device("meta"), torch.float32)
    assert placement(hooked(Net().to("meta"), None))[0].type == "meta"
