"""Dry runs leave buffers, attributes and inputs as they were."""

import copy

import pytest
import torch
from torch import nn

from kdlayers import (
    AttentionTransferLoss,
    CodebookTargets,
    FitNetLoss,
    KDLoss,
    KDPoint,
    attach_kd,
    find_points,
)
from kdlayers._models.undisturbed import undisturbed
from kdlayers.errors import KDLayersWarning
from tests.nets import Net, batch

IMAGES, LABELS = batch()


class Counting(Net):
    """Counts its forwards in buffers and an attribute, and grows a buffer, as observers do."""

    def __init__(self):
        super().__init__(4)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("replaced", torch.zeros(()))
        self.register_buffer("ranges", torch.zeros(0))
        self.runs = 0

    def forward(self, x):
        self.calls += 1
        self.replaced = self.replaced + 1
        self.ranges.resize_(3).fill_(float(x.detach().mean()))
        self.runs += 1
        self.cache = x.shape
        return super().forward(x)


def state(model):
    return {k: v.clone() for k, v in model.state_dict().items() if ".kd." not in k}


def same(model, before):
    now = state(model)
    return now.keys() == before.keys() and all(torch.equal(now[k], v) for k, v in before.items())


def test_buffers_and_attributes_come_back():
    model = Counting()
    before, tensor = state(model), model.replaced
    with undisturbed(model) as changed:
        model(IMAGES)
        model(IMAGES)
    assert same(model, before)
    assert model.replaced is tensor
    assert model.runs == 0
    assert not hasattr(model, "cache")
    assert sorted(changed) == ["calls", "ranges", "replaced"]


def test_buffers_that_a_graph_has_saved_are_not_written():
    model = Net(4).eval()
    output = model(IMAGES)
    with undisturbed(model) as changed:
        model(IMAGES)
    output.sum().backward()
    assert changed == []


def test_attaching_leaves_no_count_in_student_or_teacher():
    student, teacher = Counting(), Counting()
    before = state(student), state(teacher)
    find_points(student, IMAGES)
    with pytest.warns(KDLayersWarning, match=r"teacher.*'calls', 'replaced', 'ranges'.*kd\.loss"):
        kd = attach_kd(
            student, teacher, [KDPoint("last", targets=CodebookTargets(4))], example=IMAGES
        )
    assert same(student, before[0])
    assert same(teacher, before[1])
    assert student.runs == teacher.runs == 0
    kd.remove()


@pytest.mark.filterwarnings("ignore:Please use quant_min", "ignore::DeprecationWarning")
def test_observers_of_quantisation_are_not_calibrated():
    student = torch.ao.quantization.QuantWrapper(Net(4)).train()
    student.qconfig = torch.ao.quantization.get_default_qat_qconfig("fbgemm")
    torch.ao.quantization.prepare_qat(student, inplace=True)
    before = state(student)
    assert any("min_val" in key for key in before)
    kd = attach_kd(
        student,
        Net(6),
        [KDPoint("module.last", "last", targets=CodebookTargets(4))],
        example=IMAGES,
    )
    assert same(student, before)
    kd.remove()


def test_the_layers_batch_norm_is_unmarked():
    student = Net(4)
    attach_kd(student, at=[KDPoint("last", num_templates=4)], example=torch.zeros(2, 3, 8, 8))
    norm = next(m for m in student.modules() if isinstance(m, nn.BatchNorm1d))
    assert norm.training
    assert norm.num_batches_tracked == 0
    assert torch.equal(norm.running_var, torch.ones(4))
    assert torch.equal(norm.running_mean, torch.zeros(4))


class InPlace(Net):
    def forward(self, x):
        return super().forward(x.sub_(0.5).mul_(2))


class Plain(Net):
    def forward(self, x):
        return super().forward((x - 0.5) * 2)


def test_a_model_that_changes_its_input_gets_a_copy_in_dry_runs():
    example = torch.randn(2, 3, 8, 8)
    kept = example.clone()
    find_points(InPlace(), example)
    assert torch.equal(example, kept)
    attach_kd(InPlace(), InPlace(6), [KDPoint("last", targets=CodebookTargets(4))], example=example)
    assert torch.equal(example, kept)


@pytest.mark.parametrize("taught", [False, True])
@pytest.mark.parametrize("changes", ["student", "teacher", "both"])
def test_losses_are_those_of_models_that_leave_their_input_alone(changes, taught):
    def value(student_class, teacher_class):
        torch.manual_seed(0)
        student, teacher = student_class(4), teacher_class(6)
        losses = [KDLoss(), FitNetLoss(at="last")]
        kd = attach_kd(student, teacher, losses=losses, example=IMAGES)
        images = IMAGES.clone()
        if taught:
            kd.teach(images)
        student(images)
        loss = kd.loss(LABELS)
        loss.backward()
        changed = not torch.equal(images, IMAGES)
        return loss, changed

    expected, _ = value(Plain, Plain)
    student = Plain if changes == "teacher" else InPlace
    teacher = Plain if changes == "student" else InPlace
    found, changed = value(student, teacher)
    torch.testing.assert_close(found, expected)
    assert changed == (student is InPlace)  # as without kdlayers


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("part", [None, "last"])
def test_torchscript_in_the_teacher_changes_nothing(part):
    """Whole, or one module of it; the losses are those of the teacher without TorchScript."""
    torch.manual_seed(0)
    student, plain = Net(4), Net(6)
    teacher = copy.deepcopy(plain).train()
    losses = [KDLoss()]
    if part is None:
        teacher = torch.jit.script(teacher)
    else:
        teacher.last = torch.jit.script(teacher.last)
        losses += [AttentionTransferLoss(at=("first", "first"))]
    before, found = state(teacher), []
    for model in (plain, teacher):
        kd = attach_kd(student, model, losses=losses, example=IMAGES)
        student.train()(IMAGES)
        found.append(kd.loss(LABELS))
        kd.remove()
    assert torch.equal(*found)
    assert same(teacher, before)
    assert all(module.training for module in teacher.modules())


def test_flags_come_back_where_a_buffer_cannot(monkeypatch):
    model = Net(4).train()
    monkeypatch.setattr("kdlayers._models.undisturbed._equal", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), undisturbed(model):
        pass
    assert all(module.training for module in model.modules())
