"""kd.gradient_norms: against gradients taken one by one, with nothing left behind."""

import copy

import pytest
import torch
import torch.nn.functional as F

from kdlayers import (
    CodebookTargets,
    DistillLoss,
    FeatureLoss,
    FitNetLoss,
    KDLoss,
    KDPoint,
    StudentFriendlyKDLoss,
    attach_kd,
)
from kdlayers.errors import ArgumentError, ArgumentTypeError, StaleCaptureError
from tests.nets import Net, batch

IMAGES, LABELS = batch()


def attached(*losses, at=()):
    torch.manual_seed(0)
    student = Net(4)
    return student.train(), attach_kd(student, Net(6), at, losses=losses, example=IMAGES)


def one_by_one(student, value):
    """The norm over all parameters before the point, by backward()."""
    student.zero_grad()
    value.backward(retain_graph=True)
    shared = [*student.stem.parameters(), *student.first.parameters()]
    return sum(p.grad.square().sum() for p in shared).sqrt().item()


def test_norms_equal_those_of_separate_backwards():
    losses = [KDLoss(weight=0.5), FeatureLoss(at="first", distance="mse", weight=lambda step: 3.0)]
    student, kd = attached(*losses)
    logits = student(IMAGES)
    found = kd.gradient_norms(LABELS, task=F.cross_entropy(logits, LABELS))
    assert kd.step == 0
    assert all(p.grad is None for p in student.parameters())
    assert set(found) == {
        *("KDLoss", "KDLoss.weighted", "task"),
        *("FeatureLoss.first", "FeatureLoss.first.weighted"),
    }

    for loss in (0, 1):
        other, handle = attached(copy.deepcopy(losses[loss]))
        other.load_state_dict(student.state_dict())
        handle._terms[0].loss.load_state_dict(losses[loss].state_dict())
        handle._teachers[0].model.load_state_dict(kd._teachers[0].model.state_dict())
        other(IMAGES)
        expected = one_by_one(other, handle.loss(LABELS)) / (0.5, 3.0)[loss]
        name = ("KDLoss", "FeatureLoss.first")[loss]
        assert found[name] == pytest.approx(expected, rel=1e-4)
        assert found[f"{name}.weighted"] == pytest.approx((0.5, 3.0)[loss] * expected, rel=1e-4)


def test_the_norm_of_the_task_equals_that_of_its_loss():
    student, kd = attached(FeatureLoss(at="first"))
    value = F.cross_entropy(student(IMAGES), LABELS)
    found = kd.gradient_norms(task=value)["task"]
    assert found == pytest.approx(one_by_one(student, value), rel=1e-5)


def test_norms_give_the_weight_that_balances_two_terms():
    student, kd = attached(KDLoss(), at=[KDPoint("last", targets=CodebookTargets(4))])
    kd.fit([(IMAGES, LABELS)])
    student(IMAGES)
    norms = kd.gradient_norms(LABELS)
    weight = norms["KDLoss"] / norms["TemplateLoss.last"]
    kd._terms[0].loss.weight = weight
    student(IMAGES)
    norms = kd.gradient_norms(LABELS)
    assert norms["TemplateLoss.last.weighted"] == pytest.approx(norms["KDLoss"], rel=0.05)


def test_the_next_step_is_unaffected():
    student, kd = attached(KDLoss())
    student(IMAGES)
    kd.gradient_norms(LABELS)
    student(IMAGES)
    kd.loss(LABELS).backward()
    assert kd.step == 1
    student(IMAGES)
    kd.gradient_norms(LABELS)
    with pytest.raises((StaleCaptureError, ValueError, RuntimeError), match=r"no training forward"):
        kd.loss(LABELS)


class Mean(DistillLoss):
    """The mean of the student's features, times a factor."""

    factor = 1.0

    def forward(self, student, teacher, targets=None):
        return student.float().mean() * self.factor


@pytest.mark.parametrize("factor", [1e-5, 1.0, 1e5])
def test_float16_neither_loses_small_gradients_nor_overflows(factor):
    found = {}
    for enabled in (False, True):
        student, kd = attached(Mean(at="first", name="mean"))
        kd._terms[0].loss.factor = factor
        with torch.autocast("cpu", dtype=torch.float16, enabled=enabled):
            student(IMAGES)
            found[enabled] = kd.gradient_norms(LABELS)["mean"]
    assert found[True] == pytest.approx(found[False], rel=0.01)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")
def test_norms_of_a_compiled_student_are_those_of_the_eager_one():
    found = []
    for backend in (None, "aot_eager"):  # whose backward gives zeros to parameters out of reach
        torch.manual_seed(0)
        student, kd = attached(KDLoss(), FitNetLoss(at="first"))
        run = torch.compile(student, backend=backend) if backend else student
        found.append(kd.gradient_norms(LABELS, task=F.cross_entropy(run(IMAGES), LABELS)))
    assert found[1] == pytest.approx(found[0], rel=1e-4)


def test_losses_with_statistics_keep_their_state_and_give_the_norms_of_a_step():
    def fresh():
        torch.manual_seed(0)
        normalised = FeatureLoss(at="first", distance="mse", normalize_teacher=True)
        return attached(normalised, StudentFriendlyKDLoss())

    student, kd = fresh()
    before = copy.deepcopy(kd.state_dict()["losses"])
    random = torch.get_rng_state()
    student(IMAGES)
    found = kd.gradient_norms(LABELS)
    assert torch.equal(random, torch.get_rng_state())
    for name, state in kd.state_dict()["losses"].items():
        assert all(torch.equal(value, before[name][key]) for key, value in state.items())
    assert all(module.training for term in kd._terms for module in term.loss.modules())

    twin, other = fresh()
    other._terms[1].loss.weight = 0.0
    twin(IMAGES)
    expected = one_by_one(twin, other.loss(LABELS))
    assert other.state_dict()["losses"]["FeatureLoss.first"]["teacher_norm.count"] == 1
    assert found["FeatureLoss.first"] == pytest.approx(expected, rel=1e-4)


def test_a_task_that_is_not_a_scalar_with_gradient_is_an_error():
    student, kd = attached(KDLoss())
    for wrong in (torch.zeros(3, requires_grad=True), torch.tensor(1.0), 2.0):
        student(IMAGES)
        with pytest.raises(ArgumentTypeError, match="task= must be the value of your own loss"):
            kd.gradient_norms(LABELS, task=wrong)
    student, kd = attached(KDLoss(name="task"))
    logits = student(IMAGES)
    with pytest.raises(ArgumentError, match="give it another name"):
        kd.gradient_norms(LABELS, task=logits.sum())


def test_terms_without_shared_parameters_are_an_error():
    student, kd = attached(KDLoss())
    student(IMAGES)
    other = torch.nn.Linear(2, 1)
    with pytest.raises(ArgumentError, match=r"all of \['KDLoss', 'task'\]"):
        kd.gradient_norms(LABELS, task=other(torch.zeros(2)).sum())
