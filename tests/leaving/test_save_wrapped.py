"""Students inside wrappers and inside larger models: saved, baked, folded and pruned."""

import io

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

from kdlayers import KDPoint, attach_kd, bake, fold, load_student, prune_templates, save_student
from kdlayers._step.sites import slots
from kdlayers.errors import AttachError
from tests.nets import Net, batch

IMAGES, _ = batch()


def student():
    model = Net(4)
    points = [KDPoint(name, num_templates=6, alpha=0.5) for name in ("first", "last")]
    kd = attach_kd(model, at=points, example=IMAGES)
    model(IMAGES)
    kd.detach()
    return model.eval()


@pytest.fixture
def alone(tmp_path):
    """A process group of this process alone."""
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


def timm_ema(model):
    return pytest.importorskip("timm.utils").ModelEmaV3(model)


class ExponentialMovingAverage(AveragedModel):
    """As in torchvision's references."""

    def __init__(self, model, decay):
        def average(held, current, _steps):
            return decay * held + (1 - decay) * current

        super().__init__(model, None, average, use_buffers=True)


WRAPPERS = {
    "compile": lambda model: torch.compile(model, backend="eager"),
    "DDP": DistributedDataParallel,
    "compile of DDP": lambda model: torch.compile(DistributedDataParallel(model), backend="eager"),
    "DDP of compile": lambda model: DistributedDataParallel(torch.compile(model, backend="eager")),
    "DataParallel": DataParallel,
    "AveragedModel": AveragedModel,
    "torchvision's average": lambda model: ExponentialMovingAverage(model, 0.9),
    "timm's average": timm_ema,
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_wrappers_around_a_student_are_not_saved(wrapper, alone):
    plain = student()
    expected = plain(IMAGES)
    wrapped = WRAPPERS[wrapper](plain)
    file = io.BytesIO()
    save_student(wrapped, file)
    fresh = load_student(Net(4).eval(), file)
    assert torch.equal(fresh(IMAGES), expected)
    assert list(slots(fresh)) == ["first", "last"]
    assert type(bake(wrapped)) is Net
    assert torch.equal(bake(wrapped)(IMAGES), expected)
    torch.testing.assert_close(fold(wrapped)(IMAGES), expected)
    report = prune_templates(wrapped, [IMAGES])
    assert [layer.name for layer in report] == ["first", "last"]
    torch.testing.assert_close(wrapped.eval()(IMAGES), expected)


def test_loading_into_a_wrapper_that_synchronises_is_refused(alone):
    file = io.BytesIO()
    save_student(student(), file)
    with pytest.raises(AttachError, match=r"DistributedDataParallel already.*then wrap"):
        load_student(DistributedDataParallel(Net(4)), file)
    model = Net(4)
    fully_shard(model)
    with pytest.raises(AttachError, match=r"FSDP already.*then wrap"):
        load_student(model, file)
    compiled = torch.compile(Net(4).eval(), backend="eager")
    assert load_student(compiled, file) is compiled
    assert torch.equal(compiled(IMAGES), student_of(file)(IMAGES))


def student_of(file):
    return load_student(Net(4).eval(), file)


def test_a_sharded_student_is_saved_as_a_whole(alone):
    model = student()
    expected = model(IMAGES)
    fully_shard(model.last)
    fully_shard(model)
    file = io.BytesIO()
    save_student(model, file)
    assert torch.equal(student_of(file)(IMAGES), expected)
    for call in (bake, fold, lambda s: prune_templates(s, [IMAGES])):
        with pytest.raises(AttachError, match=r"FSDP has split.*save_student\(student, path\)"):
            call(model)


class Detector(nn.Module):
    """A larger model, with weights of its own, that the student is a part of."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.ModuleDict({"body": Net(4)})
        self.boxes = nn.Linear(3, 4)

    def forward(self, x):
        return self.boxes(self.backbone["body"](x))


def test_a_larger_model_is_saved_as_a_whole():
    detector = Detector().eval()
    points = [KDPoint(name, num_templates=6) for name in ("first", "last")]
    attach_kd(detector.backbone["body"], at=points, example=IMAGES)
    file = io.BytesIO()
    save_student(detector, file)
    fresh = load_student(Detector().eval(), file)
    assert torch.equal(fresh(IMAGES), detector(IMAGES))
    assert list(slots(fresh)) == ["backbone.body.first", "backbone.body.last"]
    # And once more, now that the names are those of the detector.
    again = io.BytesIO()
    save_student(fresh, again)
    assert torch.equal(load_student(Detector().eval(), again)(IMAGES), detector(IMAGES))


def test_a_submodule_of_a_student_is_saved_by_its_own_names():
    model = student()
    features = nn.Sequential(nn.Sequential(model.stem, model.first), model.last)
    file = io.BytesIO()
    save_student(features, file)
    plain = Net(4)
    fresh = nn.Sequential(nn.Sequential(plain.stem, plain.first), plain.last).eval()
    assert torch.equal(load_student(fresh, file)(IMAGES), features(IMAGES))


def test_saving_something_other_than_a_module_is_an_error():
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, got dict"):
        save_student({}, io.BytesIO())
    with pytest.raises(TypeError, match=r"must be a torch\.nn\.Module, got dict"):
        load_student({}, io.BytesIO())
